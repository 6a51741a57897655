"""`tandem top`: the screen under Textual's own pilot, before a cluster of simulated engines; and its plain forms."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tandem.api.admin.v1.admin_service_pb2 import WatchFiguresResponse
from tandem.api.worker.v1.worker_service_pb2 import WatchLoadResponse
from tandem.cli.top.poller import FleetWatch
from tandem.cli.top.screen import FleetTable, TopScreen
from tandem.client import calls
from tandem.errors import StartError, TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.observability.fleet_sample import FrontendSample, Sample, WorkerSample
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, run

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

SLOW = {"engine-extra": '{"decode_step_s": 0.01}'}
INTERVAL_S = 0.2


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("top")
    many = {"decode": 2, "frontends": 2}
    async with running(logs, engine="simulated", worker_flags=SLOW, **many) as started:
        yield started


@asynccontextmanager
async def load(cluster: LocalCluster, count: int = 6) -> AsyncIterator[None]:
    """Streams at the first frontend, one after the other, `count` at a time."""

    async def client() -> None:
        while True:
            try:
                await generate(cluster, request_of("Once upon a time", max_tokens=60))
            except TandemError:
                await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(client()) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def row_of(table: FleetTable[Any], name: str) -> dict[str, str]:
    """The cells of a process, by their heads; empty while it is not shown."""
    if name not in {key.value for key in table.rows}:
        return {}
    heads = [str(column.label).rstrip(" ↑↓") for column in table.ordered_columns]
    return dict(zip(heads, map(str, table.get_row(name)), strict=True))


async def until(app: TopScreen, table: FleetTable[Any], name: str, **wanted: Any) -> None:
    """Wait until cells of a process are as wanted: a text, or whatever a function says of it."""

    async def now() -> dict[str, str]:
        return row_of(table, name)

    def fits(cells: dict[str, str]) -> bool:
        return bool(cells) and all(
            check(cells[head]) if callable(check) else cells[head] == check for head, check in wanted.items()
        )

    await assert_eventually(now, fits, within_s=20, every_s=0.05, what=f"{name} as wanted")


def positive(text: str) -> bool:
    return text not in ("0", "-", "?", "0.0")


async def test_values_move_and_a_killed_worker_is_gone(cluster: LocalCluster) -> None:
    async with FleetWatch([cluster.registry.address], INTERVAL_S).following() as watch:
        app = TopScreen(watch.sample, INTERVAL_S)
        async with app.run_test(size=(150, 30)) as pilot:
            workers, frontends = app.worker_table, app.frontend_table
            await until(app, workers, "decode-1", STATE="serving", HEALTH="ok", RUN="0")
            await until(app, frontends, "frontend-0", STATE="serving", OPEN="0", **{"TTFT p50": "-"})
            before = row_of(frontends, "frontend-0")["DONE"]
            async with load(cluster):
                await until(
                    app, frontends, "frontend-0",
                    OPEN=positive, DONE=lambda text: text != before, **{"TTFT p99": positive, "ITL p50": positive},
                )  # fmt: skip
                for name in ("decode-0", "decode-1"):
                    await until(app, workers, name, **{"RUN": positive, "TOK/S": positive})
                await until(app, workers, "prefill-0", **{"KV B/S": positive, "TOK/S": positive})
                killed = cluster.process("decode-1")
                killed.signal(signal.SIGKILL)
                await killed.wait_ended()
                await until(app, workers, "decode-1", STATE="unreachable", RUN="-", HEALTH="-", FAIL=positive)
                await until(app, frontends, "frontend-0", CONT=positive)
                # Its lease is over.
                await until(app, workers, "decode-1", STATE="gone")
                await cluster.restart("decode-1")
                await until(app, workers, "decode-1", STATE="serving", HEALTH="ok", RUN=positive)
            shown = str(app.query_one("#totals").render())
            assert "3/3 workers" in shown
            await pilot.press("q")
        assert app.return_code == 0


async def test_it_outlives_the_registry(cluster: LocalCluster) -> None:
    async with FleetWatch([cluster.registry.address], INTERVAL_S).following() as watch:
        app = TopScreen(watch.sample, INTERVAL_S)
        async with app.run_test(size=(150, 30)):
            problem = app.query_one("#problem")
            await until(app, app.worker_table, "decode-0", STATE="serving")
            assert not problem.display

            async def is_shown() -> bool:
                return problem.display

            cluster.registry.signal(signal.SIGKILL)
            await cluster.registry.wait_ended()
            await assert_eventually(is_shown, within_s=10, what="a registry that does not answer")
            assert "no registry reachable" in str(problem.render())
            assert row_of(app.worker_table, "decode-0")["STATE"] == "serving"
            await generate(cluster, request_of("Once", max_tokens=2))
            await cluster.restart(cluster.registry.name)
            await assert_eventually(is_shown, lambda shown: not shown, within_s=15, what="a registry that answers")
            await until(app, app.worker_table, "decode-0", STATE="serving")
            await until(app, app.frontend_table, "frontend-1", STATE="serving")


async def test_keys_sort_and_hold_the_screen_and_it_resizes(cluster: LocalCluster) -> None:
    async with FleetWatch([cluster.registry.address], INTERVAL_S).following() as watch:
        app = TopScreen(watch.sample, INTERVAL_S)
        async with app.run_test(size=(150, 30)) as pilot:
            table = app.worker_table
            for worker in ("decode-0", "decode-1", "prefill-0"):
                await until(app, table, worker, STATE="serving")

            def order() -> list[str]:
                return [str(table.get_row_at(row)[0]) for row in range(table.row_count)]

            assert order() == ["decode-0", "decode-1", "prefill-0"]
            await pilot.press("r")
            assert order() == ["prefill-0", "decode-1", "decode-0"]
            await pilot.press("s")
            assert "ROLE ↓" in [str(column.label) for column in table.ordered_columns]
            await pilot.press("S", "r")
            assert order() == ["decode-0", "decode-1", "prefill-0"]
            await pilot.press("down", "down")
            await asyncio.sleep(3 * INTERVAL_S)
            assert table.cursor_row == 2, "the cursor stays on its process"
            await pilot.press("t", "r")
            heads = [str(column.label) for column in app.frontend_table.ordered_columns]
            assert "FRONTEND ↓" in heads, "the other table is sorted now"
            assert order() == ["decode-0", "decode-1", "prefill-0"]
            await pilot.press("p")
            at = str(app.query_one("#totals").render())
            assert "paused" in at
            await asyncio.sleep(1.2)
            assert str(app.query_one("#totals").render()) == at
            await pilot.press("p")
            for size in ((40, 10), (200, 60)):
                await pilot.resize_terminal(*size)
                await pilot.pause(2 * INTERVAL_S)
                assert app.size == size
                assert table.row_count == 3
            svg = app.export_screenshot()
            assert "decode-1" in svg
            for key in ("Quit", "Sort", "Reverse", "Pause"):
                assert key in svg


def crowded() -> Sample:
    """Workers and frontends with names as an orchestrator gives them, and the longest texts of every column."""
    load = WatchLoadResponse(
        running_requests=256, waiting_requests=1_024, waiting_tokens=123_456, kv_capacity_tokens=100,
        kv_used_tokens=100, kv_cached_tokens=0, kv_free_tokens=0, prompt_tokens=10, cached_tokens=10,
    )  # fmt: skip
    workers = tuple(
        WorkerSample(
            name=f"tandem-inference-{role}-7c9d8f6b5-x2k4{number}", role=role, epoch=1, address="a:1", state=state,
            health="not serving", load=None if state == "unreachable" else load, failures=12_345,
        )
        for number, (role, state) in enumerate(product(("prefill", "aggregated"), ("serving", "unreachable")))
    )  # fmt: skip
    stats = WatchFiguresResponse(open_requests=250, waiting_requests=1_000, finished_requests=10**7)
    frontends = tuple(
        FrontendSample(
            name=f"tandem-inference-frontend-7c9d8f6b5-x2k4{number}", epoch=1, address="a:1", state="serving",
            health="ok", stats=stats,
        )
        for number in range(2)
    )  # fmt: skip
    return Sample(time_s=1.0, workers=workers, frontends=frontends)


async def test_at_80_columns_nothing_that_matters_is_cut_off() -> None:
    app = TopScreen(crowded, INTERVAL_S)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause(2 * INTERVAL_S)
        for table, heads in (
            (app.worker_table, {"WORKER", "ROLE", "STATE", "RUN", "WAIT", "KV U/C/F %", "TOK/S", "FAIL"}),
            (app.frontend_table, {"FRONTEND", "STATE", "OPEN", "WAIT", "TTFT p99", "ITL p99", "FAIL"}),
        ):
            columns = table.ordered_columns
            assert sum(column.get_render_width(table) for column in columns) <= 80
            assert {str(column.label).rstrip(" ↑↓") for column in columns} >= heads
            names = [str(table.get_row_at(row)[0]) for row in range(table.row_count)]
            assert len(set(names)) == table.row_count, names
            assert all(name.startswith("tandem-") and name[-5:-1] == "x2k4" for name in names), names
        assert "columns hidden" in str(app.query_one("#totals").render())
        assert "HIT %" in app.worker_table.hidden
        for _ in range(8):
            await pilot.press("s")
        assert "HIT %" not in app.worker_table.hidden, "what the rows are sorted by is shown"
        await pilot.resize_terminal(220, 24)
        await pilot.pause(2 * INTERVAL_S)
        assert not app.worker_table.hidden
        assert str(app.worker_table.get_row_at(0)[0]).startswith("tandem-inference-")
        assert "hidden" not in str(app.query_one("#totals").render())


async def test_once_prints_tables_for_scripts(cluster: LocalCluster, tmp_path: Path) -> None:
    registry, state = cluster.registry.address, tmp_path / "none.json"
    async with load(cluster, 4):
        await asyncio.sleep(1)
        for arguments in (["--once"], []):
            status, out, err = await run(*TANDEM, "top", "--address", registry, *arguments, state=state)
            assert (status, err) == (0, "")
            head, workers, frontends = out.split("\n\n")
            assert head.startswith("3/3 workers · ")
            rows = {line.split()[0]: line.split() for line in workers.splitlines()}
            assert list(rows) == ["WORKER", "decode-0", "decode-1", "prefill-0"]
            assert rows["prefill-0"][1:4] == ["prefill", "serving", "ok"]
            assert float(rows["decode-0"][10].rstrip("kM")) + float(rows["decode-1"][10].rstrip("kM")) > 50, workers
            rows = {line.split()[0]: line.split() for line in frontends.splitlines()}
            assert list(rows) == ["FRONTEND", "frontend-0", "frontend-1"]
            assert int(rows["frontend-0"][3]) > 0
            assert float(rows["frontend-0"][8]) >= 9, "an ITL below the length of a step"
        status, out, err = await run(*TANDEM, "top", "--address", registry, "--once", "--json", state=state)
        assert (status, err) == (0, "")
        document = json.loads(out)
        assert {row["worker_id"] for row in document["workers"]} == {"decode-0", "decode-1", "prefill-0"}
        assert document["frontends"][0]["figures"]["open_requests"] > 0
        assert document["registry_problem"] is None


async def test_lines_of_json_go_on(cluster: LocalCluster, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *TANDEM, "top", "--json", "--interval", "0.3", "--address", cluster.registry.address,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    times = [json.loads(await process.stdout.readline())["time_s"] for _ in range(3)]
    assert times == sorted(set(times))
    process.kill()
    await process.wait()


async def test_what_is_no_registry_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    for address, words in ((cluster.frontend.address, "is not a Tandem registry"), ("127.0.0.1:1", "UNAVAILABLE")):
        status, out, err = await run(*TANDEM, "top", "--address", address, "--once", state=tmp_path / "none.json")
        assert (status, out) == (1, "")
        assert words in err
        assert len(err.strip().splitlines()) == 1
    with pytest.raises(StartError):
        async with FleetWatch([cluster.frontend.address], INTERVAL_S).following():
            pass


async def test_clients_leave_nothing_open(cluster: LocalCluster) -> None:
    """A watch that has ended has closed its streams."""
    before = (await calls.process_figures(cluster.process("decode-0").address)).open_calls

    async def open_calls() -> int:
        return (await calls.process_figures(cluster.process("decode-0").address)).open_calls

    async with FleetWatch([cluster.registry.address], INTERVAL_S).following():
        await assert_eventually(open_calls, lambda count: count > before, within_s=5, what="a stream of load")
    await assert_eventually(open_calls, lambda count: count == before, within_s=5, what="no stream of load")
