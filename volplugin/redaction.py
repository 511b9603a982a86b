"""Secrets blanked out of what was said on a socket, so that it can be shown to others.

What looks secret is told by names: of options, of headers, of ``name=value`` within a
value. Rather too much is blanked than too little; the rest stays as it was, byte for
byte.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import attrs

from volplugin.parsers import quote

BLANK: Final = "***"
WORDS: Final = ("secret", "pass", "pwd", "token", "key", "cred", "auth", "cookie")

_SECRET: Final = re.compile("|".join(WORDS), re.IGNORECASE)
# Bounded, so that no text makes a search take long.
_WORD: Final = rf"(?:{'|'.join(WORDS)})[\w.-]{{0,64}}"
_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:\s*)?', re.DOTALL)
# In an option such as o=addr=10.0.0.1,password=…, and in the query of a URL.
_PAIR: Final = re.compile(
    rf'({_WORD}=)(?=[^",;&\s])([^"\\,;&\s]*(?:\\.[^"\\,;&\s]*)*)', re.IGNORECASE
)
_USER: Final = re.compile(r"(://)([^/@\s\"]+)(?=@)")
# What our own errors say of an option: `options.parse`, `options.differences`.
_TOLD: Final = re.compile(
    rf"(\boption [\w.-]{{0,64}}?{_WORD}: |{_WORD} is (?=.*, asked for )).*",
    re.IGNORECASE,
)
_PART: Final = 4  # characters: an error cuts long values short


def looks_secret(name: str) -> bool:
    """Tell whether what has this name is to be shown to nobody."""
    return _SECRET.search(name) is not None


@attrs.define
class Redaction:
    """Blanks out one request, and then the answers to it, which may quote it."""

    _secrets: set[str] = attrs.field(factory=set, init=False)
    _unknown: bool = attrs.field(default=False, init=False)

    def request_line(self, line: str) -> str:
        """Return the line without secrets in its path."""
        return self._pairs(line)

    def header(self, line: str) -> str:
        """Return ``Name: value``, without its value where the name looks secret."""
        name, colon, value = line.partition(":")
        if not _SECRET.search(name) or not value.strip():
            return line
        self._secrets.add(value.strip())
        return f"{name}{colon} {BLANK}"

    def body(self, text: str) -> str:
        """Return a request's body without secrets.

        Of one that is no JSON, such as half a body, nothing stays after the first word
        that looks secret.
        """
        if not _may_hold_secrets(text):
            return text
        if _is_json(text):
            return self._pairs(self._members(text))
        return self.unreadable(text)

    def unreadable(self, text: str) -> str:
        """Return what is no JSON or no HTTP up to the first word that looks secret."""
        found = _SECRET.search(text)
        if found is not None:
            self._unknown = True
            return text[: found.end()] + BLANK
        if _SECRET.search(text.replace("\0", "")):  # UTF-16
            self._unknown = True
            return BLANK
        return text

    def answer(self, text: str) -> str:
        """Return the body of an answer without secrets, its own and the request's."""
        has_secrets = self._unknown or bool(self._secrets)
        if not has_secrets and not _may_hold_secrets(text):
            return text
        if not _is_json(text):  # it is not ours, and may quote any byte
            return BLANK if text and has_secrets else text
        text = self._members(text)
        said = json.loads(text)
        if not isinstance(said, dict) or not isinstance(said.get("Err"), str):
            return text
        error = BLANK if self._unknown else self._quoted(said["Err"])
        error = "\n".join(_TOLD.sub(rf"\1{BLANK}", line) for line in error.split("\n"))
        if error == said["Err"]:
            return text
        return json.dumps(said | {"Err": error}, separators=(",", ":"))

    def _members(self, text: str) -> str:
        """Blank the value of each member with a name that looks secret."""
        pieces, done = [], 0
        decoder = json.JSONDecoder()
        while (found := _STRING.search(text, done)) is not None:
            pieces.append(text[done : found.end()])
            done = found.end()
            name = found[0].removesuffix(found[1] or "")
            if found[1] is None or not _SECRET.search(json.loads(name, strict=False)):
                continue
            value, end = decoder.raw_decode(text, done)
            secrets = set(_leaves(value))
            self._secrets |= secrets
            pieces.append(f'"{BLANK}"' if secrets else text[done:end])
            done = end
        return "".join([*pieces, text[done:]])

    def _pairs(self, text: str) -> str:
        def blank(found: re.Match[str]) -> str:
            if found[2] != BLANK:
                self._secrets.add(found[2])
            return found[1] + BLANK

        return _USER.sub(blank, _PAIR.sub(blank, text))

    def _quoted(self, text: str) -> str:
        """Blank what ``text`` quotes of the secrets, whole or cut short."""
        forms = {form for secret in self._secrets for form in _forms(secret)}
        for form in sorted(forms, key=len, reverse=True):
            if len(form) <= _PART:
                text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", BLANK, text)
            else:
                text = _without_parts(text, form)
        return text


def _may_hold_secrets(text: str) -> bool:
    """Tell in little time whether it is worth a closer look."""
    folded = text.casefold()
    # A word may be written by escapes, or in UTF-16.
    return any(each in folded for each in (*WORDS, "\\u", "://", "\0"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, however deep; nothing for empty ones."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif item not in ("", None):
            yield item if isinstance(item, str) else json.dumps(item)


def _forms(secret: str) -> Iterator[str]:
    """Yield the ways in which an error may write a value."""
    yield secret
    for written in (repr(secret), quote(secret), json.dumps(secret)):
        yield written[1:-1]


def _without_parts(text: str, form: str) -> str:
    """Blank ``form`` in ``text``, and what begins or ends as it does."""
    text = text.replace(form, BLANK)
    head, tail = form[:_PART], form[-_PART:]
    place = text.find(head)
    while place >= 0:
        end = place + _PART
        while end < len(text) and text[end] == form[end - place : end - place + 1]:
            end += 1
        text = text[:place] + BLANK + text[end:]
        place = text.find(head, place + len(BLANK))
    place = text.rfind(tail)
    while place >= 0:
        start, end = place, place + _PART
        while start and text[start - 1] == form[start - 1 - end :][:1]:
            start -= 1
        text = text[:start] + BLANK + text[end:]
        place = text.rfind(tail, 0, start)
    return text
