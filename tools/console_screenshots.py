"""Renders docs/images/console-*.png: the console of a small cluster under load, in a real Chromium without a window.

    python tools/console_screenshots.py                       write them; starts four engines on the CPU
    python tools/console_screenshots.py --engine simulated    with texts that mean nothing, within seconds

The playground in dark, the others in light: both are looked at whenever the pictures are made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tandem.cli.console_access import key_of, prepare
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tests.integration.support.chromium import CTRL, Page, chromium, find_chromium

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SIZE = (1280, 800)
FLEET_SIZE = (1280, 360)
REQUEST_SIZE = (1280, 960)
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"
STORY = "Once upon a time"
CLIENTS = 4
LOAD_S = 20.0
SLOW_STEP = {"engine-extra": '{"decode_step_s": 0.02}'}


@asynccontextmanager
async def load(edge: str) -> AsyncIterator[None]:
    """Chats over HTTP, some at a time, so that timelines begin at the edge."""
    draw = random.Random(7)

    async def chat(client: httpx.AsyncClient) -> None:
        while True:
            messages = [{"role": "user", "content": f"{STORY} there were {draw.randint(2, 99)} cats. " * 6}]
            body = {"model": "tandem-demo", "messages": messages, "max_tokens": draw.randint(30, 120)}
            with contextlib.suppress(httpx.HTTPError):
                await client.post("/v1/chat/completions", json=body)

    async with httpx.AsyncClient(base_url=f"http://{edge}", timeout=60) as client:
        tasks = [asyncio.create_task(chat(client)) for _ in range(CLIENTS)]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def sign_in(page: Page, base: str, key: str, scheme: str) -> None:
    await page.size(*SIZE)
    await page.prefer(scheme)
    await page.open(f"{base}/#/fleet")
    await page.until("document.activeElement?.id === 'key'")
    await page.type(key)
    await page.press("Enter")
    await page.until("document.querySelectorAll('.split td.name').length > 2")


async def draw_playground(page: Page, file: Path) -> None:
    await page.value("location.hash = '#/playground'")
    await page.until("document.activeElement?.tagName === 'TEXTAREA'")
    await page.type(QUESTION)
    await page.press("Enter", CTRL)
    await page.until("document.querySelector('.playground .timeline .lines')")
    # The pointer and the focus are no part of the picture.
    await page.value("document.activeElement.blur()")
    await page.picture(file)


async def draw_request(page: Page, file: Path) -> None:
    await page.value("location.hash = '#/requests'")
    await page.until(
        "[...document.querySelectorAll('.requests td.outcome')].some(cell => cell.textContent === 'finished')"
    )
    await page.value(
        "[...document.querySelectorAll('.requests tr[role=row]')]"
        ".find(row => row.querySelector('.outcome').textContent === 'finished').click()"
    )
    await page.until("document.querySelector('.requests .timeline')")
    await page.value("[...document.querySelectorAll('.zoom button')].at(-1)?.click()")
    await page.value("document.activeElement.blur()")
    await page.picture(file)


async def draw(engine: str) -> None:
    binary = find_chromium()
    if binary is None:
        raise SystemExit("no Chromium on PATH: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        access = prepare(Path(folder), "127.0.0.1", 0)
        spec = ClusterSpec(
            model=ROOT / "models" / "tandem-demo", log_directory=Path(folder), engine=engine, prefill=2, decode=2,
            edge=True, console_port=access.port, console_keys=access.keys,
            worker_flags=SLOW_STEP if engine == "simulated" else {},
        )  # fmt: skip
        base, key = f"http://127.0.0.1:{access.port}", key_of(access.keys)
        async with LocalCluster(spec) as cluster, chromium(binary, Path(folder) / "profile") as browser:
            assert cluster.edge is not None
            async with browser.page() as page:
                await sign_in(page, base, key, "light")
                async with load(cluster.edge.address):
                    await page.size(*FLEET_SIZE)
                    await asyncio.sleep(LOAD_S)
                    await page.picture(IMAGES / "console-fleet.png")
                await page.size(*REQUEST_SIZE)
                await draw_request(page, IMAGES / "console-request.png")
            async with browser.page() as page:
                await sign_in(page, base, key, "dark")
                await draw_playground(page, IMAGES / "console-playground.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="sglang", choices=("sglang", "simulated"))
    asyncio.run(draw(parser.parse_args().engine))


if __name__ == "__main__":
    main()
