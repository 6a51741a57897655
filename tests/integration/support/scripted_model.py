"""The doors of a frontend before a model that writes what a test says: real server, tokenizer, chat template, parsers.

What is scripted is the text of a generation, because no small model calls tools as a test needs it. Each response has
the next of `answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from tandem_edge.transcoding import HEALTH_SERVICE_NAME
from tandem_frontend.anthropic.servicer import SERVICE_NAME as ANTHROPIC_SERVICE_NAME
from tandem_frontend.anthropic.servicer import AnthropicServicer
from tandem_frontend.call_context import Caller
from tandem_frontend.models.model_pipeline import ModelPipeline, OneModel
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.servicer import SERVICE_NAME as OPENAI_SERVICE_NAME
from tandem_frontend.openai.servicer import OpenAiServicer
from tandem_frontend.pipeline import Answer, Generation
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.preparation.validation import checked_generate

from tandem.api.frontend.v1 import anthropic_service_pb2_grpc, inference_service_pb2_grpc, openai_service_pb2_grpc
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import ModelNotFound
from tandem.output_parsers import Parsers
from tandem.rpc.http2.server import Http2RpcServer
from tandem.testing.tool_model import link_tool_model
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.edge_host import StubFrontend

MODEL = "tool-model"
PIECE_CHARS = 5
"""Characters of a chunk: marks of calls and reasoning are cut anywhere."""
CACHED_TOKENS = 16


@dataclass(frozen=True)
class Script:
    """What the model writes for one request."""

    text: str
    reason: Any = generation_pb2.FINISH_REASON_STOP
    stop: str = ""
    """The stop string that ended it."""
    failure: Exception | None = None
    """Ends it behind the text."""


@dataclass
class ScriptedGeneration:
    """A `Generation` that follows its scripts and records what it was asked for."""

    tokenizer: Tokenizer
    answers: list[Script] = field(default_factory=list)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    tenant_requests_max: int = 16

    def charged(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """No client is limited here."""
        return contextlib.nullcontext()

    async def generate(
        self, request: pb.GenerateRequest, caller: Caller, answer: Answer, *, has_tool_grammar: bool = False
    ) -> None:
        await checked_generate(request, self.tokenizer, has_tool_grammar=has_tool_grammar)
        self.requests.append(request)
        script = self.answers.pop(0)
        answer.accepted(pb.GenerateAccepted(prompt_tokens=len(request.token_ids.ids)))
        pieces = [script.text[at : at + PIECE_CHARS] for at in range(0, len(script.text), PIECE_CHARS)]
        for index, piece in enumerate(pieces):
            answer.chunk(pb.GenerateChunk(index=index, text=piece, token_ids=[index]))
            await asyncio.sleep(0)
        if script.failure is not None:
            # Only what has left is behind a status already: the parser may still be at work.
            is_sent = asyncio.Event()
            answer.on_writable(is_sent.set)
            if not answer.is_writable:
                await is_sent.wait()
            raise script.failure
        finish = pb.GenerateFinish(reason=script.reason)
        if script.stop:
            finish.matched_stop.stop = script.stop
        finish.usage.prompt_tokens = len(request.token_ids.ids)
        finish.usage.cached_tokens = CACHED_TOKENS
        finish.usage.completion_tokens = len(pieces)
        await answer.finish(finish)


@dataclass(frozen=True)
class ScriptedModel:
    """The doors, and what is behind them."""

    address: str
    generation: ScriptedGeneration
    tokenizer: Tokenizer

    def answers(self, *scripts: Script | str) -> None:
        """What the next requests get; forgets those before."""
        self.generation.requests.clear()
        self.generation.answers[:] = [Script(each) if isinstance(each, str) else each for each in scripts]

    @property
    def prompts(self) -> list[str]:
        """The prompts of the requests so far, with their control tokens."""
        return [
            self.tokenizer.decode(request.token_ids.ids, skip_special_tokens=False)
            for request in self.generation.requests
        ]


class Named(OneModel):
    """A single model, under its name only."""

    async def find(self, name: str | None) -> ModelPipeline:
        found = await super().find(name)
        if name not in (None, found.model.name):
            raise ModelNotFound(f"model {name!r} not found", model=name)
        return found


@asynccontextmanager
async def scripted_model(folder: Path, *, context_tokens: int | None = None) -> AsyncIterator[ScriptedModel]:
    """Serve both doors on a port of this process; the parsers run in theirs.

    Args:
        folder: where the model's directory is made.
        context_tokens: the longest context; default: that of the demo model.
    """
    directory = link_tool_model(folder / MODEL, DEMO_MODEL)
    if context_tokens is not None:
        config = json.loads((DEMO_MODEL / "config.json").read_text())
        (directory / "config.json").unlink()
        (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context_tokens}))
    tokenizer = Tokenizer.open(directory)
    generation = ScriptedGeneration(tokenizer)
    model = ServedModel(MODEL, tokenizer, {})
    parsers = Parsers(directory, tool_parser="qwen25", reasoning_parser="qwen3")
    bodies = BodyChecker(tokenizer.context_tokens_max, 0.5)
    server = Http2RpcServer()
    # Only its health is asked for.
    health: Any = StubFrontend()  # type: ignore[abstract]
    server.add(HEALTH_SERVICE_NAME, partial(inference_service_pb2_grpc.add_InferenceServiceServicer_to_server, health))
    await parsers.start()
    try:
        scripted = cast("Generation", generation)
        models = Named(ModelPipeline(model, scripted, lambda: (), parsers))
        openai = OpenAiServicer(models, bodies)
        server.add(OPENAI_SERVICE_NAME, partial(openai_service_pb2_grpc.add_OpenAiServiceServicer_to_server, openai))
        anthropic = AnthropicServicer(models, bodies)
        add_anthropic = anthropic_service_pb2_grpc.add_AnthropicServiceServicer_to_server
        server.add(ANTHROPIC_SERVICE_NAME, partial(add_anthropic, anthropic))
        await server.start("127.0.0.1", 0)
        await server.set_serving(True)
        yield ScriptedModel(f"127.0.0.1:{server.port}", generation, tokenizer)
    finally:
        await server.stop(1)
        await parsers.stop()
        await bodies.close()
        await tokenizer.close()
