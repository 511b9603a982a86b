"""The closed set of errors, and the system's errors turned into them."""

import errno
import os

import pytest

from volplugin import errors
from volplugin.errors import Code, StoreCorrupt, VolpluginError, from_os_error

GRPC = {
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
}
OUR_WORDS = {
    "NO_SPACE": "RESOURCE_EXHAUSTED",
    "IN_USE": "FAILED_PRECONDITION",
    "UNSUPPORTED": "UNIMPLEMENTED",
}
KINDS = VolpluginError.__subclasses__()


def test_one_kind_for_each_code() -> None:
    """Each code has one class, and each class a code of its own."""
    assert len({kind.code for kind in KINDS}) == len(KINDS) == len(Code)


def test_codes_are_grpcs() -> None:
    """Each code has the number that gRPC gives the same thing, and no two the same."""
    numbers = {OUR_WORDS.get(code.name, code.name): code.value for code in Code}
    assert numbers == GRPC
    assert len(set(numbers.values())) == len(Code)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_names(kind: type[VolpluginError]) -> None:
    """A class is named as its code, explains itself, and is its message alone."""
    assert kind.__name__.lower() == kind.code.name.replace("_", "").lower()
    assert kind.__doc__
    assert str(kind("it is so")) == "it is so"


def test_a_corrupt_store_is_no_answer() -> None:
    """It ends the process, so nothing that handles a call's error may catch it."""
    assert not issubclass(StoreCorrupt, VolpluginError)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.NoSpace),
        (errno.EDQUOT, errors.NoSpace),
        (errno.ENOMEM, errors.NoSpace),
        (errno.EMFILE, errors.NoSpace),
        (errno.EBUSY, errors.InUse),
        (errno.ENOTEMPTY, errors.InUse),
        (errno.EEXIST, errors.AlreadyExists),
        (errno.ENOENT, errors.NotFound),
        (errno.EOPNOTSUPP, errors.Unsupported),
        (errno.ENOSYS, errors.Unsupported),
        (errno.EIO, errors.Unavailable),
        (errno.ESTALE, errors.Unavailable),
        (errno.ENOTCONN, errors.Unavailable),
        (errno.EROFS, errors.Unavailable),
        (errno.EPERM, errors.Internal),
        (errno.EINVAL, errors.Internal),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_system_errors(number: int, kind: type[VolpluginError]) -> None:
    """A system error becomes the kind that tells the user what to do."""
    error = from_os_error(OSError(number, os.strerror(number)), "mount x on /y")
    assert type(error) is kind
    assert str(error) == f"mount x on /y: {os.strerror(number)}"


def test_every_system_error_becomes_one_of_ours() -> None:
    """There is no number without a kind, and an error without a number has one."""
    for number in errno.errorcode:
        assert type(from_os_error(OSError(number, "text"), "do")) in KINDS
    bare = from_os_error(OSError("just text"), "do")
    assert (type(bare), str(bare)) == (errors.Internal, "do: just text")
