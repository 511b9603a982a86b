"""Declaring options, parsing them, and what users are told."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import options
from volplugin.errors import InvalidArgument, Unsupported
from volplugin.options import (
    Common,
    describe,
    differences,
    nearest,
    option,
    parse,
    parse_settings,
    split_common,
)
from volplugin.sizes import format_size


def no_quota(value: str) -> int | None:
    raise Unsupported("needs a quota, which this driver has not")


@attrs.frozen(kw_only=True)
class Wanted:
    size: int = option(
        help="the hard limit",
        parse=options.size(minimum=4096, maximum=2**40),
        default=64 * 1024**2,
        unit="bytes",
        format=format_size,
    )
    mode: int = option(
        help="permission bits",
        parse=options.mode,
        default=0o1777,
        unit="octal",
        format="{:04o}".format,
    )
    owner_id: int | None = option(
        help="owner", parse=options.identity, default=None, unit="uid"
    )
    exec: bool = option(help="allow programs", parse=options.boolean, default=False)
    quota: int | None = option(help="refused", parse=no_quota, default=None)


@attrs.frozen(kw_only=True)
class Settings:
    allow: tuple[str, ...] = option(
        help="directories that may be adopted", parse=options.path_list, default=()
    )
    mode: int = option(help="mode", parse=options.mode, default=0o755)
    limit: int = option(help="limit", parse=options.size(), default=1)
    wait: float = option(help="wait", parse=options.seconds, default=1.0)
    fast: bool = option(help="fast", parse=options.boolean, default=False)
    pool: str = option(help="pool", parse=options.text, default="", shown="(rbd)")


@attrs.frozen(kw_only=True)
class Range:
    low: int = option(help="low", parse=options.count, default=1)
    high: int = option(help="high", parse=options.count, default=2)

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@attrs.frozen(kw_only=True)
class Nothing:
    pass


@attrs.frozen(kw_only=True)
class Open:
    owner_id: int | None = option(
        help="owner", parse=options.identity, default=None, unit="uid"
    )
    rest: Mapping[str, str] = options.rest(help="for another")


@attrs.frozen(kw_only=True)
class Pairs:
    pairs: Sequence[tuple[str, str]] = option(
        help="words", parse=options.pair_list, default=(), shown="none"
    )


def refusal(raw: dict[str, str], kind: type[Exception] = InvalidArgument) -> str:
    with pytest.raises(kind) as caught:
        parse(Wanted, raw, subject="driver toy")
    assert type(caught.value) is kind
    return str(caught.value)


def test_defaults_stand_for_what_is_not_given() -> None:
    """No options make the class with its defaults."""
    assert parse(Wanted, {}, subject="driver toy") == Wanted()


def test_names_are_written_with_hyphens() -> None:
    """owner_id is the user's owner-id, and only that."""
    raw = {"owner-id": "5", "size": "1m", "exec": ""}
    assert parse(Wanted, raw, subject="driver toy") == Wanted(
        owner_id=5, size=1024**2, exec=True
    )
    assert "did you mean 'owner-id'?" in refusal({"owner_id": "5"})


def test_unknown_option_names_the_nearest_and_all() -> None:
    """A misspelt key gets the nearest match and the list."""
    assert refusal({"szie": "1m"}) == (
        "unknown option 'szie'; did you mean 'size'?; "
        "driver toy takes size, mode, owner-id, exec, quota"
    )


def test_a_class_without_options_says_so() -> None:
    """Where nothing can be set, the message says that."""
    with pytest.raises(InvalidArgument, match="driver none takes no options"):
        parse(Nothing, {"x": "1"}, subject="driver none")


def test_all_problems_are_told_at_once() -> None:
    """Each problem has a line with the key, the value and what is right."""
    told = refusal({"size": "0", "mode": "999", "nope": "1", "owner-id": "root"})
    lines = told.split("\n")
    assert len(lines) == 5
    assert lines[0].startswith("option size: '0' is less than a byte")
    assert lines[1].startswith("option mode: '999' is not a mode; give octal")
    assert lines[2] == "unknown option 'nope'"
    assert lines[3].startswith("option owner-id: 'root' is not an id")
    assert lines[4].startswith("driver toy takes size, mode")


def test_limits_name_themselves() -> None:
    """A size outside a driver's limits is told the limit."""
    assert "below the minimum, 4K" in refusal({"size": "4095"})
    assert "above the maximum, 1T" in refusal({"size": "2T"})


