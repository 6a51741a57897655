"""One bare sglang.Engine in its own process, driven over stdin and stdout: what Tandem is compared with.

No Tandem service is involved: token ids go into `Engine.async_generate`, times are taken beside it. Tandem's plugin is
switched on, because SGLang does not run on a plain CPU without it. Arguments: role, model, and more of EngineSettings
as JSON. Lines in: JSON with rid, token_ids, max_tokens and the meeting place; lines out: the times of each token, on
the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import arguments, environment


async def run_one(engine, work, answers) -> None:
    begin_s = time.monotonic()
    times_s: list[float] = []
    seen = 0
    stream = await engine.async_generate(
        input_ids=work["token_ids"],
        sampling_params={"temperature": 0.0, "max_new_tokens": work["max_tokens"], "ignore_eos": True},
        stream=True,
        rid=work["rid"],
        bootstrap_host=work["host"],
        bootstrap_port=work["port"],
        bootstrap_room=work["room"],
    )
    async for chunk in stream:
        now_s = time.monotonic()
        times_s += [now_s] * (len(chunk["output_ids"]) - seen)
        seen = len(chunk["output_ids"])
    print(json.dumps({"rid": work["rid"], "begin_s": begin_s, "times_s": times_s}), file=answers, flush=True)


async def serve(engine, answers) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(run_one(engine, json.loads(line), answers))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
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
