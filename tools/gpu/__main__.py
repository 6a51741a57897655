"""`python -m tools.gpu`: package the project for a GPU machine, and measure it there; see docs/evidence/gpu.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu import payload, pieces

if TYPE_CHECKING:
    from tools.gpu.runs import Plan

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "tandem-demo"
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""Variables that turn NVLink multicast off, which ranks of one engine would use: a failure of it can outlast the run on
hosts that lend their GPUs to several machines."""
GPUS = 4
"""What a rehearsal on a CPU is for by default."""


def main() -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="fetch the packages, thin them, and write pieces")
    packing.add_argument("work", type=Path, help="scratch directory; needs 15 GB")
    packing.add_argument("--piece-mib", type=int, default=56)
    packing.add_argument(
        "--architecture", type=int, default=90, help="compute capability whose code is kept, times ten (90: H100, H200)"
    )
    unpacking = commands.add_parser("unpack", help="put one piece together, on the machine")
    unpacking.add_argument("piece", type=Path)
    unpacking.add_argument("folder", type=Path)
    commands.add_parser("facts", help="what this machine is")
    making = commands.add_parser("model", help="write a model with random weights")
    making.add_argument("folder", type=Path)
    making.add_argument("--shape", default="llama-8b")
    making.add_argument("--device", default="cuda")
    _add_run(commands.add_parser("run", help="measure"))
    listing = commands.add_parser("steps", help="which steps with several workers run on so many GPUs")
    listing.add_argument("--gpus", type=int, default=None, help="default: those of this machine")
    reporting = commands.add_parser("report", help="print tables of a results file")
    reporting.add_argument("results", type=Path)
    return _COMMANDS[(given := parser.parse_args()).command](given)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--gpus", type=int, default=None,
        help=f"GPUs to use; default: those of this machine; with --device cpu those to rehearse for, default {GPUS}",
    )  # fmt: skip
    parser.add_argument(
        "--engines-per-gpu", type=int, default=1,
        help="how many engines share a GPU in the steps with several workers; give --kv-tokens so that all fit",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--model", type=Path, required=True, help="directory of the large model; the `model` command makes one"
    )
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, required=True, help="output directory for results.json and the logs")
    parser.add_argument("--deadline-s", type=float, default=520)
    parser.add_argument("--steps", default="", help="comma-separated step names; default: all")
    parser.add_argument("--kv-tokens", type=int, default=220_000)
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument(
        "--add", action="store_true", help="keep what results.json in --out has from runs with the same arguments"
    )
    parser.add_argument("--extra", default="{}", help="additional arguments of every engine, as JSON")


def _pack(given: argparse.Namespace) -> int:
    written = payload.build(given.work, given.architecture, given.piece_mib * 2**20)
    print(f"{len(written)} pieces below {given.work}")
    return 0


def _unpack(given: argparse.Namespace) -> int:
    print(f"{pieces.unpack(given.piece, given.folder)} units")
    return 0


def _facts(given: argparse.Namespace) -> int:
    from tools.gpu.machine import facts

    print(json.dumps(facts(), indent=1))
    return 0


def _model(given: argparse.Namespace) -> int:
    from tools.gpu.llama import write

    print(write(given.folder, given.shape, DEMO, given.device))
    return 0


def _run(given: argparse.Namespace) -> int:
    from tools.gpu import machine, runs
    from tools.gpu.results import Results

    try:
        given.gpus = places(given.device, given.gpus, machine.gpu_count())
        if given.engines_per_gpu < 1:
            raise ValueError(f"--engines-per-gpu: must be at least 1, not {given.engines_per_gpu}")
        plan = _plan(given)
        runs.check_steps(plan.steps, plan.machine.places)
        results = Results(given.out / "results.json", given.deadline_s)
        if given.add:
            results.add_to(vars(given))
    except ValueError as problem:
        print(f"python -m tools.gpu run: {problem}", file=sys.stderr)
        return 2
    for name, value in NO_MULTICAST.items():
        # Every process of a cluster inherits them.
        os.environ.setdefault(name, value)
    given.out.mkdir(parents=True, exist_ok=True)
    results.keep("machine", machine.facts())
    results.keep("arguments", {name: str(value) for name, value in vars(given).items()})
    try:
        asyncio.run(runs.Run(plan, results).all())
    finally:
        runs.save_logs(plan.machine.logs, given.out)
    # Processes that a failed step left behind must not keep this one.
    os._exit(0)


def _plan(given: argparse.Namespace) -> Plan:
    from tools.gpu import measures, runs
    from tools.gpu.shapes import Load, Machine

    on_gpu = given.device == "cuda"
    size = measures.GPU if on_gpu else measures.REHEARSAL
    requests = max(size.levels) + size.decodes
    return runs.Plan(
        machine=Machine(
            device=given.device, gpus=given.gpus if on_gpu else 0, places=given.gpus * given.engines_per_gpu,
            dtype=given.dtype, logs=given.out / "logs", extra=json.loads(given.extra),
        ),
        size=size,
        demo=given.demo,
        model=given.model,
        steps=tuple(given.steps.split(",")) if given.steps else runs.STEPS,
        load=Load(kv_capacity_tokens=given.kv_tokens, running_requests_max=requests, frontends=given.frontends),
        demo_load=Load(kv_capacity_tokens=16_384, running_requests_max=16),
        callers=given.callers,
    )  # fmt: skip


def places(device: str, asked: int | None, found: int) -> int:
    """How many GPUs are used; on a CPU, how many are rehearsed for.

    Raises:
        ValueError: fewer are there than were asked for, or fewer than one.
    """
    count = asked if asked is not None else GPUS if device == "cpu" else found
    if count < 1:
        raise ValueError(f"--gpus: must be at least 1, not {count}" if asked is not None else "--gpus: none is there")
    if device == "cuda" and count > found:
        raise ValueError(f"--gpus: {count} were asked for, and {found} are there")
    return count


def _steps(given: argparse.Namespace) -> int:
    from tools.gpu import catalog, machine
    from tools.gpu.markdown_table import table

    gpus = machine.gpu_count() if given.gpus is None else given.gpus
    rows = [tuple(row.values()) for row in catalog.outlook(gpus)]
    print(table(("step", "fleet", f"on {gpus} GPUs"), rows))
    return 0


def _report(given: argparse.Namespace) -> int:
    from tools.gpu.report import tables

    print(tables(json.loads(given.results.read_text())))
    return 0


_COMMANDS = {
    "pack": _pack, "unpack": _unpack, "facts": _facts, "model": _model, "run": _run, "steps": _steps, "report": _report,
}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
