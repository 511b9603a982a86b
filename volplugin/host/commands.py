"""Programs of the host, run with a time limit; nothing of them outlives the call."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Container, Sequence
from typing import Final

from volplugin.errors import Internal, NoSpace, Unavailable, Unsupported, from_os_error

_PACKAGES: Final = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "tune2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
}

# Programs for file systems are in folders that a service's PATH may lack.
SEARCH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_GRACE: Final = 5.0  # seconds for a killed process to end
_FULL: Final = ("No space left", "Disk quota exceeded")  # strerror(3)
_SHOWN_LINES: Final = 4
_SHOWN_CHARACTERS: Final = 400


def run(
    words: Sequence[str],
    *,
    limit: float,
    doing: str,
    ok: Container[int] = (0,),
    keep: Sequence[int] = (),
) -> str:
    """Run the program ``words[0]`` and return what it wrote, errors included.

    It gets no input, the C locale, no other environment but a PATH, and a session of
    its own, which is killed after ``limit`` seconds. ``keep`` are descriptors that it
    inherits. Safe in threads; no zombie is left, except of a process that the kernel
    itself does not let go of.

    ``doing`` names the attempt in errors. Raise `Unsupported` for a program that is
    missing, `Unavailable` at the limit; for a status that is not in ``ok`` `NoSpace`,
    where the program says so, else `Internal`.
    """
    program = require(words[0], doing)
    try:
        # No shell, and words that no user writes; the program is one we looked up.
        child = subprocess.Popen(  # noqa: S603
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
            pass_fds=keep,
        )
    except OSError as error:
        raise from_os_error(error, f"{doing}: start {program}") from error
    try:
        raw = child.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{doing}: {words[0]} did not end within {limit:g} s and was killed;"
            " look at the disk and at dmesg, then try again"
        ) from error
    finally:
        if child.returncode is None:
            _kill(child)
    output = raw.decode("utf-8", "replace")
    if child.returncode in ok:
        return output
    kind = NoSpace if any(sign in output for sign in _FULL) else Internal
    raise kind(f"{doing}: {words[0]} {_ended(child.returncode)}: {_last_lines(output)}")


def find(name: str) -> str | None:
    """Return the path of the program ``name``, None when there is none."""
    return shutil.which(name, path=f"{SEARCH}:{os.environ.get('PATH', '')}")


def require(name: str, doing: str) -> str:
    """Return the path of a program; raise `Unsupported`, with its package, for none."""
    found = find(name)
    if found is None:
        package = _PACKAGES.get(name)
        hint = f"install it (Debian's package {package})" if package else "install it"
        raise Unsupported(f"{doing}: there is no program {name}: {hint}")
    return found


def _kill(child: "subprocess.Popen[bytes]") -> None:
    # The session's id is the child's; as long as that is not waited for it is its own.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)
    if child.stdout is not None:
        child.stdout.close()


def _ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"failed with {status}"


def _last_lines(output: str) -> str:
    # mkfs.xfs puts all that it can do behind what was wrong.
    said = output.split("\nUsage:", maxsplit=1)[0]
    lines = [" ".join(line.split()) for line in said.splitlines()]
    text = "; ".join([line for line in lines if line][-_SHOWN_LINES:])
    return text[-_SHOWN_CHARACTERS:] or "it says nothing"
