"""The mount table, as the kernel tells it for any process."""

import re
from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class Mount:
    """One line of mountinfo: see proc(5)."""

    mountpoint: str
    root: str
    device: str
    filesystem: str
    source: str
    options: frozenset[str]
    super_options: frozenset[str]


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """Return the mounts that ``pid`` sees, in the kernel's order."""
    text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    return [_parse(line) for line in text.splitlines()]


def _parse(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    _id, _parent, device, root, mountpoint, options, *_tags = left.split(" ")
    filesystem, source, super_options = right.split(" ", 2)
    return Mount(
        mountpoint=_plain(mountpoint),
        root=_plain(root),
        device=device,
        filesystem=filesystem,
        source=_plain(source),
        options=frozenset(options.split(",")),
        super_options=frozenset(super_options.split(",")),
    )


def _plain(text: str) -> str:
    # The kernel writes blanks, tabs, newlines and backslashes as octal numbers.
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
