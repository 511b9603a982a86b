"""Images that need no registry: tar archives of this machine's static busybox."""

import io
import os
import shutil
import tarfile
from typing import Final

from support.require import require

IMAGE: Final = "busybox:local"
SEED_IMAGE: Final = "seed:local"
"""As `IMAGE`, with ``/data/hello`` (``from the image``), uid 1000, mode 0640."""

_APPLETS: Final = "sh cat date dd df echo id ls mkdir rm sleep stat sync test touch wc"


def image_archive(*, seeded: bool) -> bytes:
    """Return what ``import`` takes: `SEED_IMAGE` if ``seeded``, else `IMAGE`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        # dockerd mounts a new volume for copying where the image has a folder, empty or
        # not: the plain image has none to mount a volume on.
        for folder in ("bin", "tmp", *(["data"] if seeded else [])):
            _add(archive, folder, tarfile.DIRTYPE, mode=0o755)
        busybox = shutil.which("busybox", path="/bin:/usr/bin") or require("busybox")
        archive.add(os.path.realpath(busybox), "bin/busybox")
        for applet in _APPLETS.split():
            _add(archive, f"bin/{applet}", tarfile.SYMTYPE, target="busybox")
        if seeded:
            content = b"from the image\n"
            _add(archive, "data/hello", tarfile.REGTYPE, mode=0o640, content=content)
    return buffer.getvalue()


def _add(
    archive: tarfile.TarFile,
    name: str,
    kind: bytes,
    *,
    mode: int = 0o777,
    target: str = "",
    content: bytes = b"",
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname = kind, mode, target
    entry.size = len(content)
    entry.uid = entry.gid = 1000 if content else 0
    archive.addfile(entry, io.BytesIO(content))
