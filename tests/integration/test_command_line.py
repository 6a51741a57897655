"""The tandem command and the four programs as a person runs them: output, exit statuses, signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import DEMO_MODEL

from tandem.testing.eventually import assert_eventually

pytestmark = pytest.mark.timeout(60)

TANDEM = [sys.executable, "-m", "tandem.cli"]
SIMULATED = ["--engine", "simulated", "--model", str(DEMO_MODEL)]


async def run(*command: str, state: Path, stdin: bytes | None = None) -> tuple[int | None, str, str]:
    """Exit status, standard output and standard error of a command."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TANDEM_STATE": str(state), "COLUMNS": "200"},
    )
    out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def cluster_up(state: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`tandem up` in the foreground of its own process, ready."""
    process = await asyncio.create_subprocess_exec(
        *TANDEM,
        "up",
        *SIMULATED,
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TANDEM_STATE": str(state)},
    )
    try:

        async def ready() -> bool:
            assert process.returncode is None, await process.stdout.read()  # type: ignore[union-attr]
            return state.exists()

        await assert_eventually(ready, bool, within_s=20, what="a state file")
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def output_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.read()).decode()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state" / "cluster.json"


async def test_up_generate_status_and_ctrl_c(state: Path) -> None:
    async with cluster_up(state, "--aggregated", "1") as up:
        status, out, err = await run(*TANDEM, "generate", "Once upon a time", "--max-tokens", "5", state=state)
        assert status == 0, err
        assert out.strip()
        assert re.search(r"(prefill-0 → decode-0|aggregated-0) · \d+ \+ 5 tokens · TTFT \d+ ms · ", err), err

        status, out, _ = await run(
            *TANDEM, "generate", "-", "--plain", "--json", "--max-tokens", "3", state=state, stdin=b"Hi"
        )
        events = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert "accepted" in events[0]
        assert [event["chunk"].get("index", 0) for event in events[1:-1]] == [0, 1, 2]
        assert events[-1]["finish"]["reason"] == "FINISH_REASON_LENGTH"

        status, out, _ = await run(*TANDEM, "status", state=state)
        assert status == 0
        for name in ("prefill-0", "decode-0", "aggregated-0", "serving", "tandem-demo"):
            assert name in out
        status, out, _ = await run(*TANDEM, "status", "--json", state=state)
        workers = {row["worker"]["worker_id"]: row for row in json.loads(out)["workers"]}
        assert set(workers) == {"prefill-0", "decode-0", "aggregated-0"}
        assert all(row["load"]["measured_time"] and int(row["worker"]["epoch"]) > 0 for row in workers.values())

        status, _, err = await run(*TANDEM, "up", *SIMULATED, state=state)
        assert status == 1
        assert "a cluster runs here already" in err

        children = psutil.Process(up.pid).children(recursive=True)
        assert len(children) == 7
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        shown = await output_of(up)
        ends = [shown.index(f"{name:<14} ended") for name in ("edge", "frontend", "registry")]
        assert [shown.index("draining"), *ends] == sorted([shown.index("draining"), *ends])
        assert not [child for child in children if child.is_running()]
    assert not state.exists()


async def test_up_answers_http_before_several_frontends(state: Path) -> None:
    async with cluster_up(state, "--frontends", "2", "--log-dir", str(state.parent / "logs")) as up:
        told = json.loads(state.read_text())
        async with httpx.AsyncClient(base_url=f"http://{told['http']}") as client:
            answer = await client.post("/v1/generate:unary", json={"prompt": "Once", "stopping": {"max_tokens": 3}})
        assert len(answer.json()["token_ids"]) == 3
        status, _, err = await run(*TANDEM, "generate", "Once", "--max-tokens", "3", state=state)
        assert status == 0, err
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        shown = await output_of(up)
        assert f"http      http://{told['http']}" in shown
        assert shown.count("\nfrontend  ") == 2


async def test_up_does_without_the_edge(state: Path) -> None:
    async with cluster_up(state, "--no-edge") as up:
        assert json.loads(state.read_text())["http"] is None
        assert "envoy" not in [child.name() for child in psutil.Process(up.pid).children(recursive=True)]


async def test_a_process_that_dies_takes_the_cluster_down(state: Path) -> None:
    async with cluster_up(state) as up:
        victim = next(
            child for child in psutil.Process(up.pid).children() if "tandem_decode" in " ".join(child.cmdline())
        )
        victim.kill()
        assert await up.wait() == 1
        assert "decode-0 has ended (status -9)" in await output_of(up)
    assert not state.exists()


async def test_nothing_runs_here(state: Path) -> None:
    for command in (["generate", "x"], ["status"]):
        status, _, err = await run(*TANDEM, *command, state=state)
        assert status == 1
        assert "start one with `tandem up`" in err
        assert "Traceback" not in err


async def test_a_stale_state_is_told(state: Path) -> None:
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    state.parent.mkdir()
    state.write_text(json.dumps({"pid": gone.pid, "frontend": "127.0.0.1:1", "registry": "127.0.0.1:1", "model": "m"}))
    status, _, err = await run(*TANDEM, "generate", "x", state=state)
    assert status == 1
    assert "is gone" in err


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--frontends", "0"], 2, "frontends: there must be at least one"),
        (["--prefill", "0", "--decode", "0"], 2, "there must be a prefill and a decode worker"),
        (["--prefill", "1", "--decode", "0"], 2, "prefill and decode workers are only of use together"),
        (["--model", "/nowhere"], 1, "model directory /nowhere does not exist"),
        (["--engine", "vllm"], 1, "engine: "),
        (["--engine-extra", "{"], 1, "engine_extra: "),
        (["--engine-extra", '{"speed": 1}'], 1, "speed"),
        (["--tool-parser", "hermess"], 1, "tool_parser"),
        (["--reasoning-parser", "quen3"], 1, "reasoning_parser"),
    ],
)
async def test_what_cannot_start_is_one_sentence(state: Path, options: list[str], status: int, sentence: str) -> None:
    ended, out, err = await run(*TANDEM, "up", *SIMULATED, *options, state=state)
    assert ended == status, err
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err


async def test_a_port_in_use_is_one_sentence(state: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended, _, err = await run(*TANDEM, "up", *SIMULATED, "--port", str(port), state=state)
    assert ended == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert len(err.strip().splitlines()) == 1


async def test_refusals_are_one_sentence(state: Path) -> None:
    async with cluster_up(state):
        for options, words in (
            (["--max-tokens", "0"], "stopping.max_tokens: must be 1 or more, not 0 (INVALID_REQUEST)"),
            (["--model", "gpt"], "no model 'gpt' is served here"),
            (["--temperature", "nan"], "sampling.temperature"),
        ):
            status, _, err = await run(*TANDEM, "generate", "x", *options, state=state)
            assert status == 1
            assert words in err
            assert "Traceback" not in err


async def test_ctrl_c_cancels_a_generation(state: Path) -> None:
    async with cluster_up(state):
        process = await asyncio.create_subprocess_exec(
            *TANDEM,
            *["generate", "x", "--plain", "--json", "--max-tokens", "2000"],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "TANDEM_STATE": str(state)},
        )
        assert process.stdout is not None
        await process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in err


@pytest.mark.parametrize("module", ["tandem_registry", "tandem_prefill", "tandem_decode", "tandem_frontend"])
async def test_a_wrong_setting_of_a_program_exits_2_and_names_it(state: Path, module: str) -> None:
    ended, _, err = await run(sys.executable, "-m", module, "--port", "99999", state=state)
    assert ended == 2
    name = module.replace("_", "-")
    assert re.fullmatch(rf"{name}: (port|registry): .*", err.strip()), err


async def test_health_of_a_process(state: Path) -> None:
    async with cluster_up(state):
        address = json.loads(state.read_text())["frontend"]
        assert (await run(*TANDEM, "health", address, state=state))[:2] == (0, "serving\n")
    status, _, err = await run(*TANDEM, "health", address, state=state)
    assert status == 1
    assert "Traceback" not in err


async def test_demo_tells_what_happened(state: Path) -> None:
    status, out, err = await run(*TANDEM, "demo", *SIMULATED, state=state)
    assert status == 0, err
    for words in (
        "prefill-0 (prefill) → decode-0 (decode)",
        "time to first token",
        "tokens per second",
        "KV moved over NIXL",
    ):
        assert words in out
    moved: Any = re.search(r"KV moved over NIXL\s+([\d,]+) bytes", out)
    assert int(moved[1].replace(",", "")) > 0
