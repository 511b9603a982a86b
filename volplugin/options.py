"""How drivers and backends declare their options, and how texts become their values.

A driver's options (one volume's, from ``docker volume create -o``) and a backend's
settings (from the configuration file) are frozen attrs classes whose fields are made by
`option`. Names, defaults, units, checks, help, ``-o help`` and the drift report all
come from there. The parsers that most options need are offered here by name.
"""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, TypeVar

import attrs

from volplugin.errors import InvalidArgument, Unsupported, VolpluginError
from volplugin.parsers import (
    ListOf,
    absolute_path,
    boolean,
    choice,
    count,
    identity,
    mode,
    name_list,
    nearest,
    pair_list,
    path_list,
    quote,
    ratio,
    seconds,
    size,
    text,
)
from volplugin.redaction import looks_secret

__all__ = [
    "Common",
    "Fault",
    "absolute_path",
    "boolean",
    "choice",
    "count",
    "describe",
    "differences",
    "identity",
    "mode",
    "name_list",
    "nearest",
    "option",
    "pair_list",
    "parse",
    "parse_settings",
    "path_list",
    "ratio",
    "read",
    "rest",
    "seconds",
    "size",
    "split_common",
    "text",
]

T = TypeVar("T")

_METADATA: Final = "volplugin.option"
_REST: Final = "volplugin.rest"
_UNSET: Final = "unset"

# A request's body may hold a hundred thousand unknown keys: naming these is enough.
_MOST_FAULTS: Final = 20


@attrs.frozen(kw_only=True)
class _Declared:
    """What `option` notes about a field."""

    name: str  # the user's, where the attribute can't have it
    help: str
    parse: Callable[[str], Any]
    shown: str
    unit: str
    format: Callable[[Any], str]


@attrs.frozen(kw_only=True)
class Fault:
    """What is wrong with one key.

    Of an ``unknown`` key, ``text`` is only what `nearest` says.
    """

    key: str
    text: str
    unknown: bool = False
    unsupported: bool = False


def option(
    *,
    help: str,  # noqa: A002 - the word that the user types to see it
    name: str = "",
    parse: Callable[[str], T],
    default: object,
    shown: str = "",
    unit: str = "",
    format: Callable[[T], str] = str,  # noqa: A002 - the opposite of `parse`
) -> Any:
    """Declare a field of an attrs class as an option; return the attrs field.

    The user's name for it is ``name``, or the attribute's with ``-`` for ``_``.
    ``parse`` raises
    `InvalidArgument` with the value and what would be right, or `Unsupported`.
    ``format`` makes the user's text of a value, in the help and in `differences`
    (a mode: ``"{:04o}".format``); it is never given None, which reads as "unset".
    ``shown`` replaces the default's text in the help.
    """
    declared = _Declared(
        name=name, help=help, parse=parse, shown=shown, unit=unit, format=format
    )
    return attrs.field(default=default, metadata={_METADATA: declared})


def rest(*, help: str) -> Any:  # noqa: A002
    """Declare the field of an attrs class that takes all options it does not declare.

    Its value is a mapping of the user's own words, unchecked.
    """
    return attrs.field(factory=dict, metadata={_REST: help})


def parse(cls: type[T], raw: Mapping[str, str], *, subject: str) -> T:
    """Make an instance of ``cls`` from the user's own words.

    ``subject`` is who takes the options, for the message: ``driver tmpfs``. Raise one
    `InvalidArgument` that names every problem, one a line; `Unsupported` when that is
    all that stands against it.
    """
    return _make(cls, raw, subject, "option")


def parse_settings(cls: type[T], raw: Mapping[str, object], subject: str) -> T:
    """Make an instance of ``cls`` from a table of the configuration file.

    As `parse`, but values may also be TOML's numbers, booleans, and, for a parser that
    is a `ListOf`, lists of texts.
    """
    return _make(cls, raw, subject, "setting")


def read(
    cls: type[Any], raw: Mapping[str, object], also: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Fault]]:
    """Return the values in ``raw`` by attribute name, and all that is wrong with it.

    ``also`` are keys known elsewhere, that a misspelt one may have meant.
    """
    declared = dict(_declared(cls))
    known = {_visible(name, each): name for name, each in declared.items()}
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    rest_field = _rest_field(cls)
    if rest_field is not None:
        values[rest_field.name] = {k: v for k, v in raw.items() if k not in known}
        raw = {key: value for key, value in raw.items() if key in known}
    for key, value in raw.items():
        if len(faults) == _MOST_FAULTS:
            break
        if key not in known:
            hint = nearest(key, [*known, *also])
            faults.append(Fault(key=key, text=hint, unknown=True))
            continue
        try:
            values[known[key]] = _value(declared[known[key]].parse, value)
        except Unsupported as error:
            faults.append(Fault(key=key, text=str(error), unsupported=True))
        except (VolpluginError, ValueError) as error:
            faults.append(Fault(key=key, text=str(error)))
    return values, faults