def test_unsupported_stays_unsupported() -> None:
    """An option that the driver cannot do is Unsupported when it stands alone."""
    assert "needs a quota" in refusal({"quota": "1"}, Unsupported)
    assert "needs a quota" in refusal({"quota": "1", "size": "x"}, InvalidArgument)


def test_a_check_across_fields_is_an_invalid_argument() -> None:
    """A class that refuses a combination is heard."""
    with pytest.raises(InvalidArgument, match="driver toy: low is above high"):
        parse(Range, {"low": "3"}, subject="driver toy")


def test_a_flood_of_unknown_keys_gives_a_short_answer() -> None:
    """A megabyte of nonsense is answered at once and in few words."""
    told = refusal({f"k{'x' * 50}{number}": "1" for number in range(20_000)})
    assert len(told) < 4000
    assert len(refusal({"k" * 1_000_000: "1"})) < 400
    assert len(refusal({"size": "1" * 1_000_000})) < 400


@given(
    st.dictionaries(
        st.sampled_from(["size", "mode", "owner-id", "exec", "quota"]) | st.text(),
        st.text(max_size=8) | st.from_regex(r"\A[0-9]{1,5}[kmg]?\Z"),
        max_size=4,
    )
)
def test_any_options_are_parsed_or_refused(raw: dict[str, str]) -> None:
    """Nothing but our own errors comes out, and what they say can be sent."""
    try:
        made = parse(Wanted, raw, subject="driver toy")
    except (InvalidArgument, Unsupported) as error:
        json.dumps(str(error)).encode()
    else:
        assert 4096 <= made.size <= 2**40
        assert 0 <= made.mode <= 0o7777


def test_description_has_one_aligned_line_an_option() -> None:
    """-o help shows name, unit, default and help in columns."""
    assert describe(Wanted).split("\n") == [
        "size      bytes  default 64M    the hard limit",
        "mode      octal  default 1777   permission bits",
        "owner-id  uid    no default     owner",
        "exec             default false  allow programs",
        "quota            no default     refused",
    ]
    assert "default (rbd)" in describe(Settings)
    assert describe(Nothing) == ""


def test_differences_name_each_option_in_the_users_form() -> None:
    """A drift report speaks as the user would write."""
    assert differences(Wanted(), Wanted()) == []
    assert differences(
        Wanted(exec=True, owner_id=3), Wanted(size=100 * 1024**2, mode=0o755)
    ) == [
        "size is 64M, asked for 100M",
        "mode is 1777, asked for 0755",
        "owner-id is 3, asked for unset",
        "exec is true, asked for false",
    ]
    assert differences(Settings(allow=("/a", "/b")), Settings()) == [
        "allow is /a,/b, asked for none"
    ]


def test_the_rest_is_taken_as_it_is() -> None:
    """A class may take all that it does not declare, unchecked; what it does is."""
    raw = {"owner-id": "5", "owner_id": "x", "size": "\0é", "": "=", "k" * 999: ""}
    made = parse(Open, raw, subject="driver open")
    assert made.owner_id == 5
    assert made.rest == {"owner_id": "x", "size": "\0é", "": "=", "k" * 999: ""}
    assert parse(Open, {}, subject="driver open") == Open(rest={})
    with pytest.raises(InvalidArgument) as caught:
        parse(Open, {"owner-id": "x", "size": "1"}, subject="driver open")
    assert str(caught.value).startswith("option owner-id: 'x' is not an id")
    assert "unknown" not in str(caught.value)


def test_the_rest_is_one_of_no_option() -> None:
    """Its field's own name is a key as any other."""
    assert parse(Open, {"rest": "1"}, subject="driver open").rest == {"rest": "1"}


def test_the_rest_is_described() -> None:
    """-o help tells of it in the last line."""
    assert describe(Open).split("\n") == [
        "owner-id   uid   no default  owner",
        "any other  text  no default  for another",
    ]


def test_differences_of_the_rest() -> None:
    """Each key that differs is named, with what it is and what was asked for."""
    assert differences(Open(rest={"a": "1"}), Open(rest={"a": "1"})) == []
    before = {"same": "1", "size": "1g", "gone": "x"}
    after = {"same": "1", "size": "2g", "Come": ""}
    assert differences(Open(rest=before), Open(owner_id=5, rest=after)) == [
        "owner-id is unset, asked for 5",
        "Come is unset, asked for ''",
        "gone is 'x', asked for unset",
        "size is '1g', asked for '2g'",
    ]


