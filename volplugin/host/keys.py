"""Keys in the kernel's keyrings, see keyrings(7): by add_key(2) and keyctl(2)."""

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from volplugin.errors import Unsupported, from_os_error

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# add_key(2) and keyctl(2) have no function in the C library.
_NUMBERS: Final = {
    "x86_64": (248, 250),
    "aarch64": (217, 219),
    "riscv64": (217, 219),
    "ppc64le": (269, 271),
    "s390x": (278, 280),
}
_JOIN_SESSION: Final = 1  # KEYCTL_JOIN_SESSION_KEYRING
_SESSION: Final = -3  # KEY_SPEC_SESSION_KEYRING

_T = TypeVar("_T")


def holding(kind: str, name: str, secret: bytes, do: Callable[[], _T]) -> _T:
    """Call ``do`` where the kernel finds the key ``name`` of the type ``kind``.

    That is in a thread with a session keyring of its own, which programs started there
    inherit; nobody else sees the key, and it goes with the last of them. Return and
    raise as ``do`` does; raise `Unsupported` for a kernel without keys or such a type,
    or one that keeps containers from them.
    """
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            _hold(kind, name, secret)
            outcome.append(do())
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            failure.append(error)

    thread = threading.Thread(target=run, name=f"key-{kind}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _hold(kind: str, name: str, secret: bytes) -> None:
    doing = f"give the kernel the key {name}"
    machine = os.uname().machine
    if machine not in _NUMBERS:
        raise Unsupported(f"{doing}: not known how on {machine}; use another mapper")
    add_key, keyctl = _NUMBERS[machine]
    try:
        _call(keyctl, _JOIN_SESSION, None)
        _call(
            add_key,
            kind.encode(),
            name.encode(),
            secret,
            ctypes.c_size_t(len(secret)),
            _SESSION,
        )
    except OSError as error:
        # EPERM: a container's filter of system calls; ENODEV: no such type of keys.
        if error.errno in {errno.ENOSYS, errno.EPERM, errno.ENODEV}:
            raise Unsupported(
                f"{doing}: {error.strerror}: use another mapper, or let the plugin's"
                " container call add_key(2) and keyctl(2)"
            ) from error
        raise from_os_error(error, doing) from error


def _call(number: int, *words: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *words) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
