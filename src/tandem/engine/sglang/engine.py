"""The engine port on SGLang: one engine in this process, driven on the event loop that called `start`.

Owns the engine's life and every request that runs in it. What SGLang's words mean is in `requests` and `answers`;
how it is kept from taking the process over is in `launch` and `children`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tandem.domain.checkpoint import Checkpoint, read_checkpoint
from tandem.domain.generation import EngineRequest, Sampling
from tandem.domain.worker import Capabilities, EngineLoad, WorkerRole
from tandem.engine.port import BootstrapAddress, KvEvent, Output
from tandem.engine.pulling import BatchQueue
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import arguments, capabilities, compat, environment, profiling, reports, requests
from tandem.engine.sglang.children import Children
from tandem.engine.sglang.hooks.registry import FACTS_KEY
from tandem.engine.sglang.responses import Answers
from tandem.errors import EngineFailed, InvalidRequest, NotSupported, StartError, TandemError
from tandem.service import run_directory

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_LOOK_S = 0.25
BUILDING_END_S = 0.5
"""Most time to wait for the end of a start that was given up."""


class SglangEngine:
    """SGLang behind the port. Its own start takes some 10 s, in a thread, so that the event loop stays free."""

    def __init__(self, settings: EngineSettings) -> None:
        arguments.check_settings(settings)
        self._settings = settings
        self._runs: dict[str, Answers] = {}
        """Requests that run, by their id."""
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._over = asyncio.Event()
        """It has failed, or is being stopped: no answer will come."""
        self._directory: Path | None = None
        self._files: list[Path] = []
        self._thread: ThreadPoolExecutor | None = None
        self._building: asyncio.Future[None] | None = None
        self._children: Children | None = None
        self._engine: Any = None
        self._answering: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stall: str | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._profile_directory: Path
        self._ports: arguments.Ports
        self._checkpoint: Checkpoint
        self._capabilities: Capabilities

    # --- Life

    async def start(self) -> None:
        """See the port. SIGQUIT belongs to this engine from here on: SGLang's children send it when they fail."""
        compat.check_installed(self._settings.transfer_backend)
        self._checkpoint = await asyncio.to_thread(read_checkpoint, self._settings.model_path)
        self._directory = run_directory.make_inside("tandem-sglang-")
        self._children = Children(self._directory / "report", self._fail)
        self._listen_to_sigquit()
        # One thread that lives as long as the engine, see `launch.construct`.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sglang")
        self._building = asyncio.get_running_loop().run_in_executor(self._thread, self._build)
        try:
            await self._until_built(self._building)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """See the port."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def wait_failed(self) -> str:
        """See the port."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def stalled(self) -> str | None:
        """See the port."""
        return self._stall

    async def _until_built(self, building: asyncio.Future[None]) -> None:
        failed = asyncio.create_task(self._failed.wait())
        try:
            either: set[asyncio.Future[Any]] = {building, failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
        if self._failure is not None:
            raise StartError(self._failure)
        await building
        self._answering = asyncio.create_task(self._answer())
        self._looking = asyncio.create_task(self._look_for_stops(), name="stopped-children")

    def _build(self) -> None:
        """On the engine's thread: import SGLang, look it over, load the model."""
        settings, children, directory = self._settings, self._children, self._directory
        assert children is not None
        assert directory is not None
        # SGLang makes the files of its sockets here, and leaves them behind when it does not come to its end.
        tempfile.tempdir = str(directory)
        device = _device(settings.device)
        environment.apply(settings, device, directory / "report")
        compat.check_offers(settings.transfer_backend, device)
        self._ports = arguments.choose_ports(settings)
        given = arguments.server_arguments(settings, device, self._ports)
        if self._stopping is not None:
            raise StartError("stopped before the engine was up")
        try:
            from tandem.engine.sglang import launch

            engine = launch.construct(given, children.add, self._files.append)
        except Exception as problem:
            log.debug("SGLang could not be started", exc_info=True)
            left = reports.read(directory / "report")
            raise StartError(f"SGLang could not start: {left or reports.sentence_of(problem)}") from None
        self._engine = engine
        info = launch.scheduler_info(engine)
        compat.check_hooks(info.get(FACTS_KEY), device)
        self._capabilities = capabilities.capabilities(settings, self._checkpoint, engine.server_args, info)

    async def _answer(self) -> None:
        """Take the engine's answers in, for all requests. SGLang would run this itself, and exit when it raises."""
        try:
            await self._engine.tokenizer_manager.handle_loop()
        except asyncio.CancelledError:
            raise
        except Exception as problem:
            log.exception("the engine's answers cannot be read")
            self._fail(f"the engine's answers cannot be read: {reports.sentence_of(problem)}")

    def _fail(self, sentence: str) -> None:
        """The engine is dead: tell whoever waits."""
        if self._failure is not None or self._stopping is not None:
            return
        log.error("%s", sentence)
        self._failure = sentence
        self._failed.set()
        self._over.set()
        self._fail_all(sentence)

    async def _look_for_stops(self) -> None:
        """Break every request while a child is stopped, and take new ones when it goes on."""
        assert self._children is not None
        while True:
            await asyncio.sleep(STOP_LOOK_S)
            stall = self._children.stopped()
            if stall is not None and self._stall is None:
                log.error("%s: %d requests end here", stall, len(self._runs))
                self._fail_all(stall)
            elif stall is None and self._stall is not None:
                log.warning("SGLang's processes go on")
            self._stall = stall

    async def _stop(self) -> None:
        self._over.set()
        for answers in list(self._runs.values()):
            answers.abort()
        if self._children is not None:
            await self._children.end()
        self._remove_files()
        if self._building is not None:
            # Importing SGLang cannot be interrupted: the thread finds out when it is through, or goes with the process.
            await asyncio.wait({self._building}, timeout=BUILDING_END_S)
            if self._building.done() and not self._building.cancelled():
                self._building.exception()
            # Children that were started while the first ones were being ended.
            assert self._children is not None
            await self._children.end()
        for task in (self._answering, self._looking):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._engine is not None:
            from tandem.engine.sglang import launch

            launch.dismantle(self._engine)
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        self._remove_files()

    def _remove_files(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
        if self._directory is not None:
            tempfile.tempdir = None
            shutil.rmtree(self._directory, ignore_errors=True)

    def _listen_to_sigquit(self) -> None:
        """A child of SGLang's that fails sends SIGQUIT, whose default would end this process with a core dump."""
        if threading.current_thread() is threading.main_thread():
            failure = "SGLang reported a failure that it cannot go on from; its log says which"
            asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, self._fail, failure)

    # --- What it is

    def capabilities(self) -> Capabilities:
        """See the port."""
        return self._capabilities

    def bootstrap_address(self) -> BootstrapAddress | None:
        """See the port."""
        if self._settings.role is not WorkerRole.PREFILL:
            return None
        return BootstrapAddress(host=self._settings.host, port=self._ports.bootstrap)

    async def load(self) -> EngineLoad:
        """See the port. Read from the shared memory in which the scheduler keeps its figures: never waits for it."""
        self._check_alive()
        return capabilities.load(self._engine.tokenizer_manager.load_snapshot_reader.read_all(), self._settings.role)

    # --- Requests

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """See the port."""
        requests.check_peer(request, self._settings.transfer_backend)
        requests.check_seed(request, self._settings.extra)
        await self._submit(request, output)

    async def canary(self) -> None:
        """See the port. As SGLang's own warm-up does: the peer is one that SGLang only pretends to meet."""
        await self._pass_canary(requests.CANARY_GREEDY)
        # Two at once: what is compiled for a batch of one is compiled again for the first larger one.
        await asyncio.gather(*(self._pass_canary(requests.CANARY_DRAWN) for _ in range(2)))

    async def _pass_canary(self, sampling: Sampling) -> None:
        request, output = requests.canary(self._settings.role, sampling), BatchQueue()
        await self._submit(request, output)
        token_count = 0
        try:
            while (batch := await output.read()).finish is None:
                token_count += len(batch.token_ids)
        finally:
            self.abort(request.request_id)
        if not token_count:
            raise EngineFailed("the engine answered its canary without a token")

    async def _submit(self, request: EngineRequest, output: Output) -> None:
        self._check_alive()
        c = self._capabilities
        requests.check(request, self._settings.role, c.vocabulary_size, c.context_tokens_max)
        if request.request_id in self._runs:
            raise InvalidRequest("request_id", f"{request.request_id} runs already")
        priorities = bool(self._settings.extra.get("enable_priority_scheduling"))
        rid = requests.mint_rid(request.request_id)
        answers = self._runs[request.request_id] = Answers(request, rid, output, self._forget)
        try:
            await self._engine.tokenizer_manager.submit(
                requests.arguments(request, rid, c.context_tokens_max, priorities=priorities), answers
            )
        except BaseException as problem:
            self._runs.pop(request.request_id, None)
            if isinstance(problem, ValueError):
                raise answers.refused(str(problem)) from None
            if isinstance(problem, Exception) and not isinstance(problem, TandemError):
                log.exception("request %s broke in the engine's front half", request.request_id)
                raise EngineFailed(reports.sentence_of(problem)) from None
            raise

    def abort(self, request_id: str) -> bool:
        """See the port."""
        answers = self._runs.get(request_id)
        if answers is None:
            return False
        self._engine.tokenizer_manager.abort_request(answers.rid)
        answers.abort()
        return True

    def _forget(self, request: EngineRequest) -> None:
        self._runs.pop(request.request_id, None)

    def _fail_all(self, sentence: str) -> None:
        """Every request ends with EngineFailed; the engine is told to stop working on them, should it go on."""
        for answers in list(self._runs.values()):
            self._engine.tokenizer_manager.abort_request(answers.rid)
            answers.fail(EngineFailed(sentence))

    async def flush_cache(self) -> bool:
        """See the port."""
        self._check_alive()
        answer = await self._unless_failed(self._engine.tokenizer_manager.flush_cache())
        return bool(answer.success)

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """See the port."""
        self._check_alive()
        device = _device(self._settings.device)
        manager = self._engine.tokenizer_manager
        await self._unless_failed(
            profiling.start(manager, directory, device, steps_max=steps_max, with_stack=with_stack)
        )
        self._profile_directory = directory

    async def stop_profile(self) -> None:
        """See the port. Asked during a stall too, and answered after it: nobody else would stop the recording."""
        self._check_lives()
        await self._unless_failed(profiling.stop(self._engine.tokenizer_manager, self._profile_directory))

    async def kv_events(self, from_sequence: int | None) -> AsyncGenerator[KvEvent, None]:
        """See the port: not carried over from SGLang's own event socket."""
        raise NotSupported("this engine was started without KV events")
        yield  # makes this an iterator, as the port wants it

    async def _unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """The engine's answer, after a stall where there is one; EngineFailed when it dies without one."""
        answer = asyncio.create_task(work)
        over = asyncio.create_task(self._over.wait())
        try:
            either: set[asyncio.Future[Any]] = {answer, over}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._check_lives()
            return await answer
        finally:
            answer.cancel()
            over.cancel()

    def _check_alive(self) -> None:
        self._check_lives()
        if self._stall is not None:
            raise EngineFailed(self._stall)

    def _check_lives(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)
        if self._engine is None or self._stopping is not None:
            raise EngineFailed("the engine does not run")


def _device(wanted: str) -> str:
    """The device to use; looks for a GPU only when one may be used.

    Raises:
        StartError: a GPU is asked for, and there is none.
    """
    if wanted == "cpu":
        return wanted
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise StartError("device: cuda is asked for, and PyTorch finds no GPU that it can use")
    return "cuda" if has_gpu else "cpu"
