"""The options of `tandem plan`: the fewest workers that reach given goals, for a trace or for what a cluster has seen.

As `tandem replay`, it runs the frontend's admission and routing in its own process, imported when it runs.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.exit_status import end_call
from tandem.domain.recorded_load import RecordedCluster
from tandem.errors import ConfigError
from tandem.tls.paths import Tls

WINDOW_S_MAX = 86_400.0

Fleet = Annotated[
    Path | None,
    typer.Option(
        help="A worker of each role, in TOML or JSON, as for replay; for a running cluster only its [engine] and "
        "[frontend], instead of measured speeds.",
        metavar="FILE",
    ),
]


def plan(
    ttft: Annotated[float, typer.Option(help="Goal: seconds from arrival to the first token.")],
    itl: Annotated[float, typer.Option(help="Goal: mean seconds between two tokens of a request.")],
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Trace in Mooncake's JSONL format; default: what a running cluster saw.", metavar="[TRACE]"
        ),
    ] = None,
    fleet: Fleet = None,
    percentile: Annotated[float, typer.Option(help="Share of the requests that must be within each goal.")] = 0.99,
    workers_max: Annotated[int, typer.Option(help="Largest fleet that may be planned.")] = 64,
    shape: Annotated[str, typer.Option(help="any, pairs (prefill and decode) or aggregated.")] = "any",
    policy: Annotated[str, typer.Option(help="Routing policy.")] = "auto",
    load: Annotated[float, typer.Option(help="Factor on the rate of arrivals.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of all randomness: the same seed gives the same plan.")] = 0,
    replays_max: Annotated[int, typer.Option(help="Most replays of the search.")] = 40,
    json: Annotated[Path | None, typer.Option(help="Write the plan and all figures.", metavar="FILE")] = None,
    window: Annotated[float, typer.Option(help="Running cluster: seconds back for requests.")] = 600.0,
    observe: Annotated[
        float, typer.Option(help="Running cluster: seconds to record on; a frontend keeps few finished requests.")
    ] = 0.0,
    apply: Annotated[
        bool, typer.Option("--apply", help="Running cluster: change the roles of its workers as planned.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --apply: do not ask before.")] = False,
    model: Annotated[str | None, typer.Option(help="Running cluster: model; default: the only one.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up` here."),
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(help="Directory made by `tandem certs`; default: that of `tandem up` here.", metavar="DIR"),
    ] = None,
) -> None:
    """Say how many workers of which role reach given goals, by replays of candidate fleets in virtual time."""

    def run() -> int:
        from rich.console import Console
        from tandem_frontend.replay.planning.command import PlanRequest, run, run_recorded

        from tandem.cli.tables import table_console

        request = PlanRequest(
            ttft_s=ttft, itl_s=itl, percentile=percentile, workers_max=workers_max, replays_max=replays_max,
            shape=shape, policy=policy, seed=seed, load=load, json=json,
        )  # fmt: skip
        # Wrong options are refused before a cluster is observed.
        request.goals()
        if apply and trace is not None:
            raise ConfigError("apply", "needs a running cluster, not a trace")
        if yes and not apply:
            raise ConfigError("yes", "is only for --apply")
        status = Console(stderr=True)
        if trace is None:
            cluster = asyncio.run(_recorded(address, tls, model, window, observe))
            counts = run_recorded(request, cluster, fleet, table_console(), status)
            if counts is None or not apply:
                return 1 if counts is None else 0
            from tandem.cli.plan_apply import apply_plan

            return asyncio.run(apply_plan(counts, cluster, *_cluster_of(address, tls), is_agreed=yes))
        if fleet is None:
            raise ConfigError("fleet", "is required with a trace, which says nothing of the workers")
        return run(request, trace, fleet, table_console(), status)

    end_call("plan", run)


async def _recorded(
    address: str | None, tls: Path | None, model: str | None, window_s: float, observe_s: float
) -> RecordedCluster:
    from tandem.cli.membership import registry_addresses
    from tandem.cli.recorded_load import recorded_cluster

    for name, value, least in (("window", window_s, 1.0), ("observe", observe_s, 0.0)):
        if not least <= value <= WINDOW_S_MAX:
            raise ConfigError(name, f"must be {least:g} to {WINDOW_S_MAX:g} seconds, not {value:g}")
    where, certificate = _cluster_of(address, tls)
    registries = await registry_addresses(where)
    return await recorded_cluster(registries, certificate, model=model, window_s=window_s, observe_s=observe_s)


def _cluster_of(address: str | None, tls: Path | None) -> tuple[str, Tls | None]:
    from tandem.cli.state import find_tls, read_state

    return address or read_state().registry, find_tls(tls)
