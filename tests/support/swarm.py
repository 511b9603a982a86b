"""A swarm of two nodes: each a `Host` with a network of its own, and a cable between.

Their addresses are of the range that is kept for such tests (RFC 2544), in network
namespaces that no other process is in.
"""

import contextlib
from collections.abc import Iterator

from support.engine import Engine
from support.wait import eventually

_CABLE = "cable"
_ADDRESSES = ("198.18.0.1", "198.18.0.2")


class Swarm:
    """``manager`` and ``worker``, both with the plugin; `clear` between tests."""

    def __init__(self) -> None:
        self.manager = Engine(own_network=True)
        self.worker = Engine(own_network=True)
        self.nodes = (self.manager, self.worker)

    def start(self) -> None:
        """Start both engines and join them."""
        peer = ("peer", "name", _CABLE, "netns", str(self.worker.host.pid))
        self.manager.host.run("ip", "link", "add", _CABLE, "type", "veth", *peer)
        for node, address in zip(self.nodes, _ADDRESSES, strict=True):
            cable = ("dev", _CABLE)
            node.host.run("ip", "address", "add", f"{address}/24", *cable)
            node.host.run("ip", "link", "set", _CABLE, "up")
            node.start()
            # A node tells the swarm of the plugins that its dockerd has used.
            node.docker("volume", "ls")
        ours, theirs = (
            ("--advertise-addr", address, "--listen-addr", f"{address}:2377")
            for address in _ADDRESSES
        )
        self.manager.docker("swarm", "init", *ours)
        token = self.manager.docker("swarm", "join-token", "--quiet", "worker")
        where = f"{_ADDRESSES[0]}:2377"
        self.worker.docker("swarm", "join", "--token", token, *theirs, where)

    def create(self, name: str, *words: str) -> None:
        """Create a service without waiting for its tasks."""
        # A task has no other network without iptables, and a sleep ends by no SIGTERM.
        usual = ("--network", "host", "--stop-signal", "KILL", "--restart-delay", "0s")
        quick = ("--update-monitor", "1s", "--rollback-monitor", "1s")
        words = ("--detach", "--name", name, *usual, *quick, *words)
        self.manager.docker("service", "create", *words)

    def on(self, node: Engine) -> tuple[str, str]:
        """Return the words that place a service's tasks on ``node``."""
        role = "manager" if node is self.manager else "worker"
        return "--constraint", f"node.role=={role}"

    def eventually_runs(self, service: str, tasks: int) -> None:
        """Fail unless as many tasks of the service run soon, and none is to come."""

        def run() -> bool:
            words = ("--filter", "desired-state=running", service)
            shown = self.tasks(*words, shown="{{.CurrentState}}").splitlines()
            return len(shown) == tasks and all(s.startswith("Running ") for s in shown)

        eventually(run, f"{tasks} tasks of {service} run", seconds=30)

    def tasks(self, *words: str, shown: str) -> str:
        """Return what ``docker service ps`` tells, by the template ``shown``."""
        words = ("--no-trunc", "--format", shown, *words)
        return self.manager.docker("service", "ps", *words)

    def remove(self, *services: str) -> None:
        """Remove services and end their containers."""
        if services:
            self.manager.docker("service", "rm", *services)
        for node in self.nodes:
            # Its agent would do so 4 s later, by two delays for names to spread.
            containers = node.docker("ps", "-aq").split()
            if containers:
                node.docker("rm", "-f", *containers)

    def clear(self) -> None:
        """Remove all services, containers and volumes; nothing of them may stay."""
        self.remove(*self.manager.docker("service", "ls", "--quiet").split())
        for node in self.nodes:
            node.clear()

    def close(self) -> None:
        """End both engines, and with their networks the cable."""
        with contextlib.ExitStack() as stack:
            for node in self.nodes:
                stack.callback(node.close)
                if node.docker.is_running():
                    node.docker.kill()  # it would take its time to leave the swarm


@contextlib.contextmanager
def running_swarm() -> Iterator[Swarm]:
    """A swarm from its start to its end; cleared at the end when all went well."""
    swarm = Swarm()
    try:
        swarm.start()
        yield swarm
        swarm.clear()
    finally:
        swarm.close()
