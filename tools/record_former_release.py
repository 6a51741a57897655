"""`python tools/record_former_release.py v0.1.0` records a release for tests/faults/test_mixed_releases.py.

A checkout may have no history, so the sources of the last release are in the repository, as one file. Run this for each
release, and remove the file of the previous one. Only what processes import is in it, no tests and no documentation.
"""

from __future__ import annotations

import io
import lzma
import re
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RELEASES = REPOSITORY / "tests" / "faults" / "releases"
FOLDERS = ("src", "services")
ENDINGS = (".py", ".json", ".jinja", ".lua", ".jinja2")


def record(commit: str) -> Path:
    """Write the file of a commit; returns its path."""
    git = ("git", "-C", str(REPOSITORY))
    named = subprocess.run([*git, "rev-parse", "--short=7", commit], capture_output=True, text=True, check=True)
    everything = subprocess.run([*git, "archive", commit, *FOLDERS], capture_output=True, check=True).stdout
    packed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(everything)) as source, tarfile.open(fileobj=packed, mode="w") as target:
        for member in source.getmembers():
            if member.isfile() and member.name.endswith(ENDINGS):
                target.addfile(member, source.extractfile(member))
        text = source.extractfile("src/tandem/__init__.py")
        assert text is not None
        version = re.search(r'__version__ = "(.+)"', text.read().decode())
        assert version is not None
    file = RELEASES / f"tandem-{version[1]}-{named.stdout.strip()}.tar.xz"
    RELEASES.mkdir(exist_ok=True)
    file.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    return file


if __name__ == "__main__":
    written = record(sys.argv[1])
    print(f"{written.relative_to(REPOSITORY)} ({written.stat().st_size:,} bytes)")
