"""`tandem demo` (`make demo`): start a cluster, stream one completion, print route, latency and KV transfer."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from dataclasses import replace

from rich.console import Console

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.cli.checks import check_spec
from tandem.cli.exit_status import Interruption
from tandem.cli.generate import print_events, tokens_per_s
from tandem.cli.logs import make_log_directory
from tandem.cli.progress import Readiness
from tandem.exit_codes import EXIT_INTERRUPTED
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.convert import kv_check_text

STORY = (
    "Listen carefully. Mia hid the red key in the old barn. Theo left the orange spoon in the dark forest. "
    "Sam put the blue ball near the warm window. Julia saw a turtle, and she was excited. It was a sunny day. "
    "They sang a song, and Finn laughed. Owen lost the silver coin on the little roof. Where did Mia hide the red key?"
)
MAX_TOKENS = 60


async def demo(spec: ClusterSpec, console: Console) -> int:
    """Start, stream, stop, report. Returns the exit status: 0 only if KV was transferred and the stream finished.

    Raises:
        ConfigError: a setting is wrong; nothing has been started.
        TandemError: a process did not start, or the request failed.
    """
    check_spec(spec)
    cluster = LocalCluster(replace(spec, log_directory=make_log_directory(spec.log_directory)))
    interruption = Interruption(console, cluster.kill)
    begin_s = time.monotonic()
    console.print(
        f"starting registry, prefill, decode and frontend ({spec.engine}, {spec.model.name})", highlight=False
    )
    # Stops the cluster too when it became ready just as a signal arrived.
    async with AsyncExitStack() as stack:
        with Readiness(console) as readiness:
            cluster.on_change = readiness.changed
            await interruption.unless_requested(stack.enter_async_context(cluster))
        if interruption.requested.is_set():
            return EXIT_INTERRUPTED
        try:
            finish = await interruption.unless_requested(_stream(cluster, console))
        finally:
            console.print(highlight=False)
            with Readiness(console) as readiness:
                cluster.on_change = readiness.changed
                clean = await cluster.stop()
    if finish is None:
        return EXIT_INTERRUPTED
    _print_summary(finish, console, is_simulated=spec.engine == "simulated")
    console.print(f"all in {time.monotonic() - begin_s:.1f} s", style="dim", highlight=False)
    moved = finish.timings.kv_transfer_bytes > 0 and finish.reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    return 0 if moved and clean else 1


async def _stream(cluster: LocalCluster, console: Console) -> pb.GenerateFinish:
    console.print(f"\n[bold]>[/] {STORY}\n", highlight=False)
    request = pb.GenerateRequest()
    request.sampling.temperature = 0.0
    request.stopping.max_tokens = MAX_TOKENS
    request.chat.messages.add(role="user", content=STORY)
    return await print_events(cluster.frontend.address, request, console)


def _print_summary(finish: pb.GenerateFinish, console: Console, *, is_simulated: bool) -> None:
    route, timings = finish.route, finish.timings
    rate = tokens_per_s(finish)
    moved = "KV moved (simulated)" if is_simulated else "KV moved over NIXL"
    rows = {
        "pair": f"{route.prefill_worker_id} (prefill) → {route.decode_worker_id} (decode)",
        "time to first token": f"{timings.time_to_first_token.ToNanoseconds() / 1e6:.1f} ms",
        "tokens per second": "-" if rate is None else f"{rate:.0f}",
        moved: f"{timings.kv_transfer_bytes:,} bytes for {finish.usage.prompt_tokens} prompt tokens"
        + kv_check_text(timings.kv_check),
        "recomputed on decode": f"{timings.recomputed_tokens} prompt tokens",
    }
    console.print()
    for name, value in rows.items():
        console.print(f"  {name:<22}{value}", highlight=False)
