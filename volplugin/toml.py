"""TOML files in, and TOML lines out; the standard library only reads them."""

import json
import re
import tomllib
from typing import Any, Final

from volplugin.errors import InvalidArgument

_LARGEST: Final = 1 << 20  # bytes
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_PLACED: Final = re.compile(r"(.*) \(at (line .*|end of document)\)", re.DOTALL)


def read_file(file: str, *, must_exist: bool) -> dict[str, Any]:
    """Return the tables of a TOML file; nothing where it may be absent and is.

    Raise `InvalidArgument` that names the file, and the line where one is at fault.
    """
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST + 1)
    except FileNotFoundError:
        if not must_exist:
            return {}
        raise InvalidArgument(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgument(f"{file}: can't be read: {reason}") from error
    if len(data) > _LARGEST:
        raise InvalidArgument(f"{file}: larger than {_LARGEST} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InvalidArgument(f"{file}: line {number}: not UTF-8") from error
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InvalidArgument(f"{file}: nested too deeply") from error
    except ValueError as error:  # also what int() says of a number of 5,000 digits
        told = _PLACED.fullmatch(str(error))
        if told is None:
            raise InvalidArgument(f"{file}: not TOML: {error}") from error
        if told[2] == "end of document":
            last = text.rpartition("\n")[2]
            place = f"line {text.count(chr(10)) + 1}, column {len(last) + 1}"
        else:
            place = told[2]
        raise InvalidArgument(f"{file}: {place}: not TOML: {told[1]}") from error


def line(name: str, value: object) -> str:
    """Return the line that sets ``name`` to ``value``."""
    return f"{key(name)} = {_value(value)}"


def key(name: str) -> str:
    """Return ``name`` as TOML wants it, in quotes where it needs them."""
    return name if _BARE_KEY.fullmatch(name) else _value(name)


def _value(value: object) -> str:
    if isinstance(value, str):
        # JSON's strings are TOML's basic strings, but for DEL, which TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"no setting has a {type(value).__name__}")