@pytest.mark.parametrize(
    "key",
    [
        *("password", "s3-secret", "SECRET_ACCESS_KEY", "api_key", "token", "auth"),
        *("Credentials", "passwd", "crypt-passphrase", "vfs.key", "sasToken"),
    ],
)
def test_differences_tell_no_secret(key: str) -> None:
    """That it differs is told, and whether it is there."""
    for before, after, told in (
        ("hidden1", "hidden2", "a secret, asked for a secret"),
        ("hidden1", None, "a secret, asked for unset"),
        (None, "hidden2", "unset, asked for a secret"),
    ):
        mine = {} if before is None else {key: before}
        theirs = {} if after is None else {key: after}
        assert differences(Open(rest=mine), Open(rest=theirs)) == [f"{key} is {told}"]


def test_settings_take_pairs() -> None:
    """One as a text, several as a list; a value may hold anything, also none."""
    for said, value in (
        ("a=b", {"a": "b"}),
        (["a=b", "c=d=e", "f="], {"a": "b", "c": "d=e", "f": ""}),
        ("a=b,c", {"a": "b,c"}),
        ([], {}),
        ("", {}),
    ):
        assert dict(parse_settings(Pairs, {"pairs": said}, "b").pairs) == value


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("a", "'a' is not KEY=VALUE"),
        ("=b", "'=b' is not KEY=VALUE"),
        (["a=1", "b"], "'b' is not KEY=VALUE"),
        (["a=1", 5], "is not a list of texts"),
        ({"a": "b"}, "a table does not fit here"),
        (5, "'5' is not KEY=VALUE"),
        (True, "'true' is not KEY=VALUE"),
    ],
)
def test_what_is_no_pair(given: object, told: str) -> None:
    """It is refused with the value and with what would be one."""
    with pytest.raises(InvalidArgument) as caught:
        parse_settings(Pairs, {"pairs": given}, "b")
    assert str(caught.value).startswith("setting pairs: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("szie", "size"),
        ("SIZE", "size"),
        ("owner_id", "owner-id"),
        ("q", ""),
        ("", ""),
        ("s" * 1_000_000, ""),
    ],
)
def test_nearest(word: str, found: str) -> None:
    """Case and underscores do not hide a match; nonsense has none."""
    hint = f"; did you mean {found!r}?" if found else ""
    assert nearest(word, ["size", "owner-id", "exec"]) == hint


def test_settings_take_toml_values() -> None:
    """Numbers, booleans and lists of paths stand for the text a user would write."""
    raw = {
        "allow": ["/srv", "/mnt/disks/"],
        "mode": "0700",
        "limit": 4096,
        "wait": 0.00001,
        "fast": True,
    }
    assert parse_settings(Settings, raw, "backend b") == Settings(
        allow=("/srv", "/mnt/disks"), mode=0o700, limit=4096, wait=0.00001, fast=True
    )
    assert parse_settings(Settings, {"wait": 5, "fast": 0}, "b").wait == 5.0
    assert parse_settings(Settings, {"allow": "/a,/b"}, "b").allow == ("/a", "/b")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"mode": 0o1777}, "setting mode: a mode is written in quotes"),
        ({"limit": ["1"]}, "setting limit: a list does not fit here"),
        ({"limit": {"a": 1}}, "setting limit: a table does not fit here"),
        ({"limit": True}, "setting limit: 'true' is not a size"),
        ({"limit": -1}, "setting limit: '-1' is not a size"),
        ({"wait": float("inf")}, "setting wait: 'Infinity' is not a time"),
        ({"wait": float("nan")}, "setting wait: 'NaN' is not a time"),
        ({"allow": ["/a", 1]}, "is not a list of texts"),
        ({"allow": ["a"]}, "setting allow: 'a' is not an absolute path"),
        ({"lmit": 1}, "unknown setting 'lmit'; did you mean 'limit'?; backend b takes"),
    ],
)
def test_settings_that_are_refused(raw: dict[str, Any], told: str) -> None:
    """A value of the wrong kind is refused, above all a mode that TOML has read."""
    with pytest.raises(InvalidArgument) as caught:
        parse_settings(Settings, raw, "backend b")
    assert told in str(caught.value)


def test_common_options_are_parted() -> None:
    """driver, help and PouchContainer's own keys never reach the driver."""
    raw = {
        "driver": "tmpfs",
        "opt.size": "1m",
        "size": "1m",
        "opt.fs": "ext4",
        "backend": "local",
        "opt.backend": "local",
        "selector.disk": "ssd",
        "help": "",
    }
    assert split_common(raw) == Common(
        backend="tmpfs", help=True, rest={"size": "1m", "fs": "ext4"}
    )
    assert split_common({}) == Common(backend=None, help=False, rest={})
    assert split_common({"opt.driver": "rbd"}).backend == "rbd"


