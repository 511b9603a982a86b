"""Helper programs that outlive this process, and are found again by the next one.

A helper is known by its *record*: a file with the boot id, the process id and the start
time, which is the helper's own line of proc_pid_stat(5). A shell writes it and then
becomes the program, so there is no moment at which the program runs without it. The
helper also inherits a lock on the record (flock(2)): while the lock is taken and the
record is not yet written, a helper is about to start.

A process id alone proves nothing: it may have been given to another process since.

What a helper says goes into a pipe, to both ends of which it holds on. It is read until
the helper is ready; later words stay in the pipe, and once that is full they are lost.
So a helper that complains of each failing request fills no disk, and never waits.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final

import attrs

from volplugin.errors import (
    InUse,
    Unavailable,
    VolpluginError,
    from_os_error,
)
from volplugin.host import commands, processes
from volplugin.model import Client

# What dies for want of memory should not be what the containers' files are on.
_BECOME: Final = """
read -r boot </proc/sys/kernel/random/boot_id
read -r stat </proc/$$/stat
echo -1000 2>/dev/null >/proc/self/oom_score_adj
printf '%s %s\\n' "$boot" "$stat" >"$0" || exit
exec "$@"
"""

_PAUSES: Final = (0.001, 0.004)  # seconds: the first, and the longest
_KILL_WAIT: Final = 5.0  # seconds for a killed process to end
_RECORD_WAIT: Final = 5.0  # seconds from the lock to the record
_SAID: Final = 4096  # bytes, from the end of a log

# Those of this process's helpers that are not known to have ended: a parent has to
# wait for its children.
_children: dict[int, "subprocess.Popen[bytes]"] = {}
_reaping = threading.Lock()


@attrs.frozen
class Helper:
    """A running program: its process id means it only with the start time."""

    pid: int
    started: int


def start(
    words: Sequence[str],
    *,
    record: str,
    log: str,
    folder: str,
    ready: Callable[[], bool],
    limit: float,
    doing: str,
    failed: Callable[[str], VolpluginError],
) -> Helper:
    """Start the program ``words[0]`` in ``folder`` and return once ``ready()`` holds.

    It stays in the foreground by its own options, gets no input, the C locale and no
    other environment but a PATH, a session and a umask of 077; no descriptor of ours
    but the record's lock. What it has said by then is put into the file ``log``, made
    anew. ``ready`` may hold only by what it does: files of an earlier one have to be
    gone before.

    When it ends before it is ready, raise what ``failed`` makes of its words. Raise
    `Unsupported` for a missing program, `Unavailable` after ``limit`` seconds, `InUse`
    while a helper of this record runs. It is gone after an error.
    """
    path = commands.require(words[0], doing)
    _reap()
    lock = _lock(record, doing)
    words_end, said_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        child = _spawn([path, *words[1:]], record, folder, said_end, (lock, words_end))
        is_ready = _await(child, ready, time.monotonic() + limit, words_end, log)
    except OSError as error:
        raise from_os_error(error, f"{doing}: start {path}") from error
    finally:
        for descriptor in (lock, words_end, said_end):
            os.close(descriptor)
    helper = find(record) if is_ready else None
    if helper is not None:
        return helper
    has_ended = child.poll() is not None
    _kill_child(child)
    if has_ended or is_ready:
        raise failed(said(log))
    raise Unavailable(
        f"{doing}: {words[0]} was not ready within {limit:g} s; {said(log)}".rstrip(
            "; "
        )
    )


def find(record: str) -> Helper | None:
    """Return the running helper of this record; None when there is none.

    A process that has ended and that its parent has not waited for is none.
    """
    try:
        with open(record, "rb") as file:
            boot, _, line = file.read().partition(b" ")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, f"read {record}") from error
    # proc_pid_stat(5): the name stands in parentheses; the start time is field 22.
    head, _, tail = line.rpartition(b")")
    fields = tail.split()
    if boot.decode("ascii", "replace") != processes.boot_id() or len(fields) < 20:
        return None
    helper = Helper(int(head.split()[0]), int(fields[19]))
    return helper if _runs(helper) else None


def end(record: str, *, grace: float) -> None:
    """End the helper and wait for that: SIGTERM, and after ``grace`` seconds SIGKILL.

    Idempotent; the files stay. With no grace it is killed at once. Raise `Unavailable`
    for a process that the kernel does not let go of.
    """
    limit = time.monotonic() + _RECORD_WAIT
    while (helper := find(record)) is None:
        if not _is_locked(record):
            _reap()
            return
        if time.monotonic() > limit:
            raise Unavailable(
                f"a process holds {record}, and it is not the helper written there;"
                f" `fuser -v {record}` shows it: end it"
            )
        time.sleep(_PAUSES[1])
    signals = [(signal.SIGKILL, _KILL_WAIT)]
    if grace > 0:
        signals.insert(0, (signal.SIGTERM, grace))
    if not any(_signal(helper, number, wait) for number, wait in signals):
        raise Unavailable(
            f"process {helper.pid} does not end though it was killed: it waits in the"
            f" kernel; look at /proc/{helper.pid}/stack and dmesg"
        )
    _reap()


def said(log: str) -> str:
    """Return the end of what a helper said, on one line; "" if nothing."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SAID))
            return " ".join(file.read().decode("utf-8", "replace").split())
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise from_os_error(error, f"read {log}") from error


