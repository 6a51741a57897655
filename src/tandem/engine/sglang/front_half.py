"""SGLang's front half in the worker's process: requests go in, and each step's outputs go straight to their answers.

SGLang's own TokenizerManager wakes a task for each request and step, builds a dictionary of everything known so far,
and hands it through a generator: about 23 us a token, beside the engine on one core. Here the loop that reads the
scheduler's socket gives each request its new tokens. Requests are checked, numbered, sent and aborted by SGLang's own
code. Imported only when an engine starts, because it imports SGLang.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import BatchTokenIDOutput, GenerateReqInput, unwrap_from_pickle
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from tandem.engine.sglang.hooks.scheduler_hooks import FACTS_KEY
from tandem.engine.sglang.responses import Answers, is_corrupt
from tandem.errors import EngineFailed, TandemError

log = logging.getLogger(__name__)


class FrontHalf(TokenizerManager):  # type: ignore[misc]
    """SGLang's TokenizerManager without its tasks: the adapter runs `handle_loop`, so no error kills the process."""

    def auto_create_handle_loop(self) -> None:
        """Nothing: SGLang would install signal handlers here and start a task that ends the process on an error."""

    async def submit(self, arguments: dict[str, Any], answers: Answers) -> None:
        """Check a request and send it to the scheduler; its outputs go to `answers`.

        Raises:
            ValueError: SGLang refuses it.
        """
        given = GenerateReqInput(**arguments)
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

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        """The outputs of one step of the scheduler. A row that cannot be read ends its own request."""
        if not isinstance(recv_obj, BatchTokenIDOutput):
            await super()._handle_batch_output(recv_obj)
            return
        facts = (unwrap_from_pickle(recv_obj.customized_info) or {}).get(FACTS_KEY)
        states = self.rid_to_state
        for i, rid in enumerate(recv_obj.rids):
            # A request that the scheduler still spoke of when its end was already known here.
            state = states.get(rid)
            if state is None:
                continue
            try:
                self._handle_row(rid, state, recv_obj, i, facts)
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
