"""Fake workers that speak smg-grpc-proto, as SGLang does behind SMG: tokenised requests in, token ids out.

Runs in SMG's own environment, which has the contract. Messages of tokens are put together by hand.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from smg_grpc_proto import sglang_scheduler_pb2 as pb  # type: ignore[import-not-found]

from benchmarks.peers.grpc_wire import GrpcServer, Method, ServerCall
from benchmarks.peers.protobuf import varint
from benchmarks.peers.words import Words
from benchmarks.peers.workers.listening import Listeners
from benchmarks.peers.workers.steps import OpenStream, Pace, Steps

SERVICE = "/sglang.grpc.scheduler.SglangScheduler/"
REQUEST_ID_TAG, CHUNK_TAG, IDS_TAG, PROMPT_TAG, COMPLETION_TAG = b"\x0a", b"\x12", b"\x0a", b"\x10", b"\x18"
KV_TOKENS = 100_000_000
RUNNING_MAX = 1_000_000


class Answer(OpenStream):
    """One generation and its call."""

    __slots__ = ("call", "prompt_tokens", "request_id", "token_ids")

    def __init__(self, call: ServerCall, request: Any, serial: int | None, total: int, now_s: float) -> None:
        super().__init__(serial, total, now_s)
        self.call = call
        self.prompt_tokens = len(request.tokenized.input_ids)
        self.request_id = request.request_id
        self.token_ids: list[int] = []


class SmgWorker:
    """One worker of one role."""

    def __init__(self, role: str, options: dict[str, Any], words: Words, pace: Pace, waits: list[Any]) -> None:
        self._role = role
        self._options = options
        self._words = words
        self._at_once = pace.tokens_at_once
        self._steps = Steps(pace, self._on_step, waits)
        self._began_s = time.time()

    def methods(self) -> dict[str, Method]:
        """All that SMG asks."""
        return {
            f"{SERVICE}Generate": self._generate,
            f"{SERVICE}HealthCheck": _answering(lambda: pb.HealthCheckResponse(healthy=True, message="ok")),
            f"{SERVICE}Abort": _answering(lambda: pb.AbortResponse(success=True)),
            f"{SERVICE}GetModelInfo": _answering(self._model_info),
            f"{SERVICE}GetServerInfo": _answering(self._server_info),
            f"{SERVICE}GetLoads": _answering(self._loads),
            "/grpc.health.v1.Health/Check": _answering(_Serving),
        }

    def _generate(self, call: ServerCall, message: bytes) -> None:
        request = pb.GenerateRequest.FromString(message)
        total = 1 if self._role == "prefill" else request.sampling_params.max_new_tokens or 1
        serial = None if self._role == "prefill" else self._words.serial_of_ids(request.tokenized.input_ids)
        answer = Answer(call, request, serial, total, time.monotonic())
        if self._role == "prefill":
            self._give(answer)
            call.connection.flush()
        else:
            call.on_cancel = lambda: self._steps.remove(answer)
            self._steps.add(answer)

    def _on_step(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        connections: set[GrpcServer] = set()
        for answer in due:
            assert isinstance(answer, Answer)
            self._give(answer)
            connections.add(answer.call.connection)
        for connection in connections:
            connection.flush()

    def _give(self, answer: Answer) -> None:
        """The next tokens, and the end when they were the last."""
        ids = self._words.ids
        begin, count = answer.word_at + answer.sent, answer.take(self._at_once)
        new = [ids[place % len(ids)] for place in range(begin, begin + count)]
        answer.sent += count
        answer.token_ids += new
        answer.call.send(chunk_message(answer.request_id.encode(), new, answer.prompt_tokens, answer.sent))
        if answer.sent >= answer.total:
            complete = pb.GenerateComplete(
                output_ids=answer.token_ids,
                finish_reason="length",
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.sent,
            )
            answer.call.send(pb.GenerateResponse(request_id=answer.request_id, complete=complete).SerializeToString())
            answer.call.finish()

    def _model_info(self) -> Any:
        model = self._options["model"]
        return pb.GetModelInfoResponse(
            model_path=model,
            tokenizer_path=model,
            is_generation=True,
            served_model_name=self._options["model_name"],
            max_context_length=self._options["context_tokens_max"],
            max_req_input_len=self._options["context_tokens_max"],
            vocab_size=self._options["vocabulary_size"],
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            eos_token_ids=[1],
            pad_token_id=2,
            bos_token_id=0,
        )

    def _server_info(self) -> Any:
        info = pb.GetServerInfoResponse(
            sglang_version="benchmark",
            server_type="grpc",
            max_total_num_tokens=KV_TOKENS,
            uptime_seconds=time.time() - self._began_s,
        )
        info.server_args.update({"model_path": self._options["model"], "disaggregation_mode": self._role})
        return info

    def _loads(self) -> Any:
        load = pb.SchedulerLoad(
            num_running_reqs=self._steps.open_streams,
            max_total_num_tokens=KV_TOKENS,
            max_running_requests=RUNNING_MAX,
        )
        return pb.GetLoadsResponse(version="benchmark", dp_rank_count=1, loads=[load])


class _Serving:
    """grpc.health.v1.HealthCheckResponse with SERVING."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return b"\x08\x01"


def chunk_message(request_id: bytes, token_ids: list[int], prompt_tokens: int, completion_tokens: int) -> bytes:
    """A GenerateResponse with a chunk."""
    packed = b"".join(map(varint, token_ids))
    counts = PROMPT_TAG + varint(prompt_tokens) + COMPLETION_TAG + varint(completion_tokens)
    chunk = IDS_TAG + varint(len(packed)) + packed + counts
    return b"".join((REQUEST_ID_TAG, varint(len(request_id)), request_id, CHUNK_TAG, varint(len(chunk)), chunk))


def _answering(response: Any) -> Method:
    """A method that gives the same kind of answer to every caller."""

    def answer(call: ServerCall, message: bytes) -> None:
        call.send(response().SerializeToString())
        call.finish()

    return answer


class SmgFleet:
    """Fake workers of both roles."""

    def __init__(self, words: Words, pace: Pace) -> None:
        self._words = words
        self._pace = pace
        self.waits: list[tuple[int, float]] = []
        self.starts: dict[str, int] = {}
        self.listeners = Listeners()

    async def open(self, options: dict[str, Any]) -> dict[str, list[int]]:
        """Serve. Returns the ports by role."""
        config = json.loads((Path(options["model"]) / "config.json").read_text())
        options |= {"context_tokens_max": config["max_position_embeddings"], "vocabulary_size": config["vocab_size"]}
        ports: dict[str, list[int]] = {"prefill": [], "decode": []}
        for role in ports:
            for _ in range(options[role]):
                methods = SmgWorker(role, options, self._words, self._pace, self.waits).methods()
                ports[role].append(await self.listeners.open(partial(GrpcServer, methods)))
        return ports
