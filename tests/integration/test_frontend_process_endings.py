"""How a frontend of several processes starts, is refused and ends, as its operator sees it: signals and sentences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.service import run_directory
from tandem.service.parent_death import VARIABLE
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import request_of
from tests.integration.support.command_line import STARTS_WITHIN_S, TANDEM, child_of, cluster_up, gone, run, state_of
from tests.integration.test_simulated_cluster import STORY, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

FRONTEND = [sys.executable, "-m", "tandem_frontend", "--model", str(DEMO_MODEL), "--processes", "2"]
ENDS_WITHIN_S = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    slow = {"engine-extra": json.dumps({"decode_step_s": 0.02})}
    async with running(tmp_path_factory.mktemp("workers"), engine="simulated", worker_flags=slow) as cluster:
        yield cluster


class Started:
    """A frontend of two processes, started by itself, in a group and with temporary files of its own."""

    def __init__(self, process: asyncio.subprocess.Process, announced: dict[str, Any], run_files: Path) -> None:
        self.process = process
        self.address: str = announced["address"]
        self.run_files = run_files
        self.children = psutil.Process(process.pid).children()

    async def stream(self, max_tokens: int) -> asyncio.Task[list[int]]:
        """A stream that has begun."""
        begun = asyncio.Event()

        async def read() -> list[int]:
            token_ids: list[int] = []
            request = request_of(STORY, max_tokens=max_tokens, ignore_eos=True)
            async for event in calls.generate(self.address, request, 60):
                begun.set()
                token_ids += event.chunk.token_ids
            return token_ids

        task = asyncio.create_task(read())
        await asyncio.wait({asyncio.ensure_future(begun.wait()), task}, return_when=asyncio.FIRST_COMPLETED)
        return task


@asynccontextmanager
async def started(cluster: LocalCluster, tmp_path: Path, *flags: str, **env: str) -> AsyncIterator[Started]:
    announce, run_files = tmp_path / "here.json", tmp_path / "run"
    run_files.mkdir()
    inherited = {key: value for key, value in os.environ.items() if key != VARIABLE}
    process = await asyncio.create_subprocess_exec(
        *FRONTEND,
        f"--registry={cluster.registry.address}",
        "--model-name=tandem-demo",
        f"--announce-file={announce}",
        "--drain-settle-s=0.1",
        *flags,
        start_new_session=True,
        env={**inherited, run_directory.VARIABLE: str(run_files), **env},
    )
    try:
        await assert_eventually(announce.exists, within_s=STARTS_WITHIN_S, what="a frontend that serves")
        yield Started(process, json.loads(announce.read_text()), run_files)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_an_interrupt_of_the_whole_group_drains(workers: LocalCluster, tmp_path: Path) -> None:
    """As Ctrl-C in a terminal: each process gets it, and the parent alone decides."""
    async with started(workers, tmp_path) as frontend:
        streams = [await frontend.stream(100) for _ in range(4)]
        os.killpg(frontend.process.pid, signal.SIGINT)
        assert [await stream for stream in streams] == [oracle(STORY, 100)] * 4
        assert await asyncio.wait_for(frontend.process.wait(), ENDS_WITHIN_S) == 0
        await gone(frontend.children, within_s=1)
        assert not list(frontend.run_files.iterdir())


async def test_a_second_signal_cuts_the_drain_short(workers: LocalCluster, tmp_path: Path) -> None:
    async with started(workers, tmp_path) as frontend:
        stream = await frontend.stream(1_000)
        os.killpg(frontend.process.pid, signal.SIGTERM)
        await assert_eventually(lambda: calls.is_serving(frontend.address), lambda serving: not serving)
        os.kill(frontend.process.pid, signal.SIGTERM)
        assert await asyncio.wait_for(frontend.process.wait(), ENDS_WITHIN_S) == 70
        await gone(frontend.children, within_s=2)
        assert isinstance((await asyncio.gather(stream, return_exceptions=True))[0], Exception)


async def test_processes_whose_parent_was_killed_finish_and_end(workers: LocalCluster, tmp_path: Path) -> None:
    async with started(workers, tmp_path) as frontend:
        stream = await frontend.stream(60)
        frontend.process.kill()
        assert await stream == oracle(STORY, 60)
        await gone(frontend.children, within_s=ENDS_WITHIN_S)
        assert not list(frontend.run_files.iterdir()), "the last of them removes what the parent would have"


async def test_while_the_parent_stands_still_what_is_connected_goes_on(workers: LocalCluster, tmp_path: Path) -> None:
    async with started(workers, tmp_path) as frontend, open_channel(frontend.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        models = pb.ListModelsRequest()
        assert (await stub.ListModels(models, timeout=5)).models
        stream = await frontend.stream(60)
        frontend.process.send_signal(signal.SIGSTOP)
        assert await stream == oracle(STORY, 60)
        assert (await stub.ListModels(models, timeout=5)).models, "calls on a connection that is there"
        with pytest.raises(TandemError):
            await calls.is_serving(frontend.address)
        frontend.process.send_signal(signal.SIGCONT)
        assert await calls.is_serving(frontend.address)


async def test_the_port_is_free_at_once_when_the_parent_was_killed(workers: LocalCluster, tmp_path: Path) -> None:
    async with started(workers, tmp_path) as frontend:
        frontend.process.kill()
        await frontend.process.wait()
        port = frontend.address.rpartition(":")[2]
        second = tmp_path / "second"
        second.mkdir()
        async with started(workers, second, f"--port={port}") as again:
            assert await calls.is_serving(again.address)


async def test_a_drain_that_takes_too_long_ends_with_status_1(workers: LocalCluster, tmp_path: Path) -> None:
    async with started(workers, tmp_path, "--drain-timeout-s=0.5") as frontend:
        stream = await frontend.stream(1_000)
        frontend.process.terminate()
        assert await asyncio.wait_for(frontend.process.wait(), ENDS_WITHIN_S) == 1
        assert isinstance((await asyncio.gather(stream, return_exceptions=True))[0], Exception)
        await gone(frontend.children, within_s=1)


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["--model=/nowhere"], 2, "model: there is no directory /nowhere"),
        (["--open-requests-max=1"], 2, "open_requests_max: must be at least 2, not 1"),
        (["--processes=0"], 2, "processes: "),
        (["--tls-cert=/no.pem", "--tls-key=/no.key", "--tls-ca=/no.ca"], 1, "/no"),
    ],
)
async def test_what_cannot_start_is_one_sentence(
    workers: LocalCluster, tmp_path: Path, flags: list[str], status: int, sentence: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *FRONTEND,
        f"--registry={workers.registry.address}",
        *flags,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, run_directory.VARIABLE: str(tmp_path)},
    )
    _, err = await process.communicate()
    said = [line for line in err.decode().splitlines() if not line.startswith("{")]
    assert len(said) == 1, said
    assert said[0].startswith("tandem-frontend: ")
    assert sentence in said[0]
    assert process.returncode == status
    assert not list(tmp_path.iterdir())


async def test_a_port_that_is_taken_is_said(workers: LocalCluster, tmp_path: Path) -> None:
    port = workers.frontend.address.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        *FRONTEND,
        f"--registry={workers.registry.address}",
        f"--port={port}",
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert err.decode().splitlines()[-1] == (f"tandem-frontend: cannot listen on 127.0.0.1:{port}: the port is in use")
    assert process.returncode == 1


async def test_a_variable_says_how_many(workers: LocalCluster, tmp_path: Path) -> None:
    flags = [flag for flag in FRONTEND if flag not in ("--processes", "2")]
    assert len(flags) == len(FRONTEND) - 2
    process = await asyncio.create_subprocess_exec(
        *flags,
        f"--registry={workers.registry.address}",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TANDEM_FRONTEND_PROCESSES": "3"},
    )
    try:
        await assert_eventually(
            lambda: len(psutil.Process(process.pid).children()), lambda n: n == 3, within_s=STARTS_WITHIN_S
        )
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0


async def test_up_runs_frontends_of_several_processes(state: Path) -> None:
    async with cluster_up(state, "--no-edge", "--frontend-processes", "2") as up:
        parent = child_of(up, "tandem_frontend")
        children = await assert_eventually(parent.children, lambda found: len(found) == 2)
        for number in range(2):
            status, out, err = await run(*TANDEM, "generate", f"Once {number}", "--json", state=state)
            assert (status, err) == (0, "")
            request_id = json.loads(out.splitlines()[0])["accepted"]["request_id"]
            status, out, err = await run(*TANDEM, "trace", request_id, state=state)
            assert (status, err) == (0, ""), err
            assert f"request {request_id} · finished" in out
        status, out, _ = await run(*TANDEM, "top", "--once", "--json", state=state)
        assert status == 0
        (frontend,) = json.loads(out)["frontends"]
        assert int(frontend["figures"]["finished_requests"]) == 2
        assert frontend["figures"]["processes"] == 2
        status, out, _ = await run(*TANDEM, "status", state=state)
        assert out.count("frontend ") >= 1
        address = state_of(state)["frontend"]
        os.kill(children[0].pid, signal.SIGKILL)
        assert await calls.is_serving(address)
        again = await assert_eventually(
            parent.children, lambda found: len(found) == 2 and children[0] not in found, within_s=STARTS_WITHIN_S
        )
        assert children[1] in again
        assert parent.is_running(), "up has not noticed: the frontend looks after it"
    await gone(again, within_s=1)


async def test_up_refuses_no_process(state: Path) -> None:
    status, out, err = await run(*TANDEM, "up", "--frontend-processes", "0", "--model", str(DEMO_MODEL), state=state)
    assert (status, out) == (2, "")
    assert err == "tandem up: --frontend-processes: must be at least 1, not 0\n"
