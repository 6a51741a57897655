"""The command line of `benchmarks.peers`: systems, scenarios, and the output of results.

Owns the options and the report. Environments are installed first, because the isolated network has no package index.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import isolation
from benchmarks.peers.environment import DEFAULT, PEERS, REPOSITORY, Environment, Unavailable
from benchmarks.peers.running import Row, Settings, run_all
from benchmarks.peers.scenarios import SCENARIOS, Scenario, chosen
from benchmarks.peers.systems.door import System
from benchmarks.peers.systems.dynamo import Dynamo
from benchmarks.peers.systems.legs import Legs
from benchmarks.peers.systems.sglang_router import SglangRouter
from benchmarks.peers.systems.smg import Smg
from benchmarks.peers.systems.tandem import Tandem, contract_of
from benchmarks.peers.tables import table

SYSTEMS = ("legs", "tandem", *PEERS)
MISSING = "TANDEM_BENCHMARK_MISSING"
"""Carries into the isolated network which peers could not be installed, and why."""
MAKERS: dict[str, Callable[[Environment], System]] = {"smg": Smg, "sglang-router": SglangRouter, "dynamo": Dynamo}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}; default: all")
    add("--scenarios", default="paced,fast,short", help=f"of {', '.join(SCENARIOS)}; default: %(default)s")
    add("--streams", help="numbers of streams, for every scenario; default: each one's own")
    add("--seconds", type=float, default=8.0, help="length of a window; default: %(default)s")
    add("--repeats", type=int, default=4, help="how often a window is repeated while others are busy")
    add("--patience", type=float, default=60.0, help="seconds to wait for others to rest before each window")
    add("--connections", type=int, default=16, help="of gRPC clients, at most; default: %(default)s")
    add("--model", type=Path, default=REPOSITORY / "models" / "tandem-demo", help="model directory")
    add("--env", type=Path, default=DEFAULT, help="where the peers are installed; default: %(default)s")
    add(
        "--tandem-root",
        action="append",
        metavar="[NAME=]PATH",
        help="checkout whose services are measured, several for several; default: this one",
    )
    add("--tandem-contract", type=int, choices=(1, 2), help="of their legs; default: as each checkout's protos have it")
    add("--tandem-frontend-flags", default="", help='more settings of its frontend, for example "--processes=2"')
    add("--tandem-doors", default="grpc,http", help="which of its doors; default: %(default)s")
    add("--tandem-coalesce", default="default,0", help="what gRPC clients ask for, in ms; default: %(default)s")
    add("--out", type=Path, help="file for the results, as JSON")
    add(
        "--shared-network", action="store_true", help="stay in the machine's network: peers may listen on all addresses"
    )
    return parser.parse_args(arguments)


def make_systems(options: argparse.Namespace) -> tuple[list[System], dict[str, str]]:
    """The systems asked for, and why some of them cannot be had."""
    environment = Environment(options.env.resolve())
    systems: list[System] = []
    missing: dict[str, str] = json.loads(os.environ.get(MISSING, "{}"))
    for name in options.systems.split(","):
        if name in missing:
            continue
        if name in PEERS:
            try:
                environment.ensure(name)
            except Unavailable as problem:
                missing[name] = str(problem)
            else:
                systems.append(MAKERS[name](environment))
        elif name == "legs":
            systems += [Legs(contract) for contract in sorted({tandem.contract for tandem in _tandems(options)})]
        elif name == "tandem":
            systems += _tandems(options)
        else:
            raise SystemExit(f"--systems: unknown system {name!r}; available: {', '.join(SYSTEMS)}")
    return systems, missing


def _tandems(options: argparse.Namespace) -> list[Tandem]:
    found = []
    for text in options.tandem_root or [str(REPOSITORY)]:
        name, _, path = text.rpartition("=")
        root = Path(path).resolve()
        contract = options.tandem_contract or contract_of(root)
        coalescing = [None if part == "default" else int(part) for part in options.tandem_coalesce.split(",")]
        found.append(
            Tandem(
                name=name or "Tandem",
                root=root,
                contract=contract,
                frontend_flags=shlex.split(options.tandem_frontend_flags),
                doors=options.tandem_doors.split(","),
                # A frontend from before contract 2 knows no such field, and would answer as without it.
                coalescing=coalescing if contract > 1 else [None],
            )
        )
    return found


def make_scenarios(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios asked for."""
    names = options.scenarios.split(",")
    streams = {}
    if options.streams:
        streams = dict.fromkeys(names, tuple(map(int, options.streams.split(","))))
    try:
        return chosen(names, streams)
    except KeyError as problem:
        raise SystemExit(f"--scenarios: unknown scenario {problem}; available: {', '.join(SCENARIOS)}") from None


def machine() -> dict[str, Any]:
    """What the measurements belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


async def measure(options: argparse.Namespace) -> None:
    """Run everything, and report each window when it ends."""
    systems, missing = make_systems(options)
    scenarios, rows = make_scenarios(options), []

    def report(row: Row) -> None:
        rows.append(row)
        print(_progress(row), file=sys.stderr, flush=True)
        if options.out is not None:
            facts = {"command": options.command, **machine(), "missing": missing}
            options.out.write_text(json.dumps({**facts, "rows": [one.to_json() for one in rows]}, indent=1) + "\n")

    settings = Settings(
        options.model.resolve(),
        options.seconds,
        options.repeats,
        options.connections,
        patience_s=options.patience,
    )
    await run_all(scenarios, systems, settings, report)
    for scenario in scenarios:
        absent = [Row(scenario.name, name, 0, 0, None, f"not here: {reason}") for name, reason in missing.items()]
        print(table(scenario, [*(row for row in rows if row.scenario == scenario.name), *absent]), end="\n\n")


def _progress(row: Row) -> str:
    what = f"{row.scenario}, {row.system}, {row.streams} streams, {row.workers} workers"
    if row.measurements is None:
        return f"{what}: {row.problem}"
    found = row.measurements
    cost = found.front_ms_per_1k_tokens
    return f"{what}: {found.tokens_per_s:,.0f} tokens/s, {cost and round(cost, 1)} ms per 1k, {dict(found.failures)}"


def main() -> None:
    """Install, step into a network of its own, measure."""
    options = parse(sys.argv[1:])
    options.command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    make_scenarios(options)
    if isolation.is_isolated():
        isolation.bring_loopback_up()
    else:
        _, missing = make_systems(options)
        os.environ[MISSING] = json.dumps(missing)
        if not options.shared_network:
            if not isolation.can_isolate():
                raise SystemExit(
                    "cannot create a network namespace on this machine; use --shared-network to measure without one"
                )
            isolation.enter("benchmarks.peers", sys.argv[1:])
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
