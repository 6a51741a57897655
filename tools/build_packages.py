"""Builds the sdist and the wheel into dist/, checks them with twine, and tries the wheel; run by `make packages`.

The tree is copied first, because builds leave folders behind. The wheel is tried in a fresh environment and an empty
directory: `tandem demo` runs there with the simulated engine and the demo model of the package. `--no-trial` omits
that, which downloads what Tandem asks for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.own_environment import ROOT, own_environment

DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-trial", action="store_true", help="do not install and run the wheel")
    arguments = parser.parse_args()
    made = build(DIST)
    subprocess.run([str(own_environment("packages") / "twine"), "check", "--strict", *map(str, made)], check=True)
    if not arguments.no_trial:
        try_wheel(next(file for file in made if file.suffix == ".whl"))
    for file in made:
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1e6:.1f} MB")
    return 0


def build(target: Path) -> list[Path]:
    """The sdist, and the wheel built of it; removes earlier ones of any version."""
    target.mkdir(exist_ok=True)
    for old in (*target.glob("tandem_serving-*.whl"), *target.glob("tandem_serving-*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="tandem-source-") as folder:
        copy_tree(Path(folder))
        python = own_environment("packages") / "python"
        command = [str(python), "-m", "build", "--no-isolation", "--outdir", str(target), folder]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(ended.stdout[-2000:] + ended.stderr[-2000:])
    return sorted(target.glob("tandem_serving-*"))


def copy_tree(target: Path) -> None:
    """Copy the files that git lists, with links as links."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        elif source.is_file():
            copy.write_bytes(source.read_bytes())


def try_wheel(wheel: Path) -> None:
    """Install the wheel and what it asks for; run the demo and the doctor where there is nothing else."""
    with tempfile.TemporaryDirectory(prefix="tandem-trial-") as folder:
        environment, empty = Path(folder, "environment"), Path(folder, "empty")
        empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        python = str(environment / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
        subprocess.run([*pip, f"{wheel}[edge]"], check=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TANDEM_"))}
        tandem = str(environment / "bin" / "tandem")
        for command in (["--version"], ["doctor", "edge"], ["demo", "--engine", "simulated"]):
            subprocess.run([tandem, *command], cwd=empty, env=clean, check=True)


if __name__ == "__main__":
    sys.exit(main())
