"""The part of a fake Tandem worker that is the same for every leg contract: identity, health, load.

Owns the calls that every worker serves. `contract1.py` and `contract2.py` run its legs; `registering.py` registers it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from benchmarks.peers.grpc_wire import FAILED_PRECONDITION, INVALID_ARGUMENT, Method, ServerCall
from benchmarks.peers.words import Words
from benchmarks.peers.workers.steps import OpenStream, Pace, Steps
from tandem.api.types.v1 import generation_pb2, leg_pb2, worker_pb2
from tandem.api.worker.v1 import worker_service_pb2
from tandem.domain.checkpoint import read_checkpoint

SERVICE = "/tandem.api.worker.v1.WorkerService/"
HEALTH = "/grpc.health.v1.Health/"
MANY = 1_000_000
KV_TOKENS = 1_000_000_000
LOAD_INTERVAL_MS = 1_000
DOMAIN = "tandem"


def capabilities(model: Path, model_name: str, role: worker_pb2.WorkerRole.ValueType) -> worker_pb2.WorkerCapabilities:
    """What a fake says of its engine: the model's own facts, and room for everything."""
    checkpoint = read_checkpoint(model)
    is_pair = role != worker_pb2.WORKER_ROLE_AGGREGATED
    return worker_pb2.WorkerCapabilities(
        engine="simulated",
        engine_version="benchmark",
        model=model_name,
        model_digest=checkpoint.model_digest,
        tokenizer_digest=checkpoint.tokenizer_digest,
        context_tokens_max=checkpoint.context_tokens_max,
        kv_capacity_tokens=KV_TOKENS,
        running_requests_max=MANY,
        vocabulary_size=checkpoint.vocabulary_size,
        eos_token_ids=checkpoint.eos_token_ids,
        page_size_tokens=1,
        kv_dtype="float32",
        kv_layout=checkpoint.kv_layout,
        kv_bytes_per_token=checkpoint.kv_bytes_per_token(4),
        transfer_backend="simulated" if is_pair else "none",
        tensor_parallel_size=1,
        is_mla=checkpoint.is_mla,
    )


def refusal(code: int, reason: str, message: str) -> status_pb2.Status:
    """An error as Tandem's services send it."""
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    return status_pb2.Status(code=code, message=message, details=[info])


def end_with(call: ServerCall, status: status_pb2.Status) -> None:
    """End a call with an error."""
    call.finish(status.code, status.message, status.SerializeToString())


def finish_of(stream: OpenStream, prompt_tokens: int) -> leg_pb2.LegFinish:
    """The end of a leg that has used up its budget."""
    usage = generation_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=stream.sent)
    return leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)


class FakeWorker:
    """One start of one worker, without its legs."""

    def __init__(self, identity: worker_pb2.Worker, words: Words, pace: Pace, waits: list[tuple[int, float]]) -> None:
        """`waits` is given how long each request waited here for its first token."""
        self.identity = identity
        self.words = words
        self.tokens_at_once = pace.tokens_at_once
        self.steps = Steps(pace, self.on_step, waits)
        self._loop = asyncio.get_running_loop()

    @property
    def is_prefill(self) -> bool:
        """Whether it only makes the first token."""
        return self.identity.role == worker_pb2.WORKER_ROLE_PREFILL

    def methods(self) -> dict[str, Method]:
        """All it answers."""
        return {
            f"{HEALTH}Check": self._check,
            f"{HEALTH}Watch": self._watch,
            f"{SERVICE}GetCapabilities": self._get_capabilities,
            f"{SERVICE}WatchLoad": self._watch_load,
        }

    def on_step(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        """One step of the engine."""
        raise NotImplementedError

    def answer_ids(self, stream: OpenStream, count: int) -> list[int]:
        """The next tokens of an answer."""
        ids = self.words.ids
        begin = stream.word_at + stream.sent
        return [ids[place % len(ids)] for place in range(begin, begin + count)]

    def problem_of(self, leg: leg_pb2.LegRequest) -> status_pb2.Status | None:
        """Why a leg is refused; None: it is not."""
        if leg.worker_epoch != self.identity.epoch:
            message = f"this is epoch {self.identity.epoch}, not {leg.worker_epoch}"
            return refusal(FAILED_PRECONDITION, "STALE_EPOCH", message)
        if not leg.token_ids:
            return refusal(INVALID_ARGUMENT, "INVALID_REQUEST", "leg.token_ids: must be given")
        return None

    def accepted(self) -> leg_pb2.LegAccepted:
        """What a worker says when it takes a leg."""
        return leg_pb2.LegAccepted(worker_id=self.identity.worker_id, epoch=self.identity.epoch)

    def tokens_of(self, leg: leg_pb2.LegRequest) -> int:
        """How many tokens a leg is to have."""
        if self.is_prefill:
            return 1
        return leg.stopping.max_tokens if leg.stopping.HasField("max_tokens") else 1

    def _check(self, call: ServerCall, message: bytes) -> None:
        call.send(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString())
        call.finish()

    def _watch(self, call: ServerCall, message: bytes) -> None:
        call.send(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString())

    def _get_capabilities(self, call: ServerCall, message: bytes) -> None:
        call.send(worker_service_pb2.GetCapabilitiesResponse(worker=self.identity).SerializeToString())
        call.finish()

    def _watch_load(self, call: ServerCall, message: bytes) -> None:
        request = worker_service_pb2.WatchLoadRequest.FromString(message)
        interval_ms = request.interval_ms if request.HasField("interval_ms") else LOAD_INTERVAL_MS
        self._publish_load(call, 1, interval_ms / 1_000)

    def _publish_load(self, call: ServerCall, sequence: int, interval_s: float) -> None:
        """Say how busy it is, now and for as long as a caller listens."""
        if not call.is_open:
            return
        load = worker_service_pb2.WatchLoadResponse(
            sequence=sequence,
            epoch=self.identity.epoch,
            running_requests=self.steps.open_streams,
            waiting_requests=0,
            kv_used_tokens=0,
            kv_capacity_tokens=KV_TOKENS,
            open_legs=self.steps.open_streams,
        )
        load.measured_time.FromNanoseconds(time.time_ns())
        call.send(load.SerializeToString())
        call.connection.flush()
        self._loop.call_later(interval_s, self._publish_load, call, sequence + 1, interval_s)
