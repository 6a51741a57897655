"""Several streams at once over one gRPC channel, with asyncio, and a cancel: closing a call aborts both engines."""

import asyncio
import os

import grpc

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub

ADDRESS = os.environ.get("TANDEM_GRPC", "127.0.0.1:50051")  # of the frontend: tandem up --port 50051
PROMPTS = ("Once upon a time", "Mia hid the red key", "The old barn")


def request(prompt: str, max_tokens: int) -> pb.GenerateRequest:
    """A greedy generation."""
    return pb.GenerateRequest(prompt=prompt, sampling={"temperature": 0}, stopping={"max_tokens": max_tokens})


async def generate(stub: InferenceServiceStub, prompt: str) -> str:
    """The text of a whole generation."""
    return prompt + "".join([event.chunk.text async for event in stub.Generate(request(prompt, 20))])


async def first_chunk(stub: InferenceServiceStub, prompt: str) -> str:
    """The first chunk of a long generation, which is then cancelled."""
    call = stub.Generate(request(prompt, 1000))
    try:
        async for event in call:
            if event.HasField("chunk"):
                return event.chunk.text
    finally:
        call.cancel()
    return ""


async def main() -> None:
    """Generate for all prompts at the same time."""
    async with grpc.aio.insecure_channel(ADDRESS) as channel:
        stub = InferenceServiceStub(channel)
        for text in await asyncio.gather(*(generate(stub, prompt) for prompt in PROMPTS)):
            print(text)
        print("cancelled after:", await first_chunk(stub, PROMPTS[0]))


asyncio.run(main())
