"""A process of a local cluster that dies: said in one line, started again, and the end when nothing can serve."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

import pytest

from tandem.errors import TandemError
from tandem.local_cluster.restarts import Restarts
from tandem.service.restart_budget import RestartPolicy
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import (
    STARTS_WITHIN_S,
    TANDEM,
    child_of,
    children_of,
    cluster_up,
    environment,
    gone,
    line_with,
    output_of,
    run,
    state_of,
    wait_state,
)

# Up to seven processes are started one after the other, each within a bound of its own.
pytestmark = pytest.mark.timeout(300)


async def test_a_dead_worker_is_reported_and_started_again(state: Path) -> None:
    async with cluster_up(state, "--no-edge") as up:
        log = Path(state_of(state)["log"]) / "decode-0.log"
        child_of(up, "tandem_decode").kill()
        line = await line_with(up, "decode-0 was")
        said, _, rest = line.partition("; log: ")
        assert said == "decode-0 was killed by signal 9"
        assert rest.endswith("; restarting in 1 s")
        assert Path(rest.partition(";")[0]).resolve() == log.resolve()
        line = await line_with(up, "decode-0 is ready again")
        assert re.fullmatch(r"decode-0 is ready again at \S+ \(pid \d+\)", line)

        async def answer() -> tuple[int | None, str, str]:
            return await run(*TANDEM, "generate", "x", "--max-tokens", "2", state=state)

        await assert_eventually(answer, lambda found: found[0] == 0, within_s=STARTS_WITHIN_S, what="an answer")
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0


async def test_registry_frontend_and_edge_come_back_where_they_were(state: Path) -> None:
    async with cluster_up(state) as up:
        addresses = state_of(state)
        for module, key in (("tandem_registry", "registry"), ("tandem_frontend", "frontend"), ("tandem_edge", "http")):
            child_of(up, module).kill()
            await line_with(up, "was killed by signal 9")
            assert f"is ready again at {addresses[key]} " in await line_with(up, "is ready again")
        up.send_signal(signal.SIGINT)
        shown = await output_of(up)
        assert await up.wait() == 0, shown


async def test_the_cause_is_never_a_line_that_only_informs(tmp_path: Path) -> None:
    async with running(tmp_path, engine="simulated") as cluster:
        process = cluster.process("decode-0")
        process.signal(signal.SIGTERM)
        await process.wait_ended()
        assert '"level": "INFO"' in process.log.read_text()
        assert process.exit_summary() == f"decode-0 ended with status 0; log: {process.log}"
        with process.log.open("a") as log:
            log.write("2026-01-01 00:00:00,000 ERROR tandem.x the engine has died\n")
            log.write("2026-01-01 00:00:00,001 INFO tandem.x leaving\n")
        assert process.last_words() == "the engine has died"
        with process.log.open("a") as log:
            log.write('{"time": "2026", "level": "ERROR", "logger": "tandem.x", "message": "no \\"memory\\""}\n')
            log.write('{"time": "2026", "level": "INFO", "logger": "tandem.x", "message": "leaving"}\n')
        assert process.last_words() == 'no "memory"'
        # It is no cause of a clean end, however long ago it was.
        assert process.exit_summary() == f"decode-0 ended with status 0; log: {process.log}"


async def test_it_goes_on_with_what_is_left_and_ends_when_nothing_can_serve(tmp_path: Path) -> None:
    lines: list[str] = []
    policy = RestartPolicy(count_max=1, first_delay_s=0.01)
    flags = {"registry": {"lease-ttl-s": "1"}}
    async with running(tmp_path, engine="simulated", decode=2, role_flags=flags) as cluster:
        restarts = asyncio.create_task(Restarts(cluster, lines.append, policy).run())

        async def route() -> str:
            try:
                return (await generate(cluster, request_of("Hi"))).finish.route.decode_worker_id
            except TandemError as problem:
                return str(problem)

        async def dies(name: str, words: str) -> None:
            cluster.process(name).kill()
            await assert_eventually(
                lambda: lines[-1:], lambda last: words in str(last), within_s=STARTS_WITHIN_S, what=words
            )

        await dies("decode-0", "decode-0 is ready again")
        await dies("decode-0", "giving up after 1 restarts")
        await assert_eventually(route, lambda found: found == "decode-1", within_s=20, what="an answer of decode-1")
        assert not restarts.done()
        await dies("decode-1", "decode-1 is ready again")
        await dies("decode-1", "giving up after 1 restarts")
        async with asyncio.timeout(5):
            await restarts


async def test_up_ends_with_status_1_when_nothing_can_serve(state: Path, tmp_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from rich.console import Console
from tandem.cli.up import up
from tandem.local_cluster.cluster import ClusterSpec
from tandem.service.restart_budget import RestartPolicy
spec = ClusterSpec(model=Path({str(DEMO_MODEL)!r}), engine="simulated")
raise SystemExit(asyncio.run(up(spec, Console(), RestartPolicy(count_max=0))))
"""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", program], stdout=asyncio.subprocess.PIPE, env=environment(state)
    )
    await wait_state(process, state, "serving")
    children = children_of(process)
    child_of(process, "tandem_decode").kill()
    assert (await line_with(process, "decode-0 was killed by signal 9")).endswith("; giving up after 0 restarts")
    await line_with(process, "stopping: the cluster can no longer serve requests")
    assert await process.wait() == 1
    await gone(children, 1)
    assert not state.exists()
