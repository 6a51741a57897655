"""The tandem command against a cluster that serves: output, exit statuses, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.cli.console_access import key_of
from tandem.cli.up import FIRST_PROMPT
from tests.integration.conftest import REPOSITORY
from tests.integration.support.command_line import (
    SIMULATED,
    TANDEM,
    children_of,
    cluster_up,
    environment,
    output_of,
    run,
    started,
    state_of,
    wait_state,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """The state file of a cluster with two decode workers and an edge."""
    state = tmp_path_factory.mktemp("serving") / "cluster.json"
    async with cluster_up(state, "--decode", "2"):
        yield state


async def test_up_generate_status_and_ctrl_c(state: Path, tmp_path: Path) -> None:
    (tmp_path / "up.toml").write_text("aggregated = 1\nprefill = 1\nconsole = true")
    async with cluster_up(state, "--config", str(tmp_path / "up.toml")) as up:
        status, out, err = await run(*TANDEM, "generate", "Once upon a time", "--max-tokens", "5", state=state)
        assert status == 0, err
        assert out.strip()
        assert re.search(
            r"(prefill-0 → decode-0|aggregated-0) \((short prompt|load unknown)\) · \d+ \+ 5 tokens · TTFT \d+ ms · ",
            err,
        ), err

        status, out, _ = await run(
            *TANDEM, "generate", "-", "--plain", "--json", "--max-tokens", "3", state=state, stdin=b"Hi"
        )
        events = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert "accepted" in events[0]
        chunks = [event["chunk"] for event in events[1:-1]]
        # A busy frontend sends several tokens in one chunk.
        assert [chunk.get("index", 0) for chunk in chunks] == list(range(len(chunks)))
        assert sum(len(chunk["token_ids"]) for chunk in chunks) == 3
        assert events[-1]["finish"]["reason"] == "FINISH_REASON_LENGTH"

        status, _, err = await run(*TANDEM, "up", *SIMULATED, state=state)
        assert status == 1
        assert "a cluster runs here already" in err

        console, key = state_of(state)["console"], key_of(state.with_name("console.keys"))
        async with httpx.AsyncClient(base_url=console, headers={"Authorization": f"Bearer {key}"}) as client:
            assert (await client.get("/api/models")).json()["models"][0]["has_chat_template"]

        children = children_of(up)
        assert len(children) == 7
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        printed, _, shown = (await output_of(up)).partition("stopping (Ctrl-C again to end at once)")
        assert f"console   {console}\n  key     {key}\n" in printed
        names = ("edge", "frontend", "aggregated-0", "registry")
        steps = [shown.index(f"{name:<14} {word}") for name in names for word in ("draining", "ended")]
        assert steps == sorted(steps)
        assert "ready" not in shown
        assert not [child for child in children if child.is_running()]
    assert not state.exists()


async def test_status_is_readable_at_80_columns(serving: Path) -> None:
    status, out, _ = await run(*TANDEM, "status", state=serving)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    busy, leases, models, registries = (table.splitlines()[1:] for table in out.split("\n\n"))
    rows = [line.split() for line in busy if " frontend " not in line]
    assert [line.split()[0] for line in leases] == [line.split()[0] for line in busy]
    assert [line.split() for line in models] == [["tandem-demo", "2048", "1", "2", "0", "-", "serving"]]
    assert [line.split()[0] for line in registries] == [state_of(serving)["registry"]]
    status, out, _ = await run(*TANDEM, "status", "--json", state=serving)
    workers = {row["worker"]["worker_id"]: row for row in json.loads(out)["workers"]}
    assert out.startswith('{\n  "workers": [\n')
    assert set(workers) == {"prefill-0", "decode-0", "decode-1"}
    assert all(row["load"]["measured_time"] and int(row["worker"]["epoch"]) > 0 for row in workers.values())
    shown = {cells[0]: (cells[1], cells[2], cells[-1]) for cells in rows}
    assert shown == {
        name: (name.partition("-")[0], "serving", row["worker"]["address"]) for name, row in workers.items()
    }


async def test_while_it_starts_that_is_said(state: Path) -> None:
    async with started(state, "up", *SIMULATED) as up:
        await wait_state(up, state, "starting")
        os.kill(up.pid, signal.SIGSTOP)
        try:
            for command in (["generate", "x"], ["status"]):
                status, _, err = await run(*TANDEM, *command, state=state)
                assert status == 1
                assert f"the cluster is still starting; its logs are in {state.parent}/logs/" in err
            status, _, err = await run(*TANDEM, "up", *SIMULATED, state=state)
            assert status == 1
            assert "a cluster is starting here already" in err
        finally:
            os.kill(up.pid, signal.SIGCONT)


async def test_refusals_are_one_sentence(serving: Path) -> None:
    addresses = state_of(serving)
    for command, exit_status, words in (
        (["generate", "x", "--max-tokens", "0"], 1, "stopping.max_tokens: must be at least 1, not 0 (INVALID_REQU"),
        (["generate", "x", "--model", "gpt"], 1, "model 'gpt' not found"),
        (["generate", "x", "--temperature", "nan"], 1, "sampling.temperature"),
        (["generate", "x", "--plain", "--system", "Be brief."], 2, "--system: requires --chat"),
        (["generate", "x", "--top-k", "0"], 1, "sampling.top_k"),
        (["generate", "x", "--min-p", "7"], 1, "sampling.min_p"),
        (["generate", "x", "--presence-penalty", "7"], 1, "sampling.presence_penalty"),
        (["generate", "x", "--frequency-penalty", "7"], 1, "sampling.frequency_penalty"),
        (["generate", "x", "--repetition-penalty", "7"], 1, "sampling.repetition_penalty"),
        (["generate", "x", "--logprobs", "99"], 1, "logprobs.top_logprobs"),
        (["generate", "x", "--address", addresses["registry"]], 1, "is not a Tandem frontend"),
        (["generate", "x", "--plain", "--address", addresses["registry"]], 1, "is not a Tandem frontend"),
        (["status", "--address", addresses["frontend"]], 1, "is not a Tandem registry"),
        (["health", addresses["frontend"], "--service", "bogus"], 2, "has no service 'bogus'"),
    ):
        status, _, err = await run(*TANDEM, *command, state=serving)
        assert status == exit_status, err
        assert words in err
        assert len(err.strip().splitlines()) == 1


async def test_log_probabilities_stand_below_the_text(serving: Path) -> None:
    status, _, err = await run(
        *TANDEM, "generate", "x", "--max-tokens", "3", "--logprobs", "2", "--seed", "1", state=serving
    )
    assert status == 0
    assert len(re.findall(r"token \d+: -\d+\.\d{3}  \(most likely: \d+: \S+  \d+: \S+\)", err)) == 3


async def test_ctrl_c_cancels_a_generation(serving: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *TANDEM,
        *["generate", "x", "--plain", "--json", "--max-tokens", "2000"],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(serving),
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err


async def test_health_of_a_process(serving: Path) -> None:
    address = state_of(serving)["frontend"]
    assert (await run(*TANDEM, "health", address, state=serving))[:2] == (0, "serving\n")
    status, _, err = await run(*TANDEM, "health", "127.0.0.1:1", state=serving)
    assert status == 1
    assert len(err.strip().splitlines()) == 1


async def test_demo_reports_what_happened(state: Path) -> None:
    status, out, err = await run(*TANDEM, "demo", *SIMULATED, state=state)
    assert status == 0, err
    for words in (
        "prefill-0 (prefill) → decode-0 (decode)",
        "time to first token",
        "tokens per second",
        "KV moved (simulated)",
    ):
        assert words in out
    moved: Any = re.search(r"KV moved \(simulated\)\s+([\d,]+) bytes", out)
    assert int(moved[1].replace(",", "")) > 0


def blocks_of(page: str, language: str) -> list[str]:
    """The code of a page in a language."""
    return [part.partition("```")[0] for part in page.split(f"```{language}\n")[1:]]


async def test_the_readme_talks_to_a_cluster(serving: Path) -> None:
    """Its Python, word for word but for the ports, which it shares with its own `tandem up`."""
    readme = (REPOSITORY / "README.md").read_text()
    # Which the demo model answers: test_demo_model_recipe.
    assert f'tandem generate "{FIRST_PROMPT}"' in readme
    assert "tandem up --prefill 1 --decode 2 --port 50051 --http-port 8080 " in readme
    over_http, native = blocks_of(readme, "python")
    assert "127.0.0.1:8080" in over_http
    assert "127.0.0.1:50051" in native
    state = state_of(serving)
    for program, seen in ((over_http, ""), (native, "bytes of KV moved")):
        own = program.replace("127.0.0.1:8080", state["http"]).replace("127.0.0.1:50051", state["frontend"])
        # The simulated engine goes on until it is stopped.
        own = own.replace("temperature=0,", "temperature=0, max_tokens=9,")
        status, out, err = await run(sys.executable, "-c", own, state=serving)
        assert (status, err) == (0, "")
        assert out
        assert seen in out


async def test_the_readmes_curl_examples_work_as_written(serving: Path) -> None:
    (block,) = blocks_of((REPOSITORY / "README.md").read_text(), "sh")
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        own = command.replace("127.0.0.1:8080", state_of(serving)["http"])
        own = own.replace('"temperature": 0', '"temperature": 0, "max_tokens": 9')
        status, out, err = await run("bash", "-c", own, state=serving)
        assert (status, err) == (0, "")
        assert '"finish' in out
        assert '"error"' not in out
