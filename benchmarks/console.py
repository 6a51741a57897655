"""What the console costs a frontend, and what a fleet of 1,000 workers costs the browser that shows it.

    python -m benchmarks.console                        # 20 s for each row
    python -m benchmarks.console --seconds 60 --rounds 3

Three measurements, each on its own:

1. Processor time of a frontend's process, over the whole of it, without and with one viewer, in turn. Pairs of
   simulated workers, idle and under load. The viewer is another process, which asks for what the page shows: the fleet
   each second, the request list every two.
2. Processor time of one snapshot of 1,000 workers: where 200 of them have reported, as many as a frontend reads in a
   second, and where all have.
3. A real Chromium that shows 1,000 workers, all of which change each second, while it scrolls: times between frames.
   Left out where none is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from tandem_frontend.console.access import ConsoleKeys
from tandem_frontend.console.feed import FleetFeed
from tandem_frontend.console.frontends import ConsoleFrontends
from tandem_frontend.console.server import Console

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1.sampling_pb2 import Stopping
from tandem.cli.console_access import key_of, prepare
from tandem.client import calls
from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.errors import TandemError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.service.background import BackgroundTasks
from tests.integration.support.chromium import Page, chromium, find_chromium
from tests.unit.support.scripted_fleet import ScriptedFleet, ScriptedFrontends, many_workers

MODEL = Path(__file__).parents[1] / "models" / "tandem-demo"
WORKERS = 1_000
REPORTS_PER_S = 200
"""See `tandem.client.load_watch.MESSAGES_PER_S_MAX`."""
SNAPSHOTS = 50
STREAMS = 8
STOPPING = Stopping(max_tokens=150, ignore_eos=True)
SETTLE_S = 2.0
POLL_S = 2.0
PARTS = {
    "ScriptDuration": "scripts",
    "RecalcStyleDuration": "styles",
    "LayoutDuration": "layout",
    "TaskDuration": "all",
}
"""Durations that Chromium counts, in s."""
FRAMES = """
new Promise(resolve => {
  const grid = document.querySelector('.split .grid');
  const gaps = [];
  const begin = performance.now();
  let last = begin;
  requestAnimationFrame(function step(now) {
    gaps.push(now - last);
    last = now;
    grid.scrollTop = (grid.scrollTop + 40) % (grid.scrollHeight - grid.clientHeight);
    if (now - begin < SECONDS * 1000) requestAnimationFrame(step);
    else resolve(gaps.slice(1));
  });
})
"""


async def viewer(port: int, key: str) -> None:
    """What an open page asks for, until cancelled: the stream of the fleet, and the request list every two seconds."""
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout()) as session,
        session.get("/api/fleet", headers=headers) as response,
    ):
        polling = asyncio.create_task(poll(session, headers))
        async for _ in response.content.iter_any():
            pass
        polling.cancel()


async def poll(session: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    while True:
        async with session.get("/api/requests", headers=headers) as response:
            await response.read()
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def viewing(port: int, key: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.console", "--view", str(port), stdin=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(f"{key}\n".encode())
    process.stdin.close()
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def load(address: str) -> AsyncIterator[None]:
    async def stream() -> None:
        request = pb.GenerateRequest(prompt="Once upon a time " * 40, stopping=STOPPING)
        while True:
            with contextlib.suppress(TandemError):
                async for _ in calls.generate(address, request):
                    pass

    tasks = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def share(process: psutil.Process, seconds: float) -> float:
    """Share of a core, in percent."""
    await asyncio.sleep(SETTLE_S)
    before, begin_s = process.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    return 100 * (after.user + after.system - before.user - before.system) / (time.monotonic() - begin_s)


async def measure_frontend(seconds: float, rounds: int, pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        access = prepare(Path(folder), "127.0.0.1", 0)
        key = key_of(access.keys)
        spec = ClusterSpec(
            model=MODEL, log_directory=Path(folder), engine="simulated", prefill=pairs, decode=pairs,
            console_port=access.port, console_keys=access.keys,
            worker_flags={"engine-extra": '{"decode_step_s": 0.02}'},
        )  # fmt: skip
        async with LocalCluster(spec) as cluster:
            process = psutil.Process(cluster.frontend.pid)
            for name in ("idle", f"{STREAMS} streams"):
                async with AsyncExitStack() as stack:
                    if name != "idle":
                        await stack.enter_async_context(load(cluster.frontend.address))
                    without, with_viewer = [], []
                    for _ in range(rounds):
                        without.append(await share(process, seconds))
                        async with viewing(access.port, key):
                            with_viewer.append(await share(process, seconds))
                    differences = [after - before for before, after in zip(without, with_viewer, strict=True)]
                    print(
                        f"frontend of {2 * pairs} workers, {name}: {statistics.median(without):.2f} % of a core "
                        f"without a viewer, {statistics.median(with_viewer):.2f} % with one; "
                        f"differences {', '.join(f'{one:.2f}' for one in differences)}",
                        flush=True,
                    )


def measure_snapshots() -> None:
    fleet = ScriptedFleet(*many_workers(WORKERS))
    fleet.report_all(1)
    feed = FleetFeed(fleet, ScriptedFrontends(), {"frontend": "f", "model": "m"})
    feed.look()
    whole = len(feed._full())
    for count in (0, REPORTS_PER_S, WORKERS):
        took = []
        for number in range(SNAPSHOTS):
            kept = dict(fleet.loads)
            fleet.report_all(2 + number)
            fresh = {worker.start for worker in fleet.view[:count]}
            fleet.loads = {start: loads if start in fresh else kept[start] for start, loads in fleet.loads.items()}
            begin = time.process_time()
            feed.look()
            took.append(time.process_time() - begin)
        ms = 1e3 * statistics.median(took)
        print(f"snapshot of {WORKERS} workers, {count} reports since the last: {ms:.1f} ms, {len(feed._delta)} bytes")
    begin = time.process_time()
    feed._whole = None
    feed._full()
    print(f"whole fleet for a new viewer: {1e3 * (time.process_time() - begin):.1f} ms, {whole} bytes", flush=True)


async def measure_browser(seconds: float) -> None:
    binary = find_chromium()
    if binary is None:
        print("no Chromium on PATH: frames are not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        fleet = ScriptedFleet(*many_workers(WORKERS))
        fleet.report_all(1)
        access = prepare(Path(folder), "127.0.0.1", 0)
        own = Frontend(frontend_id="f", epoch=1, address="127.0.0.1:1", model="m")
        feed = FleetFeed(fleet, ScriptedFrontends(), {"frontend": "f", "model": "m"})
        frontends = ConsoleFrontends(FrontendWatch(("127.0.0.1:1",)), own)

        async def report() -> None:
            for at_s in range(2, 10_000):
                await asyncio.sleep(1)
                fleet.report_all(at_s)

        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(BackgroundTasks())
            tasks.start(feed.run(), "feed")
            tasks.start(report(), "reports")
            console = Console(ConsoleKeys(access.keys), feed, frontends, None)
            port = await stack.enter_async_context(console.listening("127.0.0.1", 0))
            browser = await stack.enter_async_context(chromium(binary, Path(folder) / "profile"))
            page = await stack.enter_async_context(browser.page())
            await page.size(1440, 860)
            await page.open(f"http://127.0.0.1:{port}/")
            await page.until("document.activeElement?.id === 'key'")
            await page.type(key_of(access.keys))
            await page.press("Enter")
            await page.until("document.querySelector('.bar .quiet')?.textContent === '1000 workers'")
            await page.send("Performance.enable")
            before = await metrics(page)
            gaps = sorted(await page.value(FRAMES.replace("SECONDS", str(seconds))))
            after = await metrics(page)
            used = {name: 100 * (after[name] - before[name]) / seconds for name in PARTS}
            print(
                "its main thread, in % of a core: "
                + ", ".join(f"{what} {used[name]:.1f}" for name, what in PARTS.items()),
            )
            late = sum(gap > 50 for gap in gaps)
            print(
                f"{WORKERS} workers in Chromium, all changing each second, scrolling for {seconds:g} s: "
                f"{len(gaps) / seconds:.0f} frames/s, p50 {statistics.median(gaps):.1f} ms, "
                f"p99 {gaps[int(len(gaps) * 0.99)]:.1f} ms, longest {gaps[-1]:.1f} ms, {late} over 50 ms"
            )


async def metrics(page: Page) -> dict[str, float]:
    found = await page.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in found["metrics"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", choices=("frontend", "snapshots", "browser"))
    parser.add_argument("--view", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.view is not None:
        asyncio.run(viewer(asked.view, sys.stdin.readline().strip()))
        return
    if asked.only in (None, "snapshots"):
        measure_snapshots()
    if asked.only in (None, "browser"):
        asyncio.run(measure_browser(asked.seconds))
    if asked.only in (None, "frontend"):
        asyncio.run(measure_frontend(asked.seconds, asked.rounds, asked.pairs))


if __name__ == "__main__":
    main()
