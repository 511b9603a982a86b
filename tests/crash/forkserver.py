"""Servers that start in a tenth of a second: everything imported once, then forked.

Run as a script in the host. Each line of its input is an order in JSON; each gets one
line of answer. A forked child runs the real command line and nothing of this file.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence

# What `volplugin serve` and `recover` import, so that no child has to.
from volplugin import cli, logs, rebuild, service
from volplugin.ceph import bindings
from volplugin.drivers import cephfs, local, quota, rbd, tmpfs
from volplugin.errors import Unsupported

WARM = (logs, rebuild, service, cephfs, local, quota, rbd, tmpfs)


def fork(
    words: Sequence[str], environment: Mapping[str, str], output: str
) -> int | None:
    """Start ``volplugin WORDS``; return its pid, and None in the child."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["volplugin", *words]
    return None


def main() -> None:
    """Carry out orders until the input ends."""
    with contextlib.suppress(Unsupported):
        bindings.load("rbd")
        bindings.load("cephfs")
    gc.freeze()  # what is imported stays shared with all children
    for line in sys.stdin:
        order = json.loads(line)
        answer: int | None
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = fork(order["words"], order["environment"], order["output"])
            if answer is None:
                cli.main()
                return
        print(json.dumps(answer), flush=True)  # noqa: T201  the answer


main()
