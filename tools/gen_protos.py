"""Generates `src/tandem/api` from `protos/`, or checks that the committed files are up to date.

The path of a proto is its protobuf package is its Python import path, so nothing needs rewriting afterwards.

    python tools/gen_protos.py            write
    python tools/gen_protos.py --check    exit 1 when a committed file differs
    python tools/gen_protos.py --lint     buf lint and buf breaking (against --against, default main)
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "src" / "tandem" / "api"
INIT = '"""Generated from protos/ by tools/gen_protos.py; not to be edited."""\n'


def proto_files(root: Path) -> list[str]:
    """All contracts below a `protos` folder, relative to it, in order."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))


def includes(root: Path) -> list[str]:
    """Where imports are found: the contracts, google.protobuf (grpcio-tools), google.api (googleapis)."""
    googleapis = Path(str(files("google.api").joinpath("annotations.proto"))).parents[2]
    return [f"-I{root}", f"-I{files('grpc_tools').joinpath('_proto')}", f"-I{googleapis}"]


def run_protoc(arguments: list[str]) -> None:
    """Run protoc; exit with its status when it fails (it has printed why)."""
    status = protoc.main(["protoc", *arguments])
    if status != 0:
        sys.exit(status)


def generate(out: Path) -> None:
    """Write messages, typing stubs and gRPC stubs below `out`, as importable packages."""
    out.mkdir(parents=True, exist_ok=True)
    names = proto_files(PROTOS)
    outputs = [
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    run_protoc([*includes(PROTOS), *outputs, *names])
    api = out / "tandem" / "api"
    for folder in [api, *(path for path in api.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text(INIT)


def differing(left: Path, right: Path) -> list[str]:
    """Relative names of files that exist on one side only or whose contents differ."""
    names = {str(p.relative_to(side)) for side in (left, right) for p in side.rglob("*.py*") if p.suffix != ".pyc"}
    equal, _, _ = filecmp.cmpfiles(left, right, names, shallow=False)
    return sorted(names - set(equal))


def build_image(root: Path, out: Path) -> None:
    """Write a descriptor set with sources and imports, which buf reads (its module registry needs a network)."""
    run_protoc(
        [
            *includes(root),
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *proto_files(root),
        ]
    )


def checkout_protos(revision: str, out: Path) -> None:
    """Unpack `protos/` of a git revision (or of the same one at origin) below `out`; exit when there is none."""
    for name in (revision, f"origin/{revision}"):
        archive = subprocess.run(["git", "archive", name, "protos"], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode == 0:
            subprocess.run(["tar", "-x", "-C", str(out)], input=archive.stdout, check=True)
            return
    sys.exit(f"buf breaking: {revision} has no protos to compare with")


def lint(against: str) -> int:
    """buf lint, then buf breaking against a git revision. Returns an exit status."""
    with tempfile.TemporaryDirectory() as folder:
        image, before = Path(folder) / "image.binpb", Path(folder) / "before.binpb"
        build_image(PROTOS, image)
        config = str(ROOT / "buf.yaml")
        status = subprocess.run(["buf", "lint", str(image), "--config", config], check=False).returncode
        checkout_protos(against, Path(folder))
        build_image(Path(folder) / "protos", before)
        command = ["buf", "breaking", str(image), "--against", str(before), "--config", config]
        return subprocess.run(command, check=False).returncode or status


def main() -> int:
    """Parse the arguments and do the one thing asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed file differs")
    parser.add_argument("--lint", action="store_true", help="run buf lint and buf breaking")
    parser.add_argument("--against", default="main", help="git revision that buf breaking compares with")
    arguments = parser.parse_args()
    # The plugins of protoc, and buf, are in this environment, which need not be the active one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if arguments.lint:
        return lint(arguments.against)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "tandem" / "api"
        if arguments.check:
            drift = differing(fresh, GENERATED)
            print(
                "\n".join(f"differs from protos/: src/tandem/api/{name}" for name in drift)
                or "generated code is current"
            )
            return 1 if drift else 0
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
