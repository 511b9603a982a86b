"""A host with the plugin and a real dockerd in it, as a user has them."""

import contextlib
from collections.abc import Iterator, Sequence

from support.docker import Docker, require_docker
from support.host import Host
from support.mounts import Mount
from support.plugin import Plugin
from support.wait import eventually

MOUNT_SOURCE = "volplugin-"
"""What the source of each of the plugin's tmpfs mounts begins with."""


class Engine:
    """``host``, ``plugin`` and ``docker``; `clear` between tests."""

    def __init__(
        self,
        *,
        live_restore: bool = False,
        config: str = "",
        arguments: Sequence[str] = (),
        own_network: bool = False,
        sweep: float = 1,
    ) -> None:
        require_docker()
        self.host = Host(own_network=own_network)
        self._inherited = {mount.source for mount in self.host.mounts()}
        # Often, for tests that wait for one.
        self.plugin = Plugin(
            self.host.folder,
            host=self.host,
            config=f"sweep-interval = {sweep}\n{config}",
            arguments=arguments,
        )
        self.docker = Docker(self.host, live_restore=live_restore)

    def start(self) -> None:
        """Start the plugin, then dockerd, and load the images."""
        self.plugin.start()
        self.docker.start()
        self.docker.load_images()

    def mounts(self) -> list[Mount]:
        """Return the plugin's tmpfs mounts that the host has.

        Without those that the machine had when the host was cut off from it: another
        plugin may be at work there.
        """
        return [
            mount
            for mount in self.host.mounts()
            if mount.source.startswith(MOUNT_SOURCE)
            and mount.source not in self._inherited
        ]

    def mount_of(self, volume: str) -> Mount | None:
        """Return the tmpfs mounted for ``volume``, if any."""
        mountpoint = self.plugin.client.get(volume)["Mountpoint"]
        found = [m for m in self.mounts() if m.mountpoint == mountpoint]
        assert len(found) <= 1, f"mounted {len(found)} times: {found}"
        return found[0] if found else None

    def eventually_unmounted(self, volume: str, *, seconds: float = 15) -> None:
        """Fail unless the tmpfs of ``volume`` goes away within ``seconds``."""
        eventually(
            lambda: self.mount_of(volume) is None,
            f"the tmpfs of {volume} is unmounted",
            seconds=seconds,
        )

    def clear(self) -> None:
        """Remove all containers and volumes; nothing of them may stay."""
        containers = self.docker("ps", "-aq").split()
        if containers:
            self.docker("rm", "-fv", *containers)
        volumes = self.docker("volume", "ls", "-q").split()
        if volumes:
            self.docker("volume", "rm", *volumes)
        assert self.plugin.client.list() == {}
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.mounts(), "all volumes are unmounted")
        assert self.mounts() == []

    def close(self) -> None:
        """End dockerd, the plugin and the host; each tells if anything is wrong."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.host.close)
            stack.callback(self.plugin.close)
            stack.callback(self.docker.close)


@contextlib.contextmanager
def running(*, live_restore: bool = False, config: str = "") -> Iterator[Engine]:
    """An engine from its start to its end; cleared at the end when all went well."""
    engine = Engine(live_restore=live_restore, config=config)
    try:
        engine.start()
        yield engine
        engine.clear()
    finally:
        engine.close()
