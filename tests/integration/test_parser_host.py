"""Integration test of the parser host and its workers: start, streams, bounds, ends, and a frontend that uses them."""

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
    worker_connection,
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
LONG_CALL = 'I add. <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two and three"}}\n</tool_call>'
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
        await ends_one_stream_beyond_its_bounds(parsers)
        await continues_every_stream_of_a_worker_that_ends(parsers)
        await fails_the_stream_that_ends_one_worker_after_another(parsers)
        await kills_a_worker_that_does_not_respond(parsers, monkeypatch)
        await continues_every_stream_when_the_host_ends(parsers)
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
    at_once = await parsers.open([], prompt="<|assistant|><think>\n", answers_at_once=True)
    assert await deltas_of(at_once, ["barn"]) == [Content("barn")], "a grammar leaves no room for reasoning"
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


async def ends_one_stream_beyond_its_bounds(parsers: Parsers) -> None:
    pids = parsers.worker_pids
    large, *others = [await parsers.open(TOOLS) for _ in range(4)]
    await asyncio.gather(*(other.feed("Hello ") for other in others))
    with pytest.raises(ParserFailed, match="more than 4194304 characters"):
        await large.feed("word " * 1_000_000)
    for other in others:
        assert await other.feed("world.") == [Content(" world.")]
        assert await other.close() == []
    assert parsers.worker_pids == pids


async def continues_every_stream_of_a_worker_that_ends(parsers: Parsers) -> None:
    """In the middle of a call's arguments: nothing is lost, and nothing is sent twice."""
    expected = joined(await deltas_of(await parsers.open(TOOLS), list(LONG_CALL)))
    streams = [await parsers.open(TOOLS) for _ in range(20)]
    pids, middle = parsers.worker_pids, len(LONG_CALL) // 2
    firsts = await asyncio.gather(*(fed(stream, LONG_CALL[:middle]) for stream in streams))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    rests = await asyncio.gather(*(fed(stream, LONG_CALL[middle:]) for stream in streams))
    for stream, first, rest in zip(streams, firsts, rests, strict=True):
        assert joined([*first, *rest, *await stream.close()]) == expected
    await assert_eventually(lambda: len(parsers.worker_pids) == 2, within_s=20)
    assert not {*pids} & {*parsers.worker_pids}


async def fed(stream: ParsedStream, text: str) -> list[Delta]:
    return [delta for char in text for delta in await stream.feed(char)]


def joined(deltas: Sequence[Delta]) -> tuple[str, list[str], str]:
    """Content, names of calls, and arguments."""
    content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
    names = [delta.name for delta in deltas if isinstance(delta, ToolCallStart)]
    return content, names, "".join(delta.json_fragment for delta in deltas if isinstance(delta, ToolCallArguments))


async def fails_the_stream_that_ends_one_worker_after_another(parsers: Parsers) -> None:
    stream = await parsers.open(TOOLS)
    neighbours = [await parsers.open(TOOLS) for _ in range(6)]
    feeding = asyncio.create_task(feed_into_death(stream))
    with pytest.raises(ParserFailed, match="worker ended"):
        await feeding
    assert await asyncio.gather(*(other.feed("Yes. ") for other in neighbours)) == [[Content("Yes.")]] * 6


async def feed_into_death(stream: ParsedStream) -> None:
    """Each worker ends while it works on this stream's text."""
    while True:
        assert stream.worker_pid is not None
        os.kill(stream.worker_pid, signal.SIGSTOP)
        feeding = asyncio.create_task(stream.feed("words"))
        await asyncio.sleep(0.05)
        os.kill(stream.worker_pid, signal.SIGKILL)
        await feeding


async def kills_a_worker_that_does_not_respond(parsers: Parsers, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await parsers.open(TOOLS)
    neighbours = [await parsers.open(TOOLS) for _ in range(6)]
    assert [await other.feed("No, ") for other in neighbours] == [[Content("No,")]] * 6
    monkeypatch.setattr(worker_connection, "RESPONSE_TIMEOUT_S", 1.0)
    assert stream.worker_pid is not None
    os.kill(stream.worker_pid, signal.SIGSTOP)
    stuck = asyncio.create_task(stream.feed("words"))
    await asyncio.sleep(0.05)
    others = asyncio.gather(*(other.feed("yes. ") for other in neighbours))
    with pytest.raises(ParserFailed, match="did not respond"):
        await stuck
    assert await others == [[Content(" yes.")]] * 6
    monkeypatch.undo()


async def continues_every_stream_when_the_host_ends(parsers: Parsers) -> None:
    streams = [await parsers.open(TOOLS) for _ in range(20)]
    await asyncio.gather(*(stream.feed("Some words") for stream in streams))
    first = parsers.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await assert_eventually(lambda: not parsers.worker_pids, within_s=5, what="the workers' end")
    assert await asyncio.gather(*(stream.feed(" and more") for stream in streams)) == [[Content(" and more")]] * 20
    stream = await parsers.open(TOOLS)
    assert [type(delta) for delta in await deltas_of(stream, [CALL])] == [ToolCallStart, ToolCallArguments]
    assert parsers.pid != first


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
