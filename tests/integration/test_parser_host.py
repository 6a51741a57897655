"""Integration test of the parser host process: start, streams, crashes and timeouts, and a frontend that uses one."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.errors import ConfigError, InvalidRequest, ParserFailed, StartError
from tandem.output_parsers import (
    Content,
    Delta,
    ParsedStream,
    Parsers,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    host_process,
)
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, SIMULATED, running

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
]

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
FRONTEND_BYTES_MAX = 250 * 1024 * 1024


def make(tool_parser: str | None = "qwen25", reasoning_parser: str | None = "qwen3") -> Parsers:
    return Parsers(DEMO_MODEL, tool_parser=tool_parser, reasoning_parser=reasoning_parser)


async def deltas_of(stream: ParsedStream, chunks: Sequence[str]) -> list[Delta]:
    deltas: list[Delta] = []
    async with stream:
        for chunk in chunks:
            deltas += await stream.feed(chunk)
        return deltas + await stream.close()


async def test_the_life_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = make()
    await parsers.start()
    try:
        await speaks_in_deltas(parsers)
        await forgets_what_is_abandoned(parsers)
        await refuses_what_is_wrong(parsers)
        await survives_its_death(parsers)
        await is_killed_when_it_does_not_respond(parsers, monkeypatch)
        pid = parsers.pid
        assert pid is not None
    finally:
        await parsers.stop()
    assert not psutil.pid_exists(pid)
    await parsers.stop()


async def speaks_in_deltas(parsers: Parsers) -> None:
    stream = await parsers.open(TOOLS, prompt="<|assistant|><think>\n")
    assert stream.keep_special_tokens
    thought, content, start, *arguments = await deltas_of(stream, ["Hm.", "</think>", "Yes: ", CALL])
    assert (thought, content) == (Reasoning("Hm."), Content("Yes:"))
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "add")
    assert start.call_id.startswith("call_")
    assert all(isinstance(part, ToolCallArguments) and part.index == 0 for part in arguments)
    assert "".join(part.json_fragment for part in arguments if isinstance(part, ToolCallArguments)) == '{"a": 1}'
    assert not (await parsers.open([])).keep_special_tokens
    guided = await parsers.constraint(TOOLS, "required")
    assert guided is not None
    assert "<tool_call>" in (guided.structural_tag or "")
    assert await parsers.constraint(TOOLS, "auto") is None


async def forgets_what_is_abandoned(parsers: Parsers) -> None:
    before = await parsers.open_count()
    for _ in range(1_000):
        async with await parsers.open(TOOLS) as stream:
            await stream.feed("Some words")
    cancelled = [asyncio.create_task(parsers.open(TOOLS)) for _ in range(50)]
    await asyncio.sleep(0)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
    assert await parsers.open_count() == before


async def refuses_what_is_wrong(parsers: Parsers) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await parsers.open([{"type": "function", "function": {}}])
    assert refused.value.field.startswith("tools[0].function")
    with pytest.raises(InvalidRequest) as refused:
        await parsers.constraint(TOOLS, {"type": "function", "function": {"name": "gone"}})
    assert refused.value.field == "tool_choice"


async def survives_its_death(parsers: Parsers) -> None:
    streams = [await parsers.open(TOOLS) for _ in range(20)]
    await asyncio.gather(*(stream.feed("Some words") for stream in streams))
    assert parsers.pid is not None
    first = parsers.pid
    os.kill(first, signal.SIGKILL)
    ends = await asyncio.gather(*(stream.feed(" and more") for stream in streams), return_exceptions=True)
    assert {type(end) for end in ends} == {ParserFailed}
    stream = await parsers.open(TOOLS)
    assert [type(delta) for delta in await deltas_of(stream, [CALL])] == [ToolCallStart, ToolCallArguments]
    assert parsers.pid != first


async def is_killed_when_it_does_not_respond(parsers: Parsers, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await parsers.open(TOOLS)
    monkeypatch.setattr(host_process, "RESPONSE_TIMEOUT_S", 0.3)
    assert parsers.pid is not None
    os.kill(parsers.pid, signal.SIGSTOP)
    with pytest.raises(ParserFailed, match="did not respond"):
        await stream.feed("words")
    monkeypatch.undo()
    assert await deltas_of(await parsers.open(TOOLS), ["Yes."]) == [Content("Yes.")]


async def test_a_stop_in_the_middle_of_a_restart_comes_back() -> None:
    parsers = make(None, "qwen3")
    await parsers.start()
    assert parsers.pid is not None
    os.kill(parsers.pid, signal.SIGKILL)
    await assert_eventually(lambda: parsers.pid is None, within_s=5)
    async with asyncio.timeout(10):
        await parsers.stop()


@pytest.mark.parametrize(
    ("names", "key", "hint"),
    [(("qwen2.5", None), "tool_parser", "qwen25"), ((None, "deepseek_r1"), "reasoning_parser", "deepseek-r1")],
)
async def test_an_unknown_name_is_rejected_with_the_closest(
    names: tuple[str | None, str | None], key: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint) as refused:
        await make(*names).start()
    assert refused.value.key == key


async def test_without_sglang_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'sglang' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartError, match=r"sglang, which is not installed: install it with"):
        await make().start()


async def test_a_frontend_with_a_host_stays_small_and_takes_it_along(tmp_path: Path) -> None:
    flags = {"frontend": {"tool-parser": "hermes", "reasoning-parser": "qwen3"}}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, role_flags=flags) as cluster:
        frontend = psutil.Process(cluster.frontend.pid)
        [host] = frontend.children()
        assert frontend.memory_info().rss < FRONTEND_BYTES_MAX
        assert not [one for one in frontend.memory_maps() if "torch" in one.path or "sglang" in one.path]
        assert [one for one in host.memory_maps() if "torch" in one.path]
        cluster.frontend.signal(signal.SIGKILL)
        await assert_eventually(lambda: not host.is_running(), within_s=5, what="the host's end")


async def test_a_frontend_with_an_unknown_parser_does_not_start() -> None:
    frontend = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tandem_frontend", "--registry=127.0.0.1:1", f"--model={DEMO_MODEL}", "--tool-parser=hermess"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await frontend.communicate()
    assert frontend.returncode == 2
    assert "tandem-frontend: tool_parser: " in err.decode()
    assert "hermes" in err.decode()
