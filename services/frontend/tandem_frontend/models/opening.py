"""Opens what serves one model: its tokenizer, its output parsers, its queue, its routes and its pipeline.

Owns the order of it, and where the tokenizer's files come from: the directory of the setting `model` for the model of
that name, a worker of the model for every other one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.client.model_files import copy_model_files
from tandem.clock import monotonic
from tandem.domain.checkpoint import tokenizer_digest
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import ServiceError, StartError, TandemError
from tandem.observability.metrics import Metrics
from tandem.observability.request_trace import RequestTrace
from tandem.observability.trace_store import TraceStore
from tandem.output_parsers import Parsers
from tandem.service.owned_directory import OwnedDirectory
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import FrontendConfig
from tandem_frontend.embedding import Embeddings
from tandem_frontend.fleet import Fleet
from tandem_frontend.model_fleet import ModelFleet
from tandem_frontend.models.adapters import AdapterPipelines
from tandem_frontend.models.model_pipeline import ModelPipeline
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.sampling import read_defaults
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.tenancy import Tenancy

log = logging.getLogger(__name__)

DIRECTORY_PREFIX = "tandem-model-"
"""Of a directory that the next frontend removes where this one is killed."""
ASKED_MAX = 3
"""Workers that are asked for the files of their model, one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model that is served."""

    pipeline: ModelPipeline
    admission: Admission
    fleet: ModelFleet
    adapters: AdapterPipelines


@dataclass(frozen=True, slots=True)
class Shared:
    """What all models of a process have in common."""

    config: FrontendConfig
    fleet: Fleet
    requests: OpenRequests
    traces: TraceStore[RequestTrace]
    coalescing: Coalescing
    tenancy: Tenancy
    metrics: Metrics


async def open_tokenizer(name: str, directory: Path, config: FrontendConfig, stack: AsyncExitStack) -> ServedModel:
    """Read the tokenizer and the defaults of a model directory, off the event loop.

    Raises:
        StartError: a file is missing or damaged.
    """
    tokenizer = await asyncio.to_thread(Tokenizer.open, directory, processes=config.long_prompt_processes)
    stack.push_async_callback(tokenizer.close)
    return ServedModel(name, tokenizer, await asyncio.to_thread(read_defaults, directory))


class ModelOpener:
    """Opens models of one process."""

    def __init__(self, shared: Shared, own: ServedModel | None) -> None:
        """`own` is the model of the setting `model`, whose tokenizer is read already; None: there is none."""
        self._shared = shared
        self._own = own

    @asynccontextmanager
    async def open(self, name: str, workers: Sequence[Worker]) -> AsyncIterator[OpenedModel]:
        """Serve a model while the context is entered. `workers` are those that have it now.

        Raises:
            StartError: its files are damaged, are not those of its workers, or its parsers cannot start.
            NotSupported, ServiceError: no worker has sent its files.
        """
        shared = self._shared
        config = shared.config
        async with AsyncExitStack() as stack:
            model, directory = await self._model(name, workers, stack)
            parsers = await self._parsers(name, directory, stack)
            capacity = Capacity(name, monotonic, config.no_worker_wait_s)
            backlog = PrefillBacklog(name, config.prefill_queue_s)
            others = shared.requests.background.add(capacity)
            stack.callback(shared.requests.background.remove, others)
            admission = Admission(
                shared.requests, capacity, monotonic, backlog, config.prefill_queue_s, model=name, others=others
            )
            fleet = ModelFleet(
                config, model, shared.fleet.access, (capacity,), backlog, admission.reevaluate_soon, shared.metrics
            )
            generation = Generation(
                model, admission, fleet.execution, shared.traces, shared.coalescing,
                tells_prompts=config.trace_prompts, tenancy=shared.tenancy,
            )  # fmt: skip
            embeddings = Embeddings(model, admission, fleet.execution, fleet.workers, shared.traces, shared.tenancy)
            shared.requests.add_model()
            stack.callback(shared.requests.remove_model)
            await stack.enter_async_context(shared.fleet.following(fleet))
            pipeline = ModelPipeline(model, generation, fleet.workers, parsers, embeddings)
            yield OpenedModel(pipeline, admission, fleet, AdapterPipelines(pipeline, fleet.adapters))

    async def _model(self, name: str, workers: Sequence[Worker], stack: AsyncExitStack) -> tuple[ServedModel, Path]:
        """The model's tokenizer, and the directory of its files."""
        config = self._shared.config
        if self._own is not None and config.model is not None and name == self._own.name:
            return self._own, config.model
        ordered = sorted(workers, key=lambda worker: worker.state is not WorkerState.SERVING)[:ASKED_MAX]
        failures: list[TandemError] = []
        for worker in ordered:
            owned = await asyncio.to_thread(OwnedDirectory, DIRECTORY_PREFIX)
            stack.push_async_callback(asyncio.to_thread, owned.remove)
            try:
                return await self._of_worker(name, worker, owned.path, stack), owned.path
            except TandemError as problem:
                # Another worker may respond, or have better files.
                failures.append(problem)
                await asyncio.to_thread(owned.remove)
        # One that does not respond may do so later, so that the model is tried again.
        failures.sort(key=lambda problem: not isinstance(problem, ServiceError))
        raise failures[0] if failures else ServiceError(f"no worker of model {name} is left to read its tokenizer from")

    async def _of_worker(self, name: str, worker: Worker, directory: Path, stack: AsyncExitStack) -> ServedModel:
        """Copy the model's files from a worker, and open them."""
        try:
            await copy_model_files(self._shared.fleet.channels, worker, directory)
            if await asyncio.to_thread(tokenizer_digest, directory) != worker.capabilities.tokenizer_digest:
                raise StartError(f"worker {worker.worker_id} sent another tokenizer than it registered")
            return await open_tokenizer(name, directory, self._shared.config, stack)
        except StartError as problem:
            # Clients may read the reason in the list of models: it names no path of this machine.
            raise type(problem)(str(problem).replace(f"{directory}/", "")) from None
        except TandemError:
            raise
        except Exception as problem:  # files of a worker may break any library that reads them
            log.warning("files of model %s from worker %s cannot be read", name, worker.worker_id, exc_info=problem)
            raise StartError(f"its files cannot be used: {type(problem).__name__}") from None

    async def _parsers(self, name: str, directory: Path, stack: AsyncExitStack) -> Parsers | None:
        """None: neither tool calls nor reasoning of this model are parsed."""
        config = self._shared.config
        tool_parser, reasoning_parser = (
            config.parser_of("tool_parser", name),
            config.parser_of("reasoning_parser", name),
        )
        if tool_parser is None and reasoning_parser is None:
            return None
        parsers = Parsers(directory, tool_parser=tool_parser, reasoning_parser=reasoning_parser)
        stack.push_async_callback(parsers.stop)
        await parsers.start()
        return parsers
