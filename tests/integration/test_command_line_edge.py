"""`tandem up` with an HTTP edge, several frontends, and without; and what is wrong with a parser's name."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.support.command_line import SIMULATED, TANDEM, cluster_up, output_of, run

pytestmark = pytest.mark.timeout(60)


async def test_up_answers_http_before_several_frontends(state: Path) -> None:
    async with cluster_up(state, "--frontends", "2", "--log-dir", str(state.parent / "logs")) as up:
        cluster_state = json.loads(state.read_text())
        async with httpx.AsyncClient(base_url=f"http://{cluster_state['http']}") as client:
            answer = await client.post("/v1/generate:unary", json={"prompt": "Once", "stopping": {"max_tokens": 3}})
        assert len(answer.json()["token_ids"]) == 3
        status, _, err = await run(*TANDEM, "generate", "Once", "--max-tokens", "3", state=state)
        assert status == 0, err
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        shown = await output_of(up)
        assert f"http      http://{cluster_state['http']}" in shown
        assert shown.count("\nfrontend  ") == 2


async def test_up_does_without_the_edge(state: Path) -> None:
    async with cluster_up(state, "--no-edge") as up:
        assert json.loads(state.read_text())["http"] is None
        assert "envoy" not in [child.name() for child in psutil.Process(up.pid).children(recursive=True)]


@pytest.mark.engine_sglang
@pytest.mark.parametrize(("option", "wrong"), [("--tool-parser", "hermess"), ("--reasoning-parser", "quen3")])
async def test_a_parser_that_is_not_there_is_one_sentence(state: Path, option: str, wrong: str) -> None:
    ended, out, err = await run(*TANDEM, "up", *SIMULATED, option, wrong, state=state)
    assert ended in (1, 2), err
    assert option.removeprefix("--").replace("-", "_") in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