def _spawn(
    words: Sequence[str], record: str, folder: str, output: int, keep: Sequence[int]
) -> "subprocess.Popen[bytes]":
    # Words that no user writes, as arguments; the shell reads `_BECOME` alone.
    child = subprocess.Popen(  # noqa: S603
        ["/bin/sh", "-c", _BECOME, record, *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={"PATH": commands.SEARCH, "LC_ALL": "C"},
        cwd=folder,
        umask=0o077,
        start_new_session=True,
        pass_fds=keep,
    )
    with _reaping:
        _children[child.pid] = child
    return child


def _await(
    child: "subprocess.Popen[bytes]",
    ready: Callable[[], bool],
    limit: float,
    words: int,
    log: str,
) -> bool:
    """Tell whether it gets ready in time; put into ``log`` what it says until then."""
    pause = _PAUSES[0]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(log, flags, 0o600), "wb") as file:
            while True:
                # In this order: its last words are there when it has ended.
                has_ended = child.poll() is not None
                is_ready = ready()
                _move(words, file)
                if is_ready or has_ended or time.monotonic() > limit:
                    return is_ready
                time.sleep(pause)
                pause = min(pause * 1.2, _PAUSES[1])
    except BaseException:
        _kill_child(child)
        raise


def _move(words: int, file: BinaryIO) -> None:
    with contextlib.suppress(BlockingIOError):  # nothing more for now
        while said := os.read(words, _SAID):
            file.write(said)


def _lock(record: str, doing: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(record, flags, 0o600)
    except OSError as error:
        raise from_os_error(error, f"{doing}: open {record}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise InUse(f"{doing}: {record}: its program runs already") from error
        raise from_os_error(error, f"{doing}: lock {record}") from error
    return lock


def _is_locked(record: str) -> bool:
    try:
        lock = os.open(record, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise from_os_error(error, f"open {record}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _runs(helper: Helper) -> bool:
    return processes.is_alive(Client(pid=helper.pid, started=helper.started))


def _signal(helper: Helper, number: signal.Signals, wait: float) -> bool:
    """Send the signal; tell whether the helper has ended within ``wait`` seconds."""
    try:
        # It stands for one process, whose start time is looked at next.
        descriptor = os.pidfd_open(helper.pid)
    except ProcessLookupError:
        return True
    except OSError as error:
        raise from_os_error(error, f"reach process {helper.pid}") from error
    try:
        if not _runs(helper):
            return True
        # What it has started is in its session, and holds the lock as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(helper.pid, number)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(wait * 1000))
    except OSError as error:
        raise from_os_error(error, f"end process {helper.pid}") from error
    finally:
        os.close(descriptor)


def _kill_child(child: "subprocess.Popen[bytes]") -> None:
    # Its pid is its own as long as it has not been waited for.
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_WAIT)
    _reap()


def _reap() -> None:
    with _reaping:
        for pid, child in list(_children.items()):
            if child.poll() is not None:
                del _children[pid]
