"""The parsers that most options need; `volplugin.options` offers them by name.

Each takes the user's text and returns the value, or raises `InvalidArgument` that says
what the text is and what would be right. None trims, guesses or repairs.
"""

import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

import attrs

from volplugin import sizes
from volplugin.errors import InvalidArgument

T = TypeVar("T")

_LARGEST_ID: Final = 2**32 - 2  # chown(2) takes -1, 2**32-1, for "leave as it is"
_LONGEST_PATH: Final = 4095  # bytes: the kernel's PATH_MAX, 4096, counts the final NUL
_LONGEST_WORD: Final = 64
_LARGEST_RATIO: Final = 1000.0
_LONGEST_WAIT: Final = 1e6  # seconds; Python's own waits overflow far above

_TRUE: Final = frozenset({"", "true", "yes", "1", "on"})
_FALSE: Final = frozenset({"false", "no", "0", "off"})
_DIGITS: Final = re.compile(r"[0-9]{1,20}")
_OCTAL: Final = re.compile(r"[0-7]{1,5}")
_DECIMAL: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{1,40})?")

_reprlib = reprlib.Repr()
_reprlib.maxstring = 120
quote = _reprlib.repr  # the user's words in a message: escaped, and not a megabyte

count = sizes.parse_count


def size(minimum: int = 1, maximum: int = sizes.LARGEST) -> Callable[[str], int]:
    """Make a parser of sizes in bytes from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        value = sizes.parse_size(text)
        if value < minimum:
            least = sizes.format_size(minimum)
            raise InvalidArgument(f"{quote(text)} is below the minimum, {least}")
        if value > maximum:
            most = sizes.format_size(maximum)
            raise InvalidArgument(f"{quote(text)} is above the maximum, {most}")
        return value

    return parse


def mode(text: str) -> int:
    """Parse permission bits as chmod(1) takes them: octal, at most 7777."""
    if not _OCTAL.fullmatch(text) or int(text, 8) > 0o7777:
        raise InvalidArgument(
            f"{quote(text)} is not a mode; give octal digits up to 7777, such as 0755"
        )
    return int(text, 8)


def identity(text: str) -> int:
    """Parse a numeric user or group id, 0 to 2**32-2."""
    if not _DIGITS.fullmatch(text) or int(text) > _LARGEST_ID:
        raise InvalidArgument(
            f"{quote(text)} is not an id; give a number from 0 to {_LARGEST_ID}"
        )
    return int(text)


def boolean(text: str) -> bool:
    """Parse yes or no; the bare key (``-o exec``), which arrives as "", is yes."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise InvalidArgument(
        f"{quote(text)} is neither yes nor no; give true, yes, on or 1, "
        "or false, no, off or 0"
    )


def absolute_path(text: str) -> str:
    """Parse an absolute path that is already in its plain form.

    One trailing slash is dropped. ``.``, ``..`` and empty components are refused: what
    they mean depends on symbolic links, and no two texts may name one directory.
    """
    if not text.startswith("/"):
        raise InvalidArgument(f"{quote(text)} is not an absolute path; begin with /")
    if "\0" in text or "\n" in text:
        raise InvalidArgument(
            f"{quote(text)} holds a NUL or a newline; no path may have one"
        )
    try:
        length = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{quote(text)} is not valid UTF-8") from error
    if length > _LONGEST_PATH:
        raise InvalidArgument(
            f"{quote(text)} is {length} bytes long; a path has at most {_LONGEST_PATH}"
        )
    path = text.removesuffix("/")
    if text != "/" and not {"", ".", ".."}.isdisjoint(path[1:].split("/")):
        raise InvalidArgument(
            f"{quote(text)} has empty, . or .. components; "
            f"give the plain path, such as {quote(_plain(text))}"
        )
    return path or "/"


def pair(text: str) -> tuple[str, str]:
    """Parse ``KEY=VALUE``, as ``docker volume create -o`` takes it."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise InvalidArgument(f"{quote(text)} is not KEY=VALUE")
    return key, value


def text(text: str) -> str:
    """Parse any text on one line: without control characters and valid UTF-8."""
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text):
        raise InvalidArgument(f"{quote(text)} holds control characters; leave them out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{quote(text)} is not valid UTF-8") from error
    return text


@attrs.frozen
class ListOf(Generic[T]):
    """A parser of lists: texts separated by ``,``, "" is none; or a list of texts.

    ``item`` parses each of them. Where items may hold a comma, a text ``is_one``.
    """

    item: Callable[[str], T]
    is_one: bool = False

    def __call__(self, given: str | Sequence[str]) -> tuple[T, ...]:
        """Parse the list."""
        if isinstance(given, str):
            texts = [given] if self.is_one else given.split(",")
            given = texts if given else []
        if not all(isinstance(item, str) for item in given):
            raise InvalidArgument(f"{quote(given)} is not a list of texts")
        return tuple(self.item(item) for item in given)


path_list: Final = ListOf(absolute_path)
name_list: Final = ListOf(text)
pair_list: Final = ListOf(pair, is_one=True)


def seconds(text: str) -> float:
    """Parse a time in seconds, above 0 and up to a million: ``5``, ``0.5``."""
    return _above_zero(
        text, _LONGEST_WAIT, "a time; give seconds above 0, such as 5 or 0.5"
    )


def ratio(text: str) -> float:
    """Parse a ratio, above 0 and up to a thousand: ``1``, ``1.5``."""
    return _above_zero(
        text, _LARGEST_RATIO, "a ratio; give a number above 0, such as 1 or 1.5"
    )


def _above_zero(text: str, most: float, meant: str) -> float:
    value = float(text) if _DECIMAL.fullmatch(text) else math.nan
    if not 0 < value <= most:
        raise InvalidArgument(f"{quote(text)} is not {meant}")
    return value


def choice(*names: str) -> Callable[[str], str]:
    """Make a parser that takes one of ``names``."""

    def parse(text: str) -> str:
        if text not in names:
            raise InvalidArgument(
                f"{quote(text)} is none of {', '.join(names)}{nearest(text, names)}"
            )
        return text

    return parse


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'size'?``, the end of a message on ``word``, or ""."""
    if len(word) > _LONGEST_WORD:
        return ""
    by_form = {_form(each): each for each in known}
    found = difflib.get_close_matches(_form(word), by_form, n=1)
    return f"; did you mean {by_form[found[0]]!r}?" if found else ""


def _form(word: str) -> str:
    return word.lower().replace("_", "-")


def _plain(path: str) -> str:
    return "/" + os.path.normpath(path).lstrip("/")