@pytest.mark.parametrize("swap", [False, True])
def test_a_contradiction_is_refused(swap: bool) -> None:
    """size and opt.size may both be there only with one value."""
    pairs = [("size", "1m"), ("opt.size", "2m")]
    with pytest.raises(
        InvalidArgument, match=r"'size' and 'opt.size' .* '1m' and '2m'"
    ):
        split_common(dict(pairs[::-1] if swap else pairs))


@pytest.mark.parametrize(
    ("parser", "given", "value"),
    [
        (options.mode, "1777", 0o1777),
        (options.mode, "0755", 0o755),
        (options.mode, "07777", 0o7777),
        (options.mode, "0", 0),
        (options.identity, "0", 0),
        (options.identity, "4294967294", 2**32 - 2),
        (options.boolean, "", True),
        (options.boolean, "Yes", True),
        (options.boolean, "1", True),
        (options.boolean, "on", True),
        (options.boolean, "no", False),
        (options.boolean, "OFF", False),
        (options.boolean, "0", False),
        (options.boolean, "false", False),
        (options.absolute_path, "/", "/"),
        (options.absolute_path, "/mnt/data", "/mnt/data"),
        (options.absolute_path, "/mnt/data/", "/mnt/data"),
        (options.absolute_path, "/mnt/ü …/..x", "/mnt/ü …/..x"),
        (options.absolute_path, "/" + "x" * 4094, "/" + "x" * 4094),
        (options.path_list, "", ()),
        (options.path_list, "/a,/b/", ("/a", "/b")),
        (options.path_list, ["/a", "/b,c/"], ("/a", "/b,c")),
        (options.name_list, "", ()),
        (options.name_list, "a,b", ("a", "b")),
        (options.name_list, ("a,b", "c"), ("a,b", "c")),
        (options.text, "", ""),
        (options.text, "größe 1", "größe 1"),
        (options.seconds, "5", 5.0),
        (options.seconds, "0.5", 0.5),
        (options.count, "64k", 65536),
    ],
)
def test_parsers_take(parser: Any, given: object, value: object) -> None:
    """Each parser's right texts give their values."""
    assert parser(given) == value


@pytest.mark.parametrize(
    ("parser", "given"),
    [
        *(
            (options.mode, bad)
            for bad in ("", "8", "999", "0o755", "10000", "-1", " 7")
        ),
        *((options.mode, bad) for bad in ("u+x", "7" * 9999, "٧")),
        *((options.identity, bad) for bad in ("", "-1", "4294967295", "root", "1.0")),
        *((options.identity, bad) for bad in ("9" * 9999, " 1", "1_0", "٣")),
        *((options.boolean, bad) for bad in ("y", "2", " true", "None")),
        *(
            (options.absolute_path, bad)
            for bad in ("", "a", "./a", "//", "//a", "/a//b")
        ),
        *((options.absolute_path, bad) for bad in ("/a/../b", "/..", "/.", "/a/.")),
        *((options.absolute_path, bad) for bad in ("/a//", "/a\0", "/a\nb", "/\ud800")),
        *((options.absolute_path, bad) for bad in ("/" + "x" * 4095, "/" + "é" * 2048)),
        *((options.path_list, bad) for bad in (",", "/a,", "/a,b", "/a, /b")),
        *((options.name_list, bad) for bad in ("a,\n;", "\udc80")),
        *((options.text, bad) for bad in ("a\0", "a\nb", "\x1b[31m", "\x85", "\udc80")),
        *(
            (options.seconds, bad)
            for bad in ("", "0", "0.0", "-1", "1e3", "inf", "nan")
        ),
        *((options.seconds, bad) for bad in (" 1", "1.", ".5", "1000001", "9" * 999)),
    ],
)
def test_parsers_refuse(parser: Any, given: str) -> None:
    """Each parser refuses the rest, with the value, in a message that can be sent."""
    with pytest.raises(InvalidArgument) as caught:
        parser(given)
    told = str(caught.value)
    assert ";" in told or "not valid UTF-8" in told or "has at most" in told
    assert len(told.encode()) < 500


def test_a_path_with_dots_is_told_its_plain_form() -> None:
    """The way out is in the message."""
    with pytest.raises(InvalidArgument, match=r"such as '/srv/b'"):
        options.absolute_path("//srv/a/../b")
