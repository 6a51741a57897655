"""The engine port on SGLang: one engine in this process, driven on the event loop that called `start`.

Owns the engine's lifecycle and its running requests. `requests` and `responses` convert to and from SGLang's types;
`launch` and `children` keep SGLang from taking over the process (signals, exits, child processes).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tandem.domain.adapter import Adapter
from tandem.domain.checkpoint import Checkpoint, read_checkpoint
from tandem.domain.generation import EngineRequest, Sampling
from tandem.domain.handover import DropReason
from tandem.domain.worker import EMBED, Capabilities, EngineLoad, WorkerRole
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.port import BootstrapAddress, KvSnapshot, Output
from tandem.engine.pulling import BatchQueue
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import (
    adapters,
    arguments,
    capabilities,
    compat,
    environment,
    kv_events,
    profiling,
    reports,
    requests,
    role_switch,
)
from tandem.engine.sglang.children import Children
from tandem.engine.sglang.handover import HandoverWatch
from tandem.engine.sglang.hooks.cache_dump import REQUEST_KEY
from tandem.engine.sglang.hooks.scheduler_hooks import FACTS_KEY
from tandem.engine.sglang.kv_follower import KvFollower
from tandem.engine.sglang.responses import Answers
from tandem.errors import EngineFailed, InvalidRequest, NotSupported, StartError, TandemError
from tandem.service.owned_directory import OwnedDirectory

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_CHECK_INTERVAL_S = 0.25
BUILDING_END_S = 0.5
"""Time that `stop` waits for the thread of an unfinished start."""


class SglangEngine:
    """An `Engine` that runs SGLang. Starting SGLang blocks for some 10 s, so it runs in a thread of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        arguments.check_settings(settings)
        self._settings = settings
        self._runs: dict[str, Answers] = {}
        """Running requests by request id."""
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._over = asyncio.Event()
        """Set when the engine has failed or is being stopped: pending calls get no response."""
        self._directory: Path | None = None
        self._owned: OwnedDirectory | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._building: asyncio.Future[None] | None = None
        self._children: Children | None = None
        self._engine: Any = None
        self._response_reader: asyncio.Task[None] | None = None
        self._stop_watcher: asyncio.Task[None] | None = None
        self._stall: str | None = None
        self._handover: HandoverWatch | None = None
        self._kv_mirror: KvCacheMirror | None = None
        self._kv_follower: KvFollower | None = None
        self._kv_task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._switch_obstacle: str | None = None
        """Why the engine cannot switch its role in place; None: it can."""
        self._prefill_ended_s = float("-inf")
        """When the prefill role was last left, on the event loop's clock."""
        self._profile_directory: Path
        self._ports: arguments.Ports
        self._checkpoint: Checkpoint
        self._info: dict[str, Any]
        self._capabilities: Capabilities

    # --- Lifecycle

    async def start(self) -> None:
        """See the port. Takes over SIGQUIT, which SGLang's children send to this process when they fail."""
        compat.check_installed(self._settings.transfer_backend)
        self._checkpoint = await asyncio.to_thread(read_checkpoint, self._settings.model_path)
        if self._settings.task == EMBED:
            self._checkpoint.check_embeds()
        self._owned = OwnedDirectory("tandem-sglang-")
        self._directory = self._owned.path
        self._children = Children(self._directory / "report", self._fail)
        self._handover = HandoverWatch(self._directory)
        self._listen_to_sigquit()
        # A thread that lives as long as the engine: SGLang's children die with the thread that started them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sglang")
        self._building = asyncio.get_running_loop().run_in_executor(self._thread, self._build)
        try:
            await self._until_built(self._building)
        except BaseException:  # a cancelled start must be undone too
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

    def handover_trouble(self) -> str | None:
        """See the port."""
        return None if self._handover is None else self._handover.trouble

    def dropped_messages(self) -> Mapping[DropReason, int]:
        """See the port."""
        return {} if self._handover is None else self._handover.dropped

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
        if self._switch_obstacle is None and self._settings.role is WorkerRole.DECODE:
            # SGLang starts one in either role where it may switch.
            await role_switch.close_bootstrap(self._engine.tokenizer_manager)
        self._response_reader = asyncio.create_task(self._read_responses())
        self._stop_watcher = asyncio.create_task(self._watch_for_stops(), name="stopped-children")
        self._follow_kv_events()

    def _follow_kv_events(self) -> None:
        if kv_events.unavailable(self._settings) is not None:
            return
        assert self._directory is not None
        self._kv_mirror = KvCacheMirror(self._capabilities.page_size_tokens)
        self._kv_follower = KvFollower(self._directory, self._kv_mirror, self._ask_dump)
        self._kv_task = asyncio.create_task(self._kv_follower.run(), name="kv-events")

    def _build(self) -> None:
        """On the engine's thread: import SGLang, check its version and API, load the model."""
        settings, children, directory, owned = self._settings, self._children, self._directory, self._owned
        assert children is not None
        assert owned is not None
        assert directory is not None
        # SGLang creates its socket files in tempdir and does not remove them when it is killed.
        tempfile.tempdir = str(directory)
        device = environment.resolve_device(settings.device)
        environment.apply(settings, device, directory / "report")
        compat.check_offers(settings.transfer_backend, device)
        self._ports = arguments.choose_ports(settings)
        given = arguments.server_arguments(settings, device, self._ports)
        self._switch_obstacle = role_switch.obstacle(settings, device)
        if self._switch_obstacle is None:
            given = role_switch.server_arguments(settings, device) | given
        if kv_events.is_published(settings, both_roles=self._switch_obstacle is None):
            given |= kv_events.arguments(directory)
        if self._stopping is not None:
            raise StartError("engine start was cancelled by a stop")
        try:
            from tandem.engine.sglang import launch

            engine = launch.construct(given, children.add, owned.note_outside)
        except Exception as problem:  # SGLang's start raises exceptions of many libraries
            log.debug("SGLang failed to start", exc_info=True)
            report = reports.read(directory / "report")
            raise StartError(f"SGLang failed to start: {report or reports.sentence_of(problem)}") from None
        self._engine = engine
        if engine.tokenizer_manager.is_generation is (settings.task == EMBED):
            # A canary of the other kind would end the scheduler.
            raise StartError(f"task: is {settings.task}, but SGLang runs this model for the other task")
        info = self._info = launch.scheduler_info(engine)
        compat.check_hooks(info.get(FACTS_KEY), device)
        self._capabilities = capabilities.capabilities(settings, self._checkpoint, engine.server_args, info)

    async def switch_role(self, role: WorkerRole) -> None:
        """See the port. The scheduler process stays; of its memory only the transfer structures are built anew."""
        self._check_alive()
        if role is WorkerRole.AGGREGATED:
            raise NotSupported("SGLang switches between prefill and decode only")
        if self._switch_obstacle is not None:
            raise NotSupported(self._switch_obstacle)
        manager = self._engine.tokenizer_manager
        if role is WorkerRole.PREFILL:
            await self._open_bootstrap(manager)
        await self._unfollow_kv_events()
        await self._unless_failed(role_switch.switch(manager, role))
        if role is WorkerRole.DECODE:
            await role_switch.close_bootstrap(manager)
            self._prefill_ended_s = asyncio.get_running_loop().time()
        self._settings = replace(self._settings, role=role)
        self._capabilities = capabilities.capabilities(
            self._settings, self._checkpoint, self._engine.server_args, self._info
        )
        self._follow_kv_events()

    async def _open_bootstrap(self, manager: Any) -> None:
        """Listen for decode engines, at the configured port or a new one."""
        settings = replace(self._settings, role=WorkerRole.PREFILL)
        passed_s = asyncio.get_running_loop().time() - self._prefill_ended_s
        if settings.bootstrap_port and passed_s < role_switch.PEERS_FORGET_S:
            raise NotSupported(
                f"decode engines may still know the prefill engine that was at its bootstrap_port {passed_s:.1f} s ago"
            )
        try:
            port = arguments.choose_ports(settings).bootstrap
        except StartError as problem:
            raise NotSupported(problem.message) from None
        assert self._directory is not None
        await role_switch.open_bootstrap(manager, settings.host, port, self._directory)
        self._ports = replace(self._ports, bootstrap=port)

    async def _unfollow_kv_events(self) -> None:
        if self._kv_task is not None:
            self._kv_task.cancel()
            await asyncio.wait({self._kv_task})
        if self._kv_mirror is not None:
            self._kv_mirror.end()
        self._kv_mirror = self._kv_follower = self._kv_task = None

    async def _read_responses(self) -> None:
        """Run SGLang's response loop for all requests. SGLang's own wrapper would exit the process when it raises."""
        try:
            await self._engine.tokenizer_manager.handle_loop()
        except asyncio.CancelledError:
            raise
        except Exception as problem:  # whatever ends the loop, no response is read any more
            log.exception("reading SGLang's responses failed; the engine is unusable")
            self._fail(f"reading SGLang's responses failed: {reports.sentence_of(problem)}")

    def _fail(self, sentence: str) -> None:
        """Mark the engine as failed and fail every running request."""
        if self._failure is not None or self._stopping is not None:
            return
        log.error("%s", sentence)
        self._failure = sentence
        self._failed.set()
        self._over.set()
        self._fail_all(sentence)

    async def _watch_for_stops(self) -> None:
        """Fail running requests and reject new ones while a child process is stopped (SIGSTOP, a debugger)."""
        assert self._children is not None
        assert self._handover is not None
        while True:
            await asyncio.sleep(STOP_CHECK_INTERVAL_S)
            stall = self._children.stopped()
            if stall is not None and self._stall is None:
                log.error("%s: failing %d running requests", stall, len(self._runs))
                self._fail_all(stall)
            elif stall is None and self._stall is not None:
                log.info("SGLang processes resumed; accepting requests again")
            self._stall = stall
            self._handover.check()

    async def _stop(self) -> None:
        self._over.set()
        for answers in list(self._runs.values()):
            answers.abort()
        if self._children is not None:
            await self._children.end()
        self._remove_files()
        if self._building is not None:
            # Importing SGLang cannot be interrupted: the thread checks `_stopping` afterwards, or dies at process exit.
            await asyncio.wait({self._building}, timeout=BUILDING_END_S)
            if self._building.done() and not self._building.cancelled():
                self._building.exception()
            # Again, for children that were started while the first ones were being killed.
            assert self._children is not None
            await self._children.end()
        for task in (self._response_reader, self._stop_watcher):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._unfollow_kv_events()
        if self._engine is not None:
            from tandem.engine.sglang import launch

            launch.dismantle(self._engine)
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        self._remove_files()

    def _remove_files(self) -> None:
        if self._owned is not None:
            tempfile.tempdir = None
            self._owned.remove()

    def _listen_to_sigquit(self) -> None:
        """Handle SIGQUIT, which a failing SGLang child sends; by default it would dump core and end this process."""
        if threading.current_thread() is threading.main_thread():
            failure = "SGLang reported a fatal error (SIGQUIT); see its log lines above for the cause"
            asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, self._fail, failure)

    # --- Description and load

    def capabilities(self) -> Capabilities:
        """See the port."""
        return self._capabilities

    def bootstrap_address(self) -> BootstrapAddress | None:
        """See the port."""
        if self._settings.role is not WorkerRole.PREFILL:
            return None
        return BootstrapAddress(host=self._settings.host, port=self._ports.bootstrap)

    async def load(self) -> EngineLoad:
        """See the port. Reads the scheduler's load snapshot from shared memory, so it never waits for the scheduler."""
        self._check_alive()
        return capabilities.load(self._engine.tokenizer_manager.load_snapshot_reader.read_all(), self._settings.role)

    # --- Requests

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """See the port."""
        requests.check_peer(request, self._settings.transfer_backend)
        requests.check_seed(request, self._settings.extra)
        await self._submit(request, output)

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        """See the port."""
        self._check_alive()
        await self._unless_failed(adapters.load(self._settings, self._engine.tokenizer_manager, adapter, path))

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See the port."""
        self._check_alive()
        await self._unless_failed(adapters.unload(self._engine.tokenizer_manager, adapter))

    async def canary(self) -> None:
        """See the port. Like SGLang's own warm-up, it uses SGLang's fake bootstrap host, so no peer is needed."""
        if self._settings.task == EMBED:
            await self._pass_embedding_canary()
            return
        await self._pass_canary(requests.CANARY_GREEDY)
        # Two at once: kernels compiled for a batch of one are compiled again for the first larger batch.
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
            raise EngineFailed("the canary finished without a token")

    async def _pass_embedding_canary(self) -> None:
        request, output = requests.embedding_canary(), BatchQueue()
        await self._submit(request, output)
        try:
            finish = (await output.read()).finish
        finally:
            self.abort(request.request_id)
        size = self._capabilities.embedding_size
        if finish is None or len(finish.embedding) != size:
            raise EngineFailed(f"the canary's embedding has not the {size} numbers that config.json says")

    async def _submit(self, request: EngineRequest, output: Output) -> None:
        self._check_alive()
        c = self._capabilities
        requests.check(request, self._settings.role, c.vocabulary_size, c.context_tokens_max)
        adapters.check(self._engine.tokenizer_manager, request.adapter)
        if request.request_id in self._runs:
            raise InvalidRequest("request_id", f"{request.request_id} is already running on this engine")
        priorities = bool(self._settings.extra.get("enable_priority_scheduling"))
        rid = requests.mint_rid(request.request_id)
        answers = self._runs[request.request_id] = Answers(request, rid, output, self._forget)
        try:
            given = requests.arguments(request, rid, c.context_tokens_max, priorities=priorities)
            await self._engine.tokenizer_manager.submit(given, answers, embeds=request.embedding is not None)
        except BaseException as problem:  # a cancelled request must leave the table too
            self._runs.pop(request.request_id, None)
            if isinstance(problem, ValueError):
                raise answers.refused(str(problem)) from None
            if isinstance(problem, Exception) and not isinstance(problem, TandemError):
                log.exception("request %s failed in SGLang's tokenizer manager", request.request_id)
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
        """End every request with EngineFailed, and abort them in SGLang in case it resumes."""
        for answers in list(self._runs.values()):
            self._engine.tokenizer_manager.abort_request(answers.rid)
            answers.fail(EngineFailed(sentence))

    async def flush_cache(self) -> bool:
        """See the port."""
        self._check_alive()
        response = await self._unless_failed(self._engine.tokenizer_manager.flush_cache())
        return bool(response.success)

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """See the port."""
        self._check_alive()
        device = environment.resolve_device(self._settings.device)
        manager = self._engine.tokenizer_manager
        await self._unless_failed(
            profiling.start(manager, directory, device, steps_max=steps_max, with_stack=with_stack)
        )
        self._profile_directory = directory

    async def stop_profile(self) -> None:
        """See the port. Also sent during a stall and completed after it, or the recording would never stop."""
        self._check_lives()
        await self._unless_failed(profiling.stop(self._engine.tokenizer_manager, self._profile_directory))

    def kv_cache(self) -> KvCacheMirror:
        """See the port."""
        if self._kv_mirror is None:
            raise NotSupported(kv_events.unavailable(self._settings) or "the engine is not running")
        return self._kv_mirror

    async def read_kv_cache(self) -> KvSnapshot:
        """See the port. Reads the radix tree in SGLang's scheduler."""
        self.kv_cache()
        self._check_alive()
        assert self._kv_follower is not None
        return await self._kv_follower.read()

    async def _ask_dump(self, number: int) -> None:
        """Have the scheduler publish its cache under a number, among its events.

        Raises:
            EngineFailed: it has died, or could not read its cache.
        """
        from sglang.srt.managers.io_struct import SetInternalStateReq

        request = SetInternalStateReq(server_args={REQUEST_KEY: number})
        if not all(await self._unless_failed(self._engine.tokenizer_manager.set_internal_state(request))):
            raise EngineFailed("SGLang's scheduler could not read its prefix cache")

    async def _unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, through a stall if there is one; raise EngineFailed if the engine fails first."""
        call = asyncio.create_task(work)
        over = asyncio.create_task(self._over.wait())
        try:
            either: set[asyncio.Future[Any]] = {call, over}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._check_lives()
            return await call
        finally:
            call.cancel()
            over.cancel()

    def _check_alive(self) -> None:
        self._check_lives()
        if self._stall is not None:
            raise EngineFailed(self._stall)

    def _check_lives(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)
        if self._engine is None or self._stopping is not None:
            raise EngineFailed("the engine is not running")
