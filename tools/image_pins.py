"""Lists the images that are not ours, of Dockerfiles and compose files, and whether each is named by a digest.

A tag can be moved to another image, a digest cannot. Each image is a build argument or a variable, so that a registry
that you trust decides: set NAME=image:tag@sha256:... in the environment or in `.env`. --require fails while one of them
has no digest, for a pipeline that builds a release.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("services/*/Dockerfile", "docker-compose*.yml")
ARGUMENT = re.compile(r"^ARG (\w+_IMAGE)=(\S+)$", re.MULTILINE)
VARIABLE = re.compile(r"\$\{(\w+_IMAGE):-([^}]+)\}")
DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")


def images() -> dict[str, str]:
    """Image of each variable: that of the environment, else the default of the files."""
    found: dict[str, str] = {}
    for pattern in FILES:
        for file in sorted(ROOT.glob(pattern)):
            text = file.read_text()
            found |= dict(ARGUMENT.findall(text) + VARIABLE.findall(text))
    return {name: os.environ.get(name, image) for name, image in sorted(found.items())}


def main() -> int:
    loose = 0
    for name, image in images().items():
        is_pinned = DIGEST.fullmatch(image) is not None
        loose += not is_pinned
        print(f"{'digest' if is_pinned else 'tag   '}  {name}={image}")
    if loose:
        print(
            f"{loose} images are named by a tag. `docker buildx imagetools inspect IMAGE` prints the digest; set "
            "NAME=IMAGE@DIGEST in the environment or in .env",
            file=sys.stderr,
        )
    return 1 if loose and "--require" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
