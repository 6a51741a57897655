"""Grammars of forced tool calls on the real engine: what it then writes is read back as calls by the same parser."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tandem.local_cluster.cluster import LocalCluster
from tandem.output_parsers import Content, Delta, Parsers, ToolCallArguments, ToolCallStart
from tandem.rpc.convert import guided_to_proto
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import generate, request_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(300),
]

ARGUMENTS = {"type": "object", "properties": {"where": {"enum": ["bridge", "barn"]}}, "required": ["where"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": ARGUMENTS, "strict": True}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object"}}},
]
# A small model may write white space for ever where a grammar lets it.
FLAGS = {"dtype": "float32", "engine-extra": '{"constrained_json_disable_any_whitespace": true}'}
SPECIAL_TOKEN_ID = 4
NAMED = {"type": "function", "function": {"name": "look"}}


async def test_what_is_written_with_grammars_and_special_tokens(tmp_path: Path) -> None:
    async with running(tmp_path, prefill=0, decode=0, aggregated=1, worker_flags=FLAGS) as cluster:
        await special_tokens_are_shown_to_who_asks(cluster)
        # A structural tag in the model's format, and a JSON schema where the format has no grammar.
        await a_forced_call_is_a_call(cluster, "qwen25")
        await a_forced_call_is_a_call(cluster, "pythonic")


async def special_tokens_are_shown_to_who_asks(cluster: LocalCluster) -> None:
    texts = {}
    for skip in (None, True, False):
        request = request_of("Once upon a time", max_tokens=3)
        request.sampling.logit_bias[SPECIAL_TOKEN_ID] = 100.0
        if skip is not None:
            request.skip_special_tokens = skip
        stream = await generate(cluster, request)
        assert stream.token_ids == [SPECIAL_TOKEN_ID] * 3
        texts[skip] = stream.text
    assert texts == {None: "", True: "", False: "<|user|>" * 3}


async def a_forced_call_is_a_call(cluster: LocalCluster, tool_parser: str) -> None:
    parsers = Parsers(DEMO_MODEL, tool_parser=tool_parser, reasoning_parser=None)
    await parsers.start()
    try:
        guided = await parsers.constraint(TOOLS, NAMED, parallel_tool_calls=False)
        assert guided is not None
        request = request_of("Where did Mia hide the red key?", max_tokens=160)
        request.guided.CopyFrom(guided_to_proto(guided))
        deltas: list[Delta] = []
        async with await parsers.open(TOOLS, tool_choice=NAMED) as parsed:
            request.skip_special_tokens = not parsed.keep_special_tokens
            for chunk in (await generate(cluster, request)).chunks:
                deltas += await parsed.feed(chunk.text)
            deltas += await parsed.close()
    finally:
        await parsers.stop()
    assert not [delta for delta in deltas if isinstance(delta, Content)], deltas
    assert next(delta.name for delta in deltas if isinstance(delta, ToolCallStart)) == "look"
    arguments = "".join(d.json_fragment for d in deltas if isinstance(d, ToolCallArguments) and d.index == 0)
    assert json.loads(arguments)["where"] in ("bridge", "barn")
