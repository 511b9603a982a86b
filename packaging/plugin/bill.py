"""List what the managed plugin's image is made of, as CycloneDX JSON, on stdout.

``bill.py ROOTFS DEBS VERSION`` with the packages' files in DEBS and their documents
still in ROOTFS. By the standard library alone, as nothing else is on a host that
assembles. The same packages and the same SOURCE_DATE_EPOCH give the same bytes.
"""

import datetime as dt
import hashlib
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

# machine-readable copyright files: https://www.debian.org/doc/packaging-manuals/
_LICENCE = re.compile(r"^License: *(\S.*)$", re.MULTILINE)
_COMMON = re.compile(r"/usr/share/common-licenses/([A-Za-z][\w.+-]*\w)")


def main() -> None:
    """Write the list."""
    rootfs, debs, version = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    components = [_component(deb, rootfs) for deb in sorted(debs.glob("*.deb"))]
    text = json.dumps(components, sort_keys=True)
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}",
        "version": 1,
        "metadata": {
            "timestamp": dt.datetime.fromtimestamp(epoch, dt.UTC).isoformat(),
            "component": {
                "type": "container",
                "bom-ref": "volplugin",
                "name": "volplugin",
                "version": version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": components,
    }
    json.dump(bill, sys.stdout, indent=2, sort_keys=True)
    sys.stdout.write("\n")


def _component(deb: Path, rootfs: Path) -> dict[str, Any]:
    fields = subprocess.run(
        [
            "dpkg-deb",
            "--show",
            "--showformat=${Package} ${Version} ${Architecture}",
            deb,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    name, version, architecture = fields.split()
    url = f"pkg:deb/debian/{name}@{version.replace('+', '%2B')}?arch={architecture}"
    found = {
        "type": "library",
        "bom-ref": url,
        "purl": url,
        "name": name,
        "version": version,
        "hashes": [
            {"alg": "SHA-256", "content": hashlib.sha256(deb.read_bytes()).hexdigest()}
        ],
    }
    licences = _licences(rootfs / "usr/share/doc" / name / "copyright")
    return {**found, "licenses": [{"license": {"name": each}} for each in licences]}


def _licences(document: Path) -> list[str]:
    """Return the licences that a package's copyright file names, by Debian's names."""
    text = document.read_text(errors="replace") if document.exists() else ""
    found = set(_LICENCE.findall(text)) or set(_COMMON.findall(text))
    return sorted(found) or [f"see /{'/'.join(document.parts[-5:])} of the package"]


if __name__ == "__main__":
    main()
