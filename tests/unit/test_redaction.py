"""What looks secret is blanked; all else is as it was, byte for byte."""

import json
import time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import options
from volplugin.errors import InvalidArgument
from volplugin.exchanges import KEPT_REQUEST
from volplugin.parsers import quote
from volplugin.protocol import failure
from volplugin.redaction import WORDS, Redaction


@attrs.frozen(kw_only=True)
class Keyed:
    """Options with one that looks secret."""

    key: str | None = options.option(
        help="a key", parse=options.absolute_path, default=None
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"Name":"v","Opts":null}\n',
        '{"Name": "v" , "Opts": {"size" :"1G", "o": "addr=10.0.0.1,rw"}}',
        '{"Name":"größe \\u003c \ud800","Opts":{"password":"","x":1e5}}',
        "[1, null]",
        "no JSON",
        '{"Name":"v"',
    ],
)
def test_nothing_secret(text: str) -> None:
    """Blanks, order and escapes stay."""
    redaction = Redaction()
    assert redaction.body(text) == text
    assert redaction.answer(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"Opts":{"password":"abc"}}\n', '{"Opts":{"password":"***"}}\n'),
        ('{"A_Secret" : "a\\"b", "x":1}', '{"A_Secret" : "***", "x":1}'),
        ('{"pass\\u0077ord":"abc"}', '{"pass\\u0077ord":"***"}'),
        ('{"token":123456,"x":"y"}', '{"token":"***","x":"y"}'),
        ('{"auth":{"user":"abc","n":[1]}}', '{"auth":"***"}'),
        ('{"x":"key","y":"pass"}', '{"x":"key","y":"pass"}'),
        ('{"key":"","token":null}', '{"key":"","token":null}'),
        ('{"o":"user=a,password=b\\"c,rw"}', '{"o":"user=a,password=***,rw"}'),
        ('{"url":"nfs://me:abc@host/x"}', '{"url":"nfs://***@host/x"}'),
        ('{"key":"a","key":"b"}', '{"key":"***","key":"***"}'),
        ('{"Name":"v","Opts":{"key":"ab', '{"Name":"v","Opts":{"key***'),
        ("Password: abc", "Pass***"),
        ("{\0\"\0k\0e\0y\0\"\0:\0\"\0a\0", "***"),
    ],
)  # fmt: skip
def test_secrets_in_a_body(text: str, shown: str) -> None:
    """Values go by the names of their members, or of what stands before ``=``."""
    assert Redaction().body(text) == shown


@pytest.mark.parametrize("word", WORDS)
def test_every_word(word: str) -> None:
    """Each word that the help names is looked for within names of any case."""
    name = f"x-{word.upper()}_2"
    assert Redaction().body(json.dumps({name: "abc"})) == json.dumps({name: "***"})


def test_any_depth() -> None:
    """A value that the parser can take is blanked, however deep it is."""
    for depth in range(1, 1100, 7):
        text = '{"key":' + "[" * depth + '"abc"' + "]" * depth + "}"
        assert "abc" not in Redaction().body(text)


def test_a_header() -> None:
    """Only a header with such a name, and a value, loses it."""
    redaction = Redaction()
    assert redaction.header("Authorization:  Basic abc") == "Authorization: ***"
    assert redaction.header("Authorization: ") == "Authorization: "
    assert redaction.header("Host: ") == "Host: "
    assert redaction.answer('{"Err":"no Basic abc"}') == '{"Err":"no ***"}'


def test_a_request_line() -> None:
    """The query of a path may hold one."""
    redaction = Redaction()
    line = redaction.request_line("POST /x?a=b&token=abcde HTTP/1.1")
    assert line == "POST /x?a=b&token=*** HTTP/1.1"
    assert (
        redaction.answer('{"Err":"no /x?token=abcde"}') == '{"Err":"no /x?token=***"}'
    )


@given(
    st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), min_size=5),
    st.sampled_from(["repr", "quote", "short", "plain"]),
)
def test_an_error_that_quotes_a_secret(secret: str, form: str) -> None:
    """However an error writes the value, at most three characters in a row stay."""
    redaction = Redaction()
    redaction.body(json.dumps({"Opts": {"passphrase": secret}}))
    written = {
        "repr": repr(secret),
        "quote": quote(secret),
        "short": f"{secret!r:.20}",
        "plain": secret,
    }[form]
    shown = json.loads(redaction.answer(failure(f"<{written}>").decode()))["Err"]
    rest = shown.strip("<>").replace("***", "\0")
    for place in range(len(rest) - 3):
        part = rest[place : place + 4]
        assert part not in repr(secret)[1:-1] or "\0" in part


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("key is abc, asked for def", "key is ***"),
        ("create v: size is 1G, asked for 2G", "create v: size is 1G, asked for 2G"),
        ("x\noption auth-x: abc is bad\ny", "x\noption auth-x: ***\ny"),
        ("driver rbd takes conf, key, pool", "driver rbd takes conf, key, pool"),
        ("authentication failed: no", "authentication failed: no"),
    ],
)
def test_an_error_of_what_is_stored(error: str, shown: str) -> None:
    """A value that the request did not have is known by how our errors read."""
    answer = Redaction().answer(failure(error).decode())
    assert answer == failure(shown).decode()


def test_our_own_errors() -> None:
    """What is looked for is what the options' own messages say."""
    redaction = Redaction()
    with pytest.raises(InvalidArgument) as caught:
        options.parse(Keyed, {"key": "relative"}, subject="driver x")
    error = redaction.answer(failure(str(caught.value)).decode())
    assert "relative" not in error
    (told,) = options.differences(Keyed(key="/one"), Keyed(key="/other"))
    assert "one" not in redaction.answer(failure(f"v: {told}").decode())


def test_a_status() -> None:
    """An answer's own members are blanked too."""
    text = '{"Volume":{"Name":"v","Status":{"encryption-key":"/a/b","size":"1G"}}}'
    assert Redaction().answer(text) == text.replace("/a/b", "***")


def test_an_answer_to_what_was_not_understood() -> None:
    """It may quote any part of a request that held a secret."""
    redaction = Redaction()
    redaction.unreadable("POST password abc")
    assert redaction.answer('{"Err":"no JSON: abc"}') == '{"Err":"***"}'
    assert redaction.answer("no HTTP: abc") == "***"


@pytest.mark.parametrize(
    "text",
    [
        "x" * KEPT_REQUEST,
        "pass" * (KEPT_REQUEST // 4),
        "key=" * (KEPT_REQUEST // 4),
        json.dumps({"Name": "x" * KEPT_REQUEST, "key": "key" * KEPT_REQUEST}),
        json.dumps({"Name": "key.-_" * KEPT_REQUEST}),
        json.dumps({"a": 'key=\\"' * (KEPT_REQUEST // 6), "key": ""}),
        json.dumps({"key": [f"{n}-abc" for n in range(KEPT_REQUEST // 16)]}),
        "://" * (KEPT_REQUEST // 3) + "\\u",
        "[" * KEPT_REQUEST + "key",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """The thread that looks for secrets has the interpreter meanwhile."""
    redaction = Redaction()
    started = time.perf_counter()
    redaction.body(text)
    redaction.answer(failure(f"option key: {text[:1000]}\n" * 5).decode())
    assert time.perf_counter() - started < 2


def test_a_long_list_takes_little() -> None:
    """As many volumes as anyone has are looked through at once."""
    text = json.dumps({"Volumes": [{"Name": f"v{n}"} for n in range(50_000)]})
    started = time.perf_counter()
    assert Redaction().answer(text) == text
    assert time.perf_counter() - started < 0.2
