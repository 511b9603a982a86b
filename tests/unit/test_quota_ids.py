"""Ranges of project ids as operators write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin.errors import InvalidArgument, Unsupported
from volplugin.quota import ids
from volplugin.quota.ids import IdRange, parse_range

LARGEST = 2**32 - 2


@given(st.integers(1, LARGEST), st.integers(1, LARGEST))
def test_a_range_is_written_as_it_is_read(one: int, other: int) -> None:
    """Any two ids in order are a range, and its text gives it back."""
    found = IdRange(min(one, other), max(one, other))
    assert parse_range(str(found)) == found
    assert one in found
    assert other in found
    assert found.first - 1 not in found
    assert found.last + 1 not in found


def test_the_default_is_above_what_people_use() -> None:
    """16 million ids from 2**24+1 on."""
    assert str(IdRange()) == "16777217-33554432"
    assert parse_range("16777217-33554432") == IdRange()


@pytest.mark.parametrize(
    "text",
    ["", "5", "5-", "-5", "0-5", "9-5", "5-4294967295", "1-2-3", "a-b", " 1-2", "1 - 2",
     "1-2\n", "+1-2", "1-99999999999", "0x1-0x2", "١-٢"],
)  # fmt: skip
def test_what_is_no_range_is_refused(text: str) -> None:
    """The refusal shows the text and an example."""
    with pytest.raises(InvalidArgument) as told:
        parse_range(text)
    assert repr(text) in str(told.value)
    assert "such as 16777217-33554432" in str(told.value)


def test_no_id_is_given_where_nobody_counts(tmp_path: Path) -> None:
    """On a file system without project quotas there is none to be had."""
    with pytest.raises(Unsupported):
        ids.reserve(str(tmp_path), IdRange())


def test_keeping_and_releasing_are_idempotent(tmp_path: Path) -> None:
    """An id may be kept or released again and again."""
    for _ in range(2):
        ids.keep(str(tmp_path), 77)
    for _ in range(2):
        ids.release(str(tmp_path), 77)
