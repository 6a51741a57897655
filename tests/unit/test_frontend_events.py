"""Server-sent events: the fast form equals the library's, and failures are reported where they can be read."""

from __future__ import annotations

import contextlib
import json
from typing import Any, cast

import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.call_context import Caller
from tandem_frontend.models.model_pipeline import ModelPipeline, OneModel
from tandem_frontend.pipeline import Answer, Generation
from tandem_frontend.response.sse import Event, as_response, event_json, message_json
from tandem_frontend.response.writers import ChunkWriter
from tandem_frontend.servicer import InferenceServicer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.domain.http_errors import ERROR_BY_CODE
from tandem.errors import InvalidRequest, LegFailed
from tandem.rpc.status import ERROR_BY_REASON

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ACCEPTED = pb.GenerateAccepted(request_id="r")
CHUNK = pb.GenerateChunk(text="a\nb", token_ids=[1])


@given(st.integers(0, 2**31 - 1), TEXT, st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_the_fast_form_is_the_librarys(index: int, text: str, token_ids: list[int]) -> None:
    chunk = pb.GenerateChunk(index=index, text=text, token_ids=token_ids)
    line = event_json(chunk)
    assert json.loads(line) == json.loads(message_json(chunk))
    assert not {"\n", "\r"} & set(line)
    assert Parse(line, pb.GenerateResponse()) == as_response(chunk)


@given(st.integers(0, 2**31 - 1), st.text(max_size=300), st.lists(st.integers(0, 2**31 - 1), max_size=9000))
def test_the_fast_message_is_the_librarys(index: int, text: str, token_ids: list[int]) -> None:
    """Lengths of one byte, two and three."""
    chunk = pb.GenerateChunk(index=index, text=text, token_ids=token_ids)
    sent = Sent()
    ChunkWriter(sent).chunk(chunk)
    assert sent.messages == [pb.GenerateResponse(chunk=chunk).SerializeToString()]


def test_logprobs_are_not_forgotten() -> None:
    chunk = pb.GenerateChunk(token_ids=[1], logprobs=[generation_pb2.TokenLogprob(token_id=1, logprob=-1.5)])
    assert json.loads(event_json(chunk))["chunk"]["logprobs"][0]["logprob"] == -1.5


class Generated:
    """A generation that pushes its events, and fails where a test says so."""

    def __init__(self, *events: Event, failure: Exception | None = None) -> None:
        self._events = events
        self._failure = failure

    def charged(self, caller: Caller, call: Any) -> contextlib.AbstractContextManager[None]:
        """No client is limited here."""
        return contextlib.nullcontext()

    async def generate(self, request: pb.GenerateRequest, caller: Caller, answer: Answer) -> None:
        for event in self._events:
            if isinstance(event, pb.GenerateAccepted):
                answer.accepted(event)
            elif isinstance(event, pb.GenerateChunk):
                answer.chunk(event)
            else:
                await answer.finish(event)
        if self._failure is not None:
            raise self._failure


class Sent:
    """A client's call that keeps what was sent."""

    writable = True

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.messages.append(message)

    def on_writable(self, callback: Any) -> None:
        """Never asked for here."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def count_unread_for(self, account: str) -> None:
        """Nothing is counted here."""

    def time_remaining(self) -> float | None:
        return None


async def events_of(generated: Generated) -> list[HttpBody]:
    call, generation = Sent(), cast("Generation", generated)
    servicer = InferenceServicer(OneModel(ModelPipeline(cast("Any", None), generation, lambda: ())))
    await servicer.GenerateEvents(pb.GenerateEventsRequest(), call)
    return call.messages


async def test_each_event_is_one_block_and_the_first_has_the_type() -> None:
    bodies = await events_of(Generated(ACCEPTED, CHUNK, pb.GenerateFinish()))
    assert [body.content_type for body in bodies] == ["text/event-stream; charset=utf-8", "", ""]
    for body in bodies:
        assert body.data.startswith(b"data: {")
        assert body.data.endswith(b"}\n\n")
        assert body.data.count(b"\n") == 2


async def test_a_failure_before_the_first_event_stays_a_status() -> None:
    with pytest.raises(InvalidRequest):
        await events_of(Generated(failure=InvalidRequest("prompt", "is bad")))


@pytest.mark.parametrize(
    ("failure", "kind", "code", "message"),
    [
        (LegFailed("broke", field="x"), "service_unavailable_error", "leg_failed", "broke"),
        (KeyError("secret"), "server_error", "internal", "internal error: KeyError"),
    ],
)
async def test_a_failure_after_it_is_the_last_event(failure: Exception, kind: str, code: str, message: str) -> None:
    *_, last = await events_of(Generated(ACCEPTED, failure=failure))
    error = json.loads(last.data.removeprefix(b"data: "))["error"]
    assert error == {"message": message, "type": kind, "param": None, "code": code}


async def test_the_whole_in_one_message_is_what_the_stream_says() -> None:
    chunks = [CHUNK, pb.GenerateChunk(index=1, text="c", token_ids=[2, 3])]
    finish = pb.GenerateFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
    call, generated = Sent(), Generated(pb.GenerateAccepted(request_id="r", model="m"), *chunks, finish)
    servicer = InferenceServicer(OneModel(ModelPipeline(cast("Any", None), cast("Generation", generated), lambda: ())))
    whole = await servicer.GenerateUnary(pb.GenerateUnaryRequest(), call)
    assert (whole.request_id, whole.model, whole.text) == ("r", "m", "a\nbc")
    assert (list(whole.token_ids), whole.finish) == ([1, 2, 3], finish)


def test_every_grpc_code_of_our_errors_has_an_http_status() -> None:
    assert {error.code for error in ERROR_BY_REASON.values()} <= set(ERROR_BY_CODE)
