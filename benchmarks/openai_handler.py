"""CPU time of the OpenAI API handler alone: `python -m benchmarks.openai_handler`.

Streams a chat through the API's servicer in this process, over a generation that costs next to nothing, and prints the
CPU time per event in microseconds, with and without the generation's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from google.api import httpbody_pb2
from tandem_frontend.models.model_pipeline import ModelPipeline, OneModel
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.servicer import OpenAiServicer
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2

MODEL = Path("models") / "tandem-demo"
ROUNDS = 3


class Instant:
    """A generation that pushes all of its chunks at once."""

    tenant_requests_max = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def charged(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def generate(self, request: pb.GenerateRequest, caller: Any, answer: Any) -> None:
        answer.accepted(pb.GenerateAccepted(request_id="x"))
        for index in range(self.count):
            answer.chunk(pb.GenerateChunk(index=index, text=" word", token_ids=[5]))
        await answer.finish(pb.GenerateFinish(reason=generation_pb2.FINISH_REASON_STOP))


class Call:
    """A client's call that counts the bytes it was sent."""

    writable = True

    def __init__(self) -> None:
        self.byte_count = 0

    def send(self, body: httpbody_pb2.HttpBody) -> None:
        self.byte_count += len(body.data)

    def on_writable(self, callback: Any) -> None:
        pass

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[Any, ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def count_unread_for(self, account: str) -> None:
        pass


class Discarded:
    """An answer that goes nowhere."""

    is_writable = True

    def accepted(self, accepted: Any) -> None:
        pass

    def chunk(self, chunk: Any) -> None:
        pass

    async def finish(self, finish: Any) -> None:
        pass


async def measure(count: int) -> dict[str, float]:
    generation: Any = Instant(count)
    model = ServedModel(MODEL.name, Tokenizer.open(MODEL), {})
    servicer = OpenAiServicer(OneModel(ModelPipeline(model, generation, lambda: ())), BodyChecker(0, 1.0))
    body = {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    request = httpbody_pb2.HttpBody(data=json.dumps(body).encode())
    whole_us = []
    for _ in range(ROUNDS):
        call = Call()
        begin_s = time.process_time()
        await servicer.ChatCompletions(request, call)
        whole_us.append(1e6 * (time.process_time() - begin_s) / count)
        assert call.byte_count > count, "an event for each chunk"
    begin_s = time.process_time()
    await generation.generate(pb.GenerateRequest(), None, Discarded())
    alone_us = 1e6 * (time.process_time() - begin_s) / count
    return {"event_us": round(min(whole_us), 2), "of_it_generation_us": round(alone_us, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    print(json.dumps(asyncio.run(measure(parser.parse_args().events))))


if __name__ == "__main__":
    main()
