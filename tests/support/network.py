"""A cable between this machine and a guest: a tap device with an address at each end.

The addresses are of the range that is kept for such tests (RFC 2544), so no network
that this machine is on has them.
"""

import subprocess
from typing import Final

from support.commands import run
from support.require import missing, require, require_root

_MANY: Final = 64
_BITS: Final = 30  # two addresses, that of the network, and that for all


class Network:
    """A network of two; ``close`` takes it away, once its guest is off.

    What listens at ``host`` is reached by the guest, whose own address is ``guest``.
    """

    def __init__(self) -> None:
        require_root()
        require("ip")
        self.device, number = _add()
        self.host, self.guest = (f"198.18.{number}.{end}" for end in (1, 2))
        run("ip", "address", "add", f"{self.host}/{_BITS}", "dev", self.device)
        run("ip", "link", "set", self.device, "up")

    @property
    def option(self) -> str:
        """What the guest's kernel is told of it."""
        return f"vec0:transport=tap,ifname={self.device},depth=128,gro=1"

    @property
    def script(self) -> str:
        """What the guest does to be on it."""
        return f"ip address add {self.guest}/{_BITS} dev vec0\nip link set vec0 up\n"

    def close(self) -> None:
        """Remove the device, and with it the addresses; idempotent."""
        subprocess.run(
            ["ip", "link", "delete", self.device], capture_output=True, check=False
        )


def _add() -> tuple[str, int]:
    # The name is what others are kept off by: there is one of it.
    for number in range(_MANY):
        device = f"vp-uml{number}"
        done = subprocess.run(
            ["ip", "tuntap", "add", "dev", device, "mode", "tap"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return device, number
        if "busy" not in done.stderr:
            missing(f"no tap device can be made: {done.stderr.strip()}")
    raise AssertionError(f"{_MANY} tap devices vp-uml… are there: who left them?")
