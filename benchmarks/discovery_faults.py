"""How long requests are still sent to a dead worker: `python -m benchmarks.discovery_faults`.

Starts registries on a real Consul agent, two frontends and simulated workers, keeps up a steady load, and kills a
decode worker repeatedly: with the registries alive, and with all of them dead. A request whose first attempt was not
accepted was sent to the dead worker. Prints the time from SIGKILL to the last such request for each kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tandem.local_cluster.consul_binary import find_consul
from tests.faults.support import verdicts
from tests.faults.support.fault_cluster import FaultCluster, Plan, fault_cluster
from tests.faults.support.history import now_s
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape, SteadyLoad, steady_load
from tests.faults.support.views import Views
from tests.integration.support.consul_host import consul_agent

VICTIM = "decode-0"


async def settled(cluster: FaultCluster, views: Views, seconds: float = 2.0) -> None:
    """Wait until everything runs again, and for longer than a frontend avoids a worker that failed."""
    await cluster.restore(views)
    await asyncio.sleep(seconds)


async def kill_once(cluster: FaultCluster, load: SteadyLoad, watched_s: float) -> dict[str, Any]:
    """Kill the worker; whom the frontends asked meanwhile."""
    killed_s = await kill(cluster.processes[VICTIM])
    await asyncio.sleep(watched_s)
    later = load.history.begun(killed_s, now_s())
    verdicts.is_large_enough(later, int(watched_s * load.shape.rate_per_s / 2))
    verdicts.none_failed(later.where(lambda asked: asked.end_s is not None))
    astray = later.led_astray()
    last_s = astray.last_start_s()
    held = load.history.where(lambda asked: (asked.end_s or killed_s) >= killed_s)
    held = held.where(verdicts.held_by(VICTIM, killed_s))
    return {
        "ms": 0.0 if last_s is None else 1e3 * (last_s - killed_s),
        "asked_in_vain": len(astray),
        "requests": len(later),
        "broken_streams": len(held),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    shape = Shape(rate_per_s=arguments.rate_per_s, long_every=0)
    async with AsyncExitStack() as stack:
        consul = await stack.enter_async_context(consul_agent(find_consul(), logs))
        plan = Plan(consul=consul.address, lease_s=arguments.lease_ttl_s, decode=arguments.decode)
        cluster = await stack.enter_async_context(fault_cluster(logs, plan))
        views = await stack.enter_async_context(cluster.views())
        await cluster.whole(views)
        load = await stack.enter_async_context(steady_load([f.address for f in cluster.frontends], shape))
        await load.wait_ended(20)
        alive, dead = [], []
        for _ in range(arguments.kills):
            alive.append(await kill_once(cluster, load, arguments.watched_s))
            await settled(cluster, views)
        for _ in range(arguments.kills):
            for registry in cluster.registries:
                await kill(registry)
            dead.append(await kill_once(cluster, load, arguments.watched_s))
            await settled(cluster, views)
    return {"registries_alive": report(alive), "registries_dead": report(dead)}


def report(kills: list[dict[str, Any]]) -> dict[str, Any]:
    times_ms = [one["ms"] for one in kills]
    return {
        "kills": len(kills),
        "last_request_ms": {"median": round(statistics.median(times_ms)), "most": round(max(times_ms))},
        **{key: sum(one[key] for one in kills) for key in ("requests", "asked_in_vain", "broken_streams")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--decode", type=int, default=2, help="number of decode workers; one of them is killed")
    parser.add_argument("--rate-per-s", type=float, default=50)
    parser.add_argument(
        "--watched-s", type=float, default=6, help="seconds observed after each kill; longer than a lease"
    )
    parser.add_argument("--lease-ttl-s", type=float, default=5)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
