"""What runs in the machine whose power is cut: ``guest_limit.py set|get FILE``.

``set`` limits a directory on each disk and waits for its end, with all mounted; ``get``
looks what is there. What the disks have is told in ``FILE``.
"""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from guest_disks import DISKS, Disk, Limited, make, quota_disk

from volplugin.host import projects, quotactl


def limited(disk: Disk) -> Limited:
    """Make a volume whose limit alone is not on the disk by others' doing."""
    volume = make(disk.mechanism(), disk.path / "volume")
    volume.limit(8 << 20)
    os.sync()
    volume.limit(4 << 20, inodes=77)
    return volume


def found(disk: Disk) -> Limited:
    path = disk.path / "volume"
    facts = {"project": str(projects.of(str(path)).id)}
    return Limited(disk.mechanism(), path, facts)


def told(volume: Limited) -> str:
    path = str(volume.path)
    return f"{projects.of(path)} {quotactl.get(path, volume.id)}\n"


def main(work: str, file: Path) -> None:
    with ExitStack() as stack:
        disks = [stack.enter_context(quota_disk(kind)) for kind in DISKS]
        volumes = [limited(disk) if work == "set" else found(disk) for disk in disks]
        whole = file.with_suffix(".part")
        whole.write_text("".join(told(volume) for volume in volumes))
        whole.rename(file)
        if work == "set":
            time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
