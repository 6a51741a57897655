"""Renders docs/images/top.svg: `tandem top` on a simulated cluster under load, after one decode worker was killed.

    python tools/top_screenshot.py            write it

The picture is Textual's own export of the screen, taken once the fault is visible.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import tempfile
from pathlib import Path

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1.sampling_pb2 import Stopping
from tandem.cli.top.poller import FleetWatch
from tandem.cli.top.screen import TopScreen
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "top.svg"
SIZE = (150, 18)
CLIENTS = 12
STOPPING = Stopping(max_tokens=150, ignore_eos=True)
LOAD_S, AFTER_KILL_S = 12.0, 3.5


async def client(address: str, number: int) -> None:
    """Run streams one after another, until cancelled."""
    while True:
        request = pb.GenerateRequest(prompt=f"Once upon a time there were {number} cats. " * 8, stopping=STOPPING)
        with contextlib.suppress(TandemError):
            async for _ in calls.generate(address, request):
                pass


async def shoot(cluster: LocalCluster) -> str:
    """The screen, while a killed worker is still listed."""
    async with FleetWatch([cluster.registry.address], 0.5).following() as watch:
        app = TopScreen(watch.sample, 0.5)
        async with app.run_test(size=SIZE):
            frontends = [frontend.address for frontend in cluster.frontends]
            tasks = [asyncio.create_task(client(frontends[n % len(frontends)], n)) for n in range(CLIENTS)]
            await asyncio.sleep(LOAD_S)
            cluster.process("decode-2").signal(signal.SIGKILL)
            await asyncio.sleep(AFTER_KILL_S)
            app.draw()
            await asyncio.sleep(0.2)
            picture = app.export_screenshot(simplify=True)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    return picture


async def main() -> int:
    with tempfile.TemporaryDirectory() as logs:
        spec = ClusterSpec(
            model=ROOT / "models" / "tandem-demo",
            log_directory=Path(logs),
            engine="simulated",
            prefill=2,
            decode=3,
            frontends=2,
            worker_flags={"engine-extra": '{"decode_step_s": 0.01}'},
        )
        async with LocalCluster(spec) as cluster:
            picture = await shoot(cluster)
    PICTURE.parent.mkdir(exist_ok=True)
    # Without the fonts it would fetch from elsewhere; a reader without a font of that name sees another monospaced one.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    PICTURE.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")
    print(f"{PICTURE.relative_to(ROOT)}: {len(picture):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
