"""What clients of the composed cluster do: the openai client and a gRPC stub, both through the one published port.

A stream reports the workers that serve it, so that a test can break exactly those; two streams with the same text
and finish prove that nothing was lost or repeated.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
from openai import OpenAI

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import sampling_pb2

MODEL = "tandem-demo"
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"
STORY = "Once upon a time there was a little fox"
STORY_TOKENS = 400
BEGUN_CHARACTERS = 200
CALL_TIMEOUT_S = 180.0


@dataclass
class Story:
    """A long stream that runs in a thread of its own."""

    text: str = ""
    workers: tuple[str, str] = ("", "")
    """Prefill and decode worker at the start."""
    begun: threading.Event = field(default_factory=threading.Event)
    """Set when it is well on its way."""
    ended: Future[pb.GenerateFinish] = field(default_factory=Future)

    def finish(self) -> pb.GenerateFinish:
        """Wait for the end; raises what the stream failed with."""
        return self.ended.result(CALL_TIMEOUT_S)


def chat(address: str) -> tuple[str, int]:
    """Ask by the openai client, streaming. Returns the answer and the number of pieces it came in."""
    with OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=CALL_TIMEOUT_S) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    return "".join(pieces), sum(1 for piece in pieces if piece)


def generate(address: str, prompt: str = QUESTION, max_tokens: int = 20) -> pb.GenerateFinish:
    """Ask by gRPC; returns the finish."""
    with grpc.insecure_channel(address) as channel:
        for event in InferenceServiceStub(channel).Generate(_request(prompt, max_tokens), timeout=CALL_TIMEOUT_S):
            if event.HasField("finish"):
                return event.finish
    raise AssertionError("the stream ended without a finish")


def begin_story(address: str) -> Story:
    """Begin a long stream; returns once it is well on its way."""
    story = Story()
    threading.Thread(target=_tell, args=(address, story), daemon=True).start()
    if not story.begun.wait(CALL_TIMEOUT_S):
        raise AssertionError("a stream did not begin")
    return story


def begin_story_on(address: str, worker: str) -> tuple[Story, list[Story]]:
    """Begin long streams until that worker serves one. Returns it, and the others, which run on."""
    others: list[Story] = []
    for _ in range(24):
        story = begin_story(address)
        if worker in story.workers and not story.ended.done():
            return story, others
        others.append(story)
    raise AssertionError(f"no stream came to {worker}")


def _tell(address: str, story: Story) -> None:
    try:
        with grpc.insecure_channel(address) as channel:
            request = _request(STORY, STORY_TOKENS)
            for event in InferenceServiceStub(channel).Generate(request, timeout=CALL_TIMEOUT_S):
                if event.HasField("accepted"):
                    route = event.accepted.route
                    story.workers = (route.prefill_worker_id, route.decode_worker_id)
                elif event.HasField("chunk"):
                    story.text += event.chunk.text
                    if len(story.text) >= BEGUN_CHARACTERS:
                        story.begun.set()
                else:
                    story.ended.set_result(event.finish)
                    return
        raise AssertionError("the stream ended without a finish")
    except (grpc.RpcError, AssertionError) as problem:
        story.ended.set_exception(problem)
    finally:
        story.begun.set()


def _request(prompt: str, max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt,
        sampling=sampling_pb2.Sampling(temperature=0),
        stopping=sampling_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True if max_tokens == STORY_TOKENS else None),
    )