def describe(cls: type[Any]) -> str:
    """Return the options of ``cls``, one a line: name, unit, default, help."""
    rows = []
    for name, declared in _declared(cls).items():
        default = getattr(attrs.fields(cls), name).default
        shown = declared.shown or _show(declared, default)
        standing = "no default" if shown == _UNSET else f"default {shown}"
        rows.append((_visible(name, declared), declared.unit, standing, declared.help))
    rest_field = _rest_field(cls)
    if rest_field is not None:
        rows.append(("any other", "text", "no default", rest_field.metadata[_REST]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        line = "  ".join(cell.ljust(width) for cell, width in cells if width)
        lines.append(line.rstrip())
    return "\n".join(lines)


def differences(is_now: T, asked: T) -> list[str]:
    """Return ``size is 64M, asked for 100M`` for each option in which two differ."""
    found = []
    for name, declared in _declared(type(is_now)).items():
        mine, theirs = getattr(is_now, name), getattr(asked, name)
        if mine != theirs:
            now, then = _show(declared, mine), _show(declared, theirs)
            found.append(f"{_visible(name, declared)} is {now}, asked for {then}")
    rest_field = _rest_field(type(is_now))
    if rest_field is not None:
        before, after = (
            getattr(is_now, rest_field.name),
            getattr(asked, rest_field.name),
        )
        found += [
            f"{key} is {_show_text(key, before)}, asked for {_show_text(key, after)}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
    return found


@attrs.frozen(kw_only=True)
class Common:
    """What every create may carry beside its driver's own options in ``rest``."""

    backend: str | None = None
    help: bool = False
    rest: dict[str, str] = attrs.field(factory=dict)


def split_common(raw: Mapping[str, str]) -> Common:
    """Part the options that every driver shares from the driver's own.

    ``driver`` names the backend; ``help``, with any value, asks for the help.
    ``opt.X`` means ``X``: PouchContainer's users write both. Its daemon adds
    ``backend`` and ``selector.*`` to every volume of a plugin: they are ignored. Raise
    `InvalidArgument` where ``X`` and ``opt.X`` contradict each other.
    """
    rest: dict[str, str] = {}
    clashes = []
    for key, value in raw.items():
        name = key.removeprefix("opt.")
        if name == "backend" or name.startswith("selector."):
            continue
        if rest.setdefault(name, value) != value:
            clashes.append(
                f"options {quote(name)} and {quote('opt.' + name)} mean "
                f"the same and differ: {quote(raw[name])} and "
                f"{quote(raw['opt.' + name])}; give one"
            )
    if clashes:
        raise InvalidArgument("\n".join(clashes[:_MOST_FAULTS]))
    wants_help = rest.pop("help", None) is not None
    return Common(backend=rest.pop("driver", None), help=wants_help, rest=rest)


def _make(cls: type[T], raw: Mapping[str, object], subject: str, noun: str) -> T:
    values, faults = read(cls, raw)
    if not faults:
        try:
            return cls(**values)
        except ValueError as error:  # a check across fields
            raise InvalidArgument(f"{subject}: {error}") from error
    lines = [
        f"unknown {noun} {quote(fault.key)}{fault.text}"
        if fault.unknown
        else f"{noun} {fault.key}: {fault.text}"
        for fault in faults
    ]
    message = "\n".join(lines)
    if any(fault.unknown for fault in faults):
        names = ", ".join(_visible(*each) for each in _declared(cls).items())
        joint = "; " if len(lines) == 1 else "\n"
        message += f"{joint}{subject} takes {names or f'no {noun}s'}"
    kind = Unsupported if all(f.unsupported for f in faults) else InvalidArgument
    raise kind(message)


def _declared(cls: type[Any]) -> dict[str, _Declared]:
    return {
        field.name: field.metadata[_METADATA]
        for field in attrs.fields(cls)
        if _METADATA in field.metadata
    }


def _rest_field(cls: type[Any]) -> "attrs.Attribute[Any] | None":
    return next((f for f in attrs.fields(cls) if _REST in f.metadata), None)


def _show_text(key: str, values: Mapping[str, str]) -> str:
    """Show a word of the user's, unless its name says that it is a secret."""
    if key not in values:
        return _UNSET
    return "a secret" if looks_secret(key) else quote(values[key])


def _visible(attribute: str, declared: _Declared) -> str:
    return declared.name or attribute.replace("_", "-")


def _show(declared: _Declared, value: Any) -> str:
    if value is None:
        return _UNSET
    if declared.format is not str:
        return declared.format(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value)


def _value(parse: Callable[[Any], Any], value: object) -> Any:
    """Parse ``value`` as the text that a user would have given for it."""
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, bool):
        return parse("true" if value else "false")
    if isinstance(value, int | float) and parse is mode:
        # 0o1777 is 1023 once it is read, which is an octal text of another mode.
        raise InvalidArgument('a mode is written in quotes, such as "0755"')
    if isinstance(value, int):
        return parse(str(value))
    if isinstance(value, float):
        return parse(f"{Decimal(repr(value)):f}")  # never with an exponent
    if isinstance(value, list | tuple) and isinstance(parse, ListOf):
        return parse(value)
    kind = {"list": "list", "dict": "table"}.get(
        type(value).__name__, "value like this"
    )
    right = "list" if isinstance(parse, ListOf) else "number"
    raise InvalidArgument(f"a {kind} does not fit here; give a text or a {right}")
