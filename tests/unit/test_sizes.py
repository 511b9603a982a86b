"""Sizes and counts as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin.errors import InvalidArgument
from volplugin.sizes import format_size, parse_count, parse_size

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10G", 10 * 1024**3),
        ("10g", 10 * 1024**3),
        ("10GB", 10 * 1024**3),
        ("10GiB", 10 * 1024**3),
        ("10gib", 10 * 1024**3),
        ("10.5m", 21 * 1024**2 // 2),
        ("1073741824", 1073741824),
        ("1073741824B", 1073741824),
        ("1k", 1024),
        ("2T", 2 * 1024**4),
        ("3PiB", 3 * 1024**5),
        ("0.5K", 512),
        ("1.9", 1),
        ("0.001K", 1),
        ("007", 7),
        (str(LARGEST), LARGEST),
    ],
)
def test_sizes_that_are_understood(text: str, size: int) -> None:
    """A number, an optional fraction, an optional binary unit in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "0G", "0.5", "0.0001K", "-1", "-1G", "+1", "1e3", " 1", "1 ", "1 G",
        "1\n", "G", ".5G", "1.", "1.G", "1,5G", "10Ki", "10iB", "10E", "10GG", "1_000",
        "0x10", "inf", "nan", "٣", "1\u00a0G", str(LARGEST + 1), "8192P",
        "99999999999T", "9" * 5000, "1." + "1" * 100, "1\x00",
    ],
)  # fmt: skip
def test_sizes_that_are_refused(text: str) -> None:
    """What is no size is refused with the value and the grammar, never guessed."""
    with pytest.raises(InvalidArgument) as refusal:
        parse_size(text)
    assert repr(text)[:40].rstrip("'") in str(refusal.value)
    assert "K, M, G, T or P" in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (100, "100"),
        (1000, "1000"),
        (1024, "1K"),
        (1536 * 1024, "1536K"),
        (64 * 1024**2, "64M"),
        (10 * 1024**3, "10G"),
        (1024**5, "1P"),
        (1024**6, "1024P"),
        (LARGEST, str(LARGEST)),
        (0, "0"),
    ],
)
def test_format_is_the_shortest_exact_form(size: int, text: str) -> None:
    """The largest unit that divides the size is used."""
    assert format_size(size) == text


@given(st.integers(1, LARGEST) | st.integers(1, 8191).map(lambda n: n * 1024**5))
def test_format_is_read_back(size: int) -> None:
    """parse_size undoes format_size, for every size there is."""
    assert parse_size(format_size(size)) == size


@given(st.text() | st.from_regex(r"\A[0-9.]+[kKmMgG]?[iI]?[bB]?\Z"))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    """No text escapes: it is a size in range, or InvalidArgument."""
    for parse in (parse_size, parse_count):
        try:
            value = parse(text)
        except InvalidArgument:
            continue
        assert 0 < value <= LARGEST


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("64k", 65536), ("2M", 2 * 1024**2), ("1g", 1024**3)]
)
def test_counts_that_are_understood(text: str, count: int) -> None:
    """A whole number with an optional binary k, m or g."""
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "0k", "-1", "1.5k", "1e3", "1 k", "1kb", "1T", "9" * 30, "9" * 5000],
)
def test_counts_that_are_refused(text: str) -> None:
    """What is no count is refused with the grammar."""
    with pytest.raises(InvalidArgument, match="k, m or g"):
        parse_count(text)
