"""One stream's bounds: a parser that takes too long or gets too much fails its own stream, and no other."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
import warnings
from typing import Any

import pytest

from tandem.engine.sglang.environment import STANDINS
from tests.unit.support.parser_texts import TOOLS

if importlib.util.find_spec("sglang") is None and not os.environ.get("CI"):
    pytest.skip("sglang is not installed here (requirements/cpu-engine.txt)", allow_module_level=True)
sys.path.append(str(STANDINS))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tandem.engine.sglang.parsing import bounds, host
    from tandem.engine.sglang.parsing.host import Host
    from tandem.engine.sglang.parsing.stream import Formats

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

OPEN: dict[str, Any] = {
    "op": "open",
    "tools": TOOLS,
    "tool_choice": "auto",
    "prompt": "",
    "template_kwargs": {},
    "previous_calls": 0,
    "parallel": True,
}


class Endless:
    """A parser without an end: as a regular expression, as a loop, and one that catches every exception."""

    keep_special_tokens = False

    def feed(self, text: str) -> list[Any]:
        if text == "expression":
            re.match(r"(a+)+$", "a" * 64 + "b")
        while text == "loop":
            pass
        while text == "catches":
            try:
                sum(range(10_000))
            except:  # noqa: E722 -- as some of SGLang's detectors do, and then they go on
                text = "swallows"
        while text == "swallows":
            with contextlib.suppress(Exception):
                sum(range(10_000))
        return [["c", text]]

    def close(self, *, complete: bool) -> list[Any]:
        return []


class EndlessFormats(Formats):
    def open(self, wanted: Any) -> Any:
        return Endless()


@pytest.mark.parametrize("kind", ["expression", "loop", "catches", "swallows"])
def test_a_step_without_an_end_fails_its_stream(kind: str) -> None:
    parsers = Host(EndlessFormats("qwen25", None, None))
    for number in (1, 2):
        parsers.handle({**OPEN, "id": number})
    begin_s = time.process_time()
    assert "processor time" in parsers.handle({"op": "feed", "id": 1, "text": kind})["error"]
    assert time.process_time() - begin_s < 3 * bounds.STEP_CPU_S
    assert parsers.handle({"op": "feed", "id": 2, "text": "yes"}) == {"deltas": [["c", "yes"]]}
    assert parsers.handle({"op": "count"}) == {"streams": 1}


def test_a_stream_has_a_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "STREAM_CPU_S", 0.1)
    monkeypatch.setattr(host, "STEP_CPU_S", 0.06)
    parsers = Host(EndlessFormats("qwen25", None, None))
    parsers.handle({**OPEN, "id": 1})
    stream = parsers._streams[1]
    stream._used_s = 1.0
    assert "processor time" in parsers.handle({"op": "feed", "id": 1, "text": "loop"})["error"]


def test_a_text_beyond_the_bound_fails_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TEXT_CHARS_MAX", 10)
    parsers = Host(Formats("qwen25", None, None))
    parsers.handle({**OPEN, "id": 1})
    assert "deltas" in parsers.handle({"op": "feed", "id": 1, "text": "0123456789"})
    assert "more than 10 characters" in parsers.handle({"op": "feed", "id": 1, "text": "0"})["error"]


def test_a_replayed_stream_goes_on_where_it_was() -> None:
    texts = ["I add. <tool_call>\n", '{"name": "add", "argu', 'ments": {"a": 1', "2}}\n</tool_call>"]
    whole, again = Host(Formats("qwen25", None, None)), Host(Formats("qwen25", None, None))
    whole.handle({**OPEN, "id": 1})
    for count, text in enumerate(texts):
        again.handle({**OPEN, "id": count, "replay": texts[:count]})
        one, other = (each.handle({"op": "feed", "id": i, "text": text}) for each, i in ((whole, 1), (again, count)))
        assert [delta[:2] + delta[3:] for delta in one["deltas"]] == [d[:2] + d[3:] for d in other["deltas"]]


def test_the_memory_of_a_worker_is_bounded() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            bounds.limit_memory()
            bytearray(2 * bounds.MEMORY_BYTES_MAX)
        except MemoryError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_response_is_one_that_cannot_be_encoded() -> None:
    lines: list[str] = []
    parsers = Host(EndlessFormats("qwen25", None, None))
    messages = [
        '{"n": 1, "op": "count"}',
        '{"n": 0, "op": "forget", "id": 5}',
        '{"n": 2, "op": "feed", "id": 9, "text": ""}',
    ]
    parsers.serve(messages, lines.append)
    assert len(lines) == 2
    assert all(line.isascii() and line.endswith("\n") for line in lines)
