"""One bare sglang.Engine in its own process, driven over stdin and stdout: the baseline for Tandem.

No Tandem service is involved: token ids go into `Engine.async_generate`, and times are taken around it. Tandem's plugin
is enabled, because SGLang does not run on a plain CPU without it. Arguments: role, model, and further EngineSettings as
JSON.

An input line is JSON: a request with rid, token_ids, max_tokens and, for one side of a pair, the bootstrap address; or
a list of requests that all start at once. An output line is JSON: the times of each token of a request, on the
machine's monotonic clock; or, after the last request of a list, the times of each request in order, and the CPU seconds
(user and system) that this process used. Tokens of one SGLang chunk have the same time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import arguments, environment

SENTENCE_LENGTH_MAX = 200
LINE_BYTES_MAX = 2**28
"""A list of many prompts is one line."""


async def heard(engine: Any, work: dict[str, Any]) -> dict[str, Any]:
    """Run one request to its end; a failure is recorded, not raised."""
    begin_s = time.monotonic()
    times_s: list[float] = []
    failure = None
    try:
        failure = await _stream(engine, work, times_s)
    except Exception as problem:
        failure = f"{type(problem).__name__}: {problem}"[:SENTENCE_LENGTH_MAX]
    return {"rid": work["rid"], "begin_s": begin_s, "times_s": times_s, "failure": failure}


async def _stream(engine: Any, work: dict[str, Any], times_s: list[float]) -> str | None:
    """Note when each token comes. Returns why the engine broke the request off, if it did."""
    meeting = {f"bootstrap_{name}": work[name] for name in ("host", "port", "room") if name in work}
    stream = await engine.async_generate(
        input_ids=work["token_ids"],
        sampling_params={"temperature": 0.0, "max_new_tokens": work["max_tokens"], "ignore_eos": True},
        stream=True,
        rid=work["rid"],
        **meeting,
    )
    finish: dict[str, Any] = {}
    async for chunk in stream:
        now_s = time.monotonic()
        times_s += [now_s] * (len(chunk["output_ids"]) - len(times_s))
        finish = chunk["meta_info"].get("finish_reason") or {}
    return str(finish.get("message"))[:SENTENCE_LENGTH_MAX] if finish.get("type") == "abort" else None


async def answer(engine: Any, work: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """What a line in is answered with."""
    if isinstance(work, dict):
        return await heard(engine, work)
    begin_s = time.process_time()
    streams = await asyncio.gather(*(heard(engine, one) for one in work))
    return {"streams": streams, "cpu_s": time.process_time() - begin_s}


async def serve(engine: Any, answers: IO[str]) -> None:
    """Answer each line, many at the same time, until there are no more."""
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()

    async def one(line: bytes) -> None:
        print(json.dumps(await answer(engine, json.loads(line))), file=answers, flush=True)

    while line := await reader.readline():
        task = asyncio.create_task(one(line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
    """The process."""
    role, model = WorkerRole(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = EngineSettings(role=role, model_path=model, model_name="bare", **json.loads(sys.argv[3]))
    environment.apply(settings, settings.device, Path("/dev/null"))
    ports = arguments.choose_ports(settings)
    given = arguments.server_arguments(settings, settings.device, ports)
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**given, skip_tokenizer_init=True)
    print(json.dumps({"host": settings.host, "port": ports.bootstrap}), file=answers, flush=True)
    engine.loop.run_until_complete(serve(engine, answers))
    engine.shutdown()


if __name__ == "__main__":
    main()
