"""SGLang's front half in the worker's process: requests go in, and each step's outputs go straight to their answers.

SGLang's own TokenizerManager wakes a task for each request and step, builds a dictionary of everything known so far,
and hands it through a generator: about 23 us a token, beside the engine on one core. Here the loop that reads the
scheduler's socket gives each request its new tokens. Requests are checked, numbered, sent and aborted by SGLang's own
code. Imported only when an engine starts, because it imports SGLang.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import (
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    EmbeddingReqInput,
    GenerateReqInput,
    unwrap_from_pickle,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from tandem.engine.sglang.hooks.scheduler_hooks import FACTS_KEY
from tandem.engine.sglang.responses import Answers, is_corrupt
from tandem.errors import EngineFailed, TandemError

log = logging.getLogger(__name__)


class FrontHalf(TokenizerManager):  # type: ignore[misc]
    """SGLang's TokenizerManager without its tasks: the adapter runs `handle_loop`, so no error kills the process."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._doubtful: set[str] = set()
        """Ids of adapters that the scheduler may have although their load has not ended well."""

    def auto_create_handle_loop(self) -> None:
        """Nothing: SGLang would install signal handlers here and start a task that ends the process on an error."""

    async def submit(self, arguments: dict[str, Any], answers: Answers, *, embeds: bool = False) -> None:
        """Check a request and send it to the scheduler; its outputs go to `answers`.

        Args:
            arguments: of GenerateReqInput, or of EmbeddingReqInput where it `embeds`.
            answers: get its outputs.
            embeds: whether it computes an embedding.

        Raises:
            ValueError: SGLang refuses it.
        """
        given = (EmbeddingReqInput if embeds else GenerateReqInput)(**arguments)
        given.normalize_batch_and_arguments()
        self._set_default_priority(given)
        self._init_req_state(given)
        state = self.rid_to_state[given.rid]
        state.answers = answers
        try:
            async with self.is_pause_cond:
                await self.is_pause_cond.wait_for(lambda: not self.is_pause)
            async with self.model_update_lock.reader_lock:
                await self._validate_and_resolve_lora(given)
                await self._send_one_request(await self._tokenize_one_request(given))
        except BaseException:  # a cancellation must release the state too
            self._release_req_states_on_failure({given.rid: state})
            raise
        if state.abort_sent:
            # Aborted on its way: the scheduler had not heard of it then.
            state.abort_sent = False
            self.abort_request(given.rid)

    async def load_adapter(self, engine_id: str, path: str) -> None:
        """Load an adapter under an id of ours, which is its name here and a part of its KV blocks' hashes.

        SGLang's own method draws a random id in each engine, so that no frontend could compute a hash.

        Raises:
            ValueError: SGLang refuses it.
        """
        from sglang.srt.lora.lora_registry import LoRARef
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput

        async with self.lora_update_lock:
            if engine_id in self.lora_registry.get_all_adapters():
                return
            if engine_id in self.pending_lora_unloads:
                await self._unload_lora_adapter_locked(UnloadLoRAAdapterReqInput(lora_name=engine_id))
            reference = LoRARef(lora_id=engine_id, lora_name=engine_id, lora_path=path, pinned=False)
            asked = LoadLoRAAdapterReqInput(lora_name=engine_id, lora_path=path, lora_id=engine_id)
            if engine_id in self._doubtful and not await self._undo_load(engine_id):
                raise ValueError("a part of it is left of a load that failed")
            self._doubtful.add(engine_id)
            results = await self.update_lora_adapter_communicator(asked)
            if all(result.success for result in results):
                await self.lora_registry.register(reference)
                self.lora_ref_cache[engine_id] = reference
                self._doubtful.discard(engine_id)
                return
            # A rank that has loaded it, or a part of it, must not keep it.
            await self._undo_load(engine_id)
            raise ValueError("; ".join({result.error_message or "unknown" for result in results if not result.success}))

    async def _undo_load(self, engine_id: str) -> bool:
        """Release what ranks may have of an adapter; returns whether all have.

        The scheduler dies of a load under an id that it has.
        """
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        asked = UnloadLoRAAdapterReqInput(lora_name=engine_id, lora_id=engine_id)
        is_undone = all(result.success for result in await self.update_lora_adapter_communicator(asked))
        if is_undone:
            self._doubtful.discard(engine_id)
        return is_undone

    async def unload_adapter(self, engine_id: str) -> None:
        """Release an adapter when its last request has ended.

        Raises:
            ValueError: SGLang refuses.
        """
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        known = engine_id in self.lora_registry.get_all_adapters() or engine_id in self.pending_lora_unloads
        # Else SGLang would load it again for a late request.
        self.lora_ref_cache.pop(engine_id, None)
        if known:
            result = await self.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=engine_id))
            if not result.success:
                raise ValueError(result.error_message or "unknown")

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        """The outputs of one step of the scheduler. A row that cannot be read ends its own request."""
        if isinstance(recv_obj, BatchEmbeddingOutput):
            self._handle_rows(recv_obj, None)
            return
        if not isinstance(recv_obj, BatchTokenIDOutput):
            await super()._handle_batch_output(recv_obj)
            return
        self._handle_rows(recv_obj, (unwrap_from_pickle(recv_obj.customized_info) or {}).get(FACTS_KEY))

    def _handle_rows(self, recv_obj: Any, facts: Any) -> None:
        handle = self._handle_embedding if isinstance(recv_obj, BatchEmbeddingOutput) else self._handle_row
        states = self.rid_to_state
        for i, rid in enumerate(recv_obj.rids):
            # A request that the scheduler still spoke of when its end was already known here.
            state = states.get(rid)
            if state is None:
                continue
            try:
                handle(rid, state, recv_obj, i, facts)
            except Exception as problem:  # a defect in one row must not end the others
                is_last = recv_obj.finished_reasons[i : i + 1] not in ([], [None])
                self._give_up(rid, state, problem, is_last=is_last)

    def _handle_row(self, rid: str, state: Any, recv_obj: Any, i: int, facts: Any) -> None:
        if state.time_stats.first_token_time == 0.0:
            state.time_stats.set_first_token_time()
        answers: Answers = state.answers
        token_ids, reason = recv_obj.output_ids[i], recv_obj.finished_reasons[i]
        if len(token_ids) and not is_corrupt(reason):
            answers.tokens(token_ids, recv_obj, i)
        if reason is not None:
            self._finish(rid, state, recv_obj, i)
            answers.end(reason, recv_obj, i, (facts[i] if facts else None) or None)

    def _handle_embedding(self, rid: str, state: Any, recv_obj: Any, i: int, facts: Any) -> None:
        if recv_obj.finished_reasons[i] is not None:
            self._finish(rid, state, recv_obj, i)
            state.answers.embedded(recv_obj, i)

    def _give_up(self, rid: str, state: Any, problem: Exception, *, is_last: bool) -> None:
        """A request whose row cannot be read: it ends, in the scheduler too, and the others go on."""
        log.error("aborting request %s: the engine's output for it is malformed", rid, exc_info=problem)
        if not isinstance(problem, TandemError):
            problem = EngineFailed(f"the engine's output for this request is malformed: {type(problem).__name__}")
        state.answers.fail(problem)
        if is_last:
            self.rid_to_state.pop(rid, None)
            self._release_lora_once(state)
        else:
            # Its state is left to the scheduler's last word of it, as that of any request that is aborted.
            self.abort_request(rid)

    def _finish(self, rid: str, state: Any, recv_obj: Any, i: int) -> None:
        """What SGLang does at a request's end, beside telling it."""
        del self.rid_to_state[rid]
        attributes = None
        if state.time_stats.trace_ctx.tracing_enable:
            attributes = self.convert_to_span_attrs(state, recv_obj, i)
        state.time_stats.set_finished_time(span_attrs=attributes)
        self._release_lora_once(state)

    def _handle_abort_req(self, recv_obj: Any) -> None:
        """The scheduler has aborted a request that had no output to end it with."""
        state = self.rid_to_state.pop(recv_obj.rid, None)
        if state is None:
            return
        state.time_stats.set_finished_time()
        self._release_lora_once(state)
        reason = recv_obj.finished_reason
        state.answers.broke(reason or {"message": recv_obj.abort_message or "the engine gave the request up"})
