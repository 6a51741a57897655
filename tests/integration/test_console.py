"""The console in a real Chromium: of a cluster of simulated engines, and of a scripted fleet of 1,000 workers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tandem_frontend.console.access import ConsoleKeys
from tandem_frontend.console.feed import FleetFeed
from tandem_frontend.console.frontends import ConsoleFrontends
from tandem_frontend.console.server import Console

from tandem.cli.console_access import key_of, prepare
from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.local_cluster.cluster import LocalCluster
from tandem.service.background import BackgroundTasks
from tests.integration.conftest import running
from tests.integration.support.chromium import CTRL, Chromium, Page, chromium, find_chromium
from tests.unit.support.scripted_fleet import ScriptedFleet, ScriptedFrontends, many_workers

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

HOSTILE = '<img src=x onerror="window.harm=1"><script>window.harm=1</script>\'"&\u202e'
WORKERS = 1_000
HIT = "document.querySelectorAll('img, iframe, object, embed, body script, [onerror], a[href^=javascript]').length"
NAMES = "[...document.querySelectorAll('[aria-label=Workers] td.name')].map(cell => cell.textContent)"
ACTIVE = "document.querySelector('tr[aria-selected=true] .name')?.textContent"
COUNT = "document.querySelector('.bar .quiet').textContent"
"""Of the workers in view."""
LEG_STATES = """
  window.states = [];
  const note = () => {
    for (const [index, leg] of [...document.querySelectorAll('.path li')].entries()) {
      const state = [index, leg.querySelector('.worker').textContent, leg.dataset.state].join(' ');
      if (!window.states.includes(state)) window.states.push(state);
    }
  };
  new MutationObserver(note).observe(document.querySelector('.path ol'), {subtree: true, attributes: true});
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chromium]:
    binary = find_chromium()
    if binary is None:
        cannot_have_one = "TANDEM_TEST_NO_CHROMIUM" in os.environ
        assert cannot_have_one or not os.environ.get("CI"), "no Chromium on PATH: .ci/run installs it"
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    async with chromium(binary, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """One of two processes of the frontend serves the console; either may serve a request.

    Depends on the browser, so that no cluster starts for tests that are skipped.
    """
    folder = tmp_path_factory.mktemp("console")
    access = prepare(folder, "127.0.0.1", 0)
    spec: dict[str, Any] = {
        "console_port": access.port,
        "console_keys": access.keys,
        "decode": 2,
        "frontend_processes": 2,
    }
    slow = {"engine-extra": '{"decode_step_s": 0.02}'}
    async with running(folder, engine="simulated", worker_flags=slow, **spec) as started:
        yield started


@asynccontextmanager
async def opened(browser: Chromium, base: str, key: str, view: str = "fleet") -> AsyncIterator[Page]:
    """A tab that has signed in, by keyboard, and shows a view. Nothing may go wrong in it, nor come from elsewhere."""
    async with browser.page() as page:
        await page.size(1440, 860)
        await page.open(f"{base}/#/{view}")
        await page.until("document.activeElement?.id === 'key'")
        await page.type(key)
        await page.press("Enter")
        await page.until(f"document.querySelector('section.{view}')")
        yield page
        assert page.problems == []
        assert [address for address in page.addresses if not address.startswith((f"{base}/", "about:"))] == []
        assert [address for address in page.addresses if key in address] == []


@asynccontextmanager
async def cluster_page(browser: Chromium, cluster: LocalCluster, view: str = "fleet") -> AsyncIterator[Page]:
    keys = cluster.spec.console_keys
    assert keys is not None
    async with opened(browser, f"http://127.0.0.1:{cluster.spec.console_port}", key_of(keys), view) as page:
        yield page


@asynccontextmanager
async def scripted(
    fleet: ScriptedFleet, folder: Path, head: str = "tandem-demo", port: int = 0
) -> AsyncIterator[tuple[str, str]]:
    """Address and key of a console of that fleet."""
    access = prepare(folder, "127.0.0.1", 0)
    own = Frontend(frontend_id="f", epoch=1, address="127.0.0.1:1", model=head)
    feed = FleetFeed(fleet, ScriptedFrontends(), {"frontend": "f", "model": head})
    console = Console(ConsoleKeys(access.keys), feed, ConsoleFrontends(FrontendWatch(("127.0.0.1:1",)), own), None)
    async with AsyncExitStack() as stack:
        (await stack.enter_async_context(BackgroundTasks())).start(feed.run(), "feed")
        bound = await stack.enter_async_context(console.listening("127.0.0.1", port))
        yield f"http://127.0.0.1:{bound}", key_of(access.keys)


async def test_page_with_a_wrong_key_shows_nothing_and_with_the_right_one_the_fleet(
    browser: Chromium, cluster: LocalCluster
) -> None:
    keys = cluster.spec.console_keys
    assert keys is not None
    async with browser.page() as page:
        await page.open(f"http://127.0.0.1:{cluster.spec.console_port}/")
        await page.until("document.activeElement?.id === 'key'")
        await page.type("not-the-key-of-this-console")
        await page.press("Enter")
        assert await page.until("document.querySelector('#refusal').textContent") == "This key is not accepted."
        assert await page.value("[sessionStorage.length, document.querySelector('header').hidden]") == [0, True]
    async with cluster_page(browser, cluster) as page:
        await page.until("document.querySelectorAll('[aria-label=Workers] tbody tr[role=row]').length === 3")
        await page.until("document.querySelector('.figures dd').textContent === '3/3'")
        assert await page.text("#connection") == "live"
        names = await page.value(NAMES)
        assert names == ["decode-0", "decode-1", "prefill-0"]
        for strange in ("constructor", "__proto__"):
            await page.value("location.hash = '#/playground'")
            await page.until("document.querySelector('section.playground')")
            await page.value(f"location.hash = '#/{strange}'")
            await page.until("document.querySelector('section.fleet')")
        await page.value("document.querySelector('#leave').click()")
        assert await page.value("[sessionStorage.length, document.querySelectorAll('td').length]") == [0, 0]
        assert await page.value("[location.href, document.cookie].join().includes('key')") is False


async def test_playground_streams_a_chat_and_shows_both_legs_and_their_timeline(
    browser: Chromium, cluster: LocalCluster
) -> None:
    async with cluster_page(browser, cluster, "playground") as page:
        await page.value(LEG_STATES)
        await page.until("document.activeElement?.tagName === 'TEXTAREA'")
        await page.type(HOSTILE)
        await page.press("Enter", CTRL)
        await page.until("document.querySelector('.playground .timeline .lines')")
        states = await page.value("window.states")
        decode = next(state.split()[1] for state in states if state.startswith("2 decode-"))
        for expected in ("1 prefill-0 active", "1 prefill-0 done", f"2 {decode} active", f"2 {decode} done"):
            assert expected in states, states
        assert await page.text(".entry.user .said") == HOSTILE
        assert len(await page.text(".entry.assistant .said")) > 20
        timeline = await page.text(".playground .timeline")
        for part in (
            "chosen by",
            "prefill leg accepted by prefill-0",
            f"decode leg accepted by {decode}",
            "KV transfer",
        ):
            assert part in timeline
        assert await page.value(HIT) == 0
        assert await page.value("window.harm") is None

        identity = await page.text(".playground .timeline .id")
        await page.value("location.hash = '#/requests'")
        await page.until("document.querySelector('.requests td.name')")
        listed = await page.value("[...document.querySelectorAll('.requests td.name')].map(cell => cell.textContent)")
        assert identity in listed
        await page.value("document.querySelector('.requests .grid').focus()")
        await page.press("ArrowDown")
        await page.press("Enter")
        await page.until("location.hash.length > '#/requests/'.length && document.querySelector('.requests .timeline')")


async def test_playground_stopped_by_escape_cancels_the_request(browser: Chromium, cluster: LocalCluster) -> None:
    async with cluster_page(browser, cluster, "playground") as page:
        await page.until("document.activeElement?.tagName === 'TEXTAREA'")
        await page.value("document.querySelector('[aria-label^=Maximum]').value = '1500'")
        await page.type("Once upon a time")
        await page.press("Enter", CTRL)
        await page.until("document.querySelector('.entry.assistant .said').textContent.length > 10")
        await page.press("Escape")
        await page.until("document.querySelector('.path').textContent.includes('stopped')")
        await page.value("location.hash = '#/requests'")
        await page.until("document.querySelector('.requests td.outcome')?.textContent === 'cancelled'")


async def test_page_of_a_thousand_workers_keeps_few_rows_and_goes_to_any_by_keyboard(
    browser: Chromium, tmp_path: Path
) -> None:
    fleet = ScriptedFleet(*many_workers(WORKERS))
    fleet.report_all(1)
    async with scripted(fleet, tmp_path) as (base, key), opened(browser, base, key) as page:
        await page.until(f"{COUNT} === '1000 workers'")
        fleet.report_all(2)
        await page.until(
            "[...document.querySelectorAll('[aria-label=Workers] td:nth-child(11)')].some(c => c.textContent > '0')"
        )
        assert await page.value("document.querySelectorAll('tr').length") < 80
        assert (
            await page.value("document.querySelector('table[aria-label=Workers]').getAttribute('aria-rowcount')")
            == "1001"
        )

        await page.value("document.querySelector('.split .grid').focus()")
        await page.press("End")
        await page.until(f"{ACTIVE} === 'prefill-499'")
        await page.press("Enter")
        assert "10.0.3.248:50051" in await page.text("aside")
        width = await page.value("document.querySelector('tr[aria-selected=true] .name').getBoundingClientRect().width")
        assert width >= 140, "the name is seen beside the worker's facts"
        await page.press("Home")
        await page.until(f"{ACTIVE} === 'decode-0'")
        await page.press("ArrowDown")
        await page.until(f"{ACTIVE} === 'decode-1'")

        await page.press("/")
        await page.until("document.activeElement?.type === 'search'")
        await page.type("prefill-41")
        await page.until(f"{COUNT} === '11 of 1000 workers'")
        await page.value("document.querySelector('[aria-label=Workers] th button').focus()")
        await page.press("Enter")
        await page.until("document.querySelector('[aria-label=Workers] tbody .name').textContent === 'prefill-419'")


async def test_page_shows_hostile_names_and_models_as_text(browser: Chromium, tmp_path: Path) -> None:
    first, second = many_workers(2)
    fleet = ScriptedFleet(
        replace(first, worker_id=HOSTILE, address=HOSTILE),
        replace(second, worker_id="x" * 5_000, capabilities=replace(second.capabilities, model=HOSTILE)),
    )
    async with scripted(fleet, tmp_path, head=HOSTILE) as (base, key), opened(browser, base, key) as page:
        await page.until("document.querySelectorAll('[aria-label=Workers] td.name').length === 2")
        names = await page.value(NAMES)
        assert names == [HOSTILE, "x" * 5_000]
        await page.value("document.querySelector('[aria-label=Workers] td.name').click()")
        assert HOSTILE in await page.text("aside")
        assert HOSTILE in await page.text("#where")
        assert await page.value(HIT) == 0
        assert await page.value("window.harm") is None
        assert await page.value("document.documentElement.scrollWidth <= innerWidth"), "a long name moves nothing"


async def test_page_follows_the_users_preference_for_dark_or_light(browser: Chromium, tmp_path: Path) -> None:
    async with (
        scripted(ScriptedFleet(*many_workers(2)), tmp_path) as (base, key),
        opened(browser, base, key) as page,
    ):
        brightness: dict[str, list[int]] = {}
        for scheme in ("light", "dark"):
            await page.prefer(scheme)
            brightness[scheme] = await page.value(
                "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name].match(/[0-9]+/g)"
                ".slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
            )
        assert brightness["light"][0] > 600 > 300 > brightness["light"][1]
        assert brightness["dark"][1] > 500 > 150 > brightness["dark"][0]


async def test_page_whose_console_ends_says_so_and_follows_the_next_one(browser: Chromium, tmp_path: Path) -> None:
    async with browser.page() as page:
        async with scripted(ScriptedFleet(*many_workers(2)), tmp_path) as (base, key):
            await page.open(base)
            await page.until("document.activeElement?.id === 'key'")
            await page.type(key)
            await page.press("Enter")
            await page.until("document.querySelector('#connection').textContent === 'live'")
        await page.until("document.querySelector('#connection').textContent === 'reconnecting'")
        assert await page.value(NAMES) == ["decode-0", "prefill-0"], "what was known last stays"
        port = int(base.rpartition(":")[2])
        async with scripted(ScriptedFleet(*many_workers(4)), tmp_path, port=port):
            await page.until("document.querySelector('#connection').textContent === 'live'")
            assert await page.value(NAMES) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
