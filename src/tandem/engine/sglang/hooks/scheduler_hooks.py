"""Hooks that Tandem registers in SGLang's processes through its hook registry: KV bytes, error reports, CPU use.

Each hook records a statistic, reports the reason of a crash, lifts a needless limit, or (on a CPU only) registers host
memory and avoids busy loops; `seeded_sampling` makes seeds effective, `grammars` rejects unusable grammars, and
`handover_port` and `bootstrap_server` drop what foreign senders send, `transfer_queues` writes to each decode engine
in a thread of its own, `kv_check` digests what is handed over. No hook changes the tokens of a request without a
seed. SGLang only logs a hook that fails to apply; `compat.check_hooks` fails
the start instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import pkgutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.engine.sglang import reports
from tandem.engine.sglang.environment import REPORT_FILE
from tandem.engine.sglang.hooks import (
    bootstrap_server,
    cache_dump,
    grammars,
    handover_port,
    kv_check,
    role_switch,
    seeded_sampling,
    transfer_queues,
    unequal_tp,
    unpinned,
)
from tandem.engine.sglang.hooks.handover_messages import STATUS_FRAMES
from tandem.engine.sglang.hooks.kv_accounting import TransferStats, kv_shards

log = logging.getLogger(__name__)

FACTS_KEY = "tandem"
"""Key of what the hooks add: per request in `meta_info`, per engine in SGLang's start-up message."""
ROLES = ("prefill", "decode", "aggregated")
_MAX_REQ_LEN_AT = 4
"""Index of max_req_len in the result of TpModelWorker.get_worker_info; max_req_input_len follows."""
IDLE_POLL_MS = 1
PROGRESS_DELAY_US = 5_000
"""Poll interval of NIXL's progress thread, which events on its connections wake in addition."""
PEER_PROBE_TIMEOUT_S = 0.5

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_WORKER = "sglang.srt.managers.tp_worker.TpModelWorker"
_CHANNELS = "sglang.srt.managers.scheduler_components.ipc_channels.SchedulerIpcChannels"
_LOADS = "sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
_SCALING = ("sglang.srt.sampling.sampling_batch_info", "sglang.srt.sampling.penaltylib.repetition_penalty")
"""Modules that import `apply_scaling_penalties` by name, so both have to be hooked."""
_NIXL = "sglang.srt.disaggregation.nixl.conn"
_SENDS = ("send_kvcache", "send_kvcache_slice", "send_kvcache_mixed", "send_kvcache_dcp")

_transfers = TransferStats()
_sending = threading.local()


def targets(device: str) -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of a child process: dotted target -> (hook, kind)."""
    hooks: dict[str, tuple[Callable[..., Any], str]] = {
        f"{_SCHEDULER}.__init__": (_report_start_failure, "around"),
        f"{_SCHEDULER}.run_event_loop": (_report_failure, "around"),
        f"{_SCHEDULER}.get_init_info": (_describe, "after"),
        f"{_SCHEDULER}.get_output_streamer_class": (_streamer_class, "after"),
        f"{_SCHEDULER}.run_batch": (_note_recomputed, "before"),
        "sglang.srt.distributed.bootstrap._resolve_dist_init_method": (_meet_in_a_file, "after"),
        f"{_CHANNELS}.create": (_skip_detokenizer, "around"),
        f"{_WORKER}.get_worker_info": (_use_whole_context, "after"),
        f"{_LOADS}.get_loads": (_account_for_pages, "after"),
        f"{_SCHEDULER}.on_idle": (_publish_while_waiting, "after"),
        **seeded_sampling.targets(),
        **grammars.targets(),
        **cache_dump.targets(),
    }
    if device == "cpu":
        hooks[f"{_SCHEDULER}.on_idle"] = (_publish_and_sleep_while_waiting, "after")
        hooks |= unpinned.targets()
        hooks |= {f"{module}.apply_scaling_penalties": (_apply_penalties_uncompiled, "around") for module in _SCALING}
    return hooks if importlib.util.find_spec("nixl") is None else hooks | _nixl_targets(device)


def _nixl_targets(device: str) -> dict[str, tuple[Callable[..., Any], str]]:
    hooks: dict[str, tuple[Callable[..., Any], str]] = {
        "nixl._api.nixl_agent_config.__init__": (_capture_telemetry, "around"),
        f"{_NIXL}.NixlKVManager.update_status": (_note_room, "before"),
        f"{_NIXL}.NixlKVManager._await_handles": (_wait_and_count, "around"),
        f"{_NIXL}.NixlKVManager._encode_kv_status_message": (_append_moved_bytes, "after"),
        f"{_NIXL}.NixlKVManager.parse_kv_status_message": (_record_received_bytes, "after"),
        f"{_NIXL}.NixlKVManager.try_ensure_parallel_info": (_probe_peer_first, "around"),
        **{f"{_NIXL}.NixlKVManager.{name}": (_note_handles, "after") for name in _SENDS},
        **handover_port.targets(),
        **bootstrap_server.targets(),
        **role_switch.targets(),
        **transfer_queues.targets(),
        **kv_check.targets(device),
    }
    if device == "cpu":
        hooks[f"{_NIXL}.NixlKVManager.__init__"] = (_register_host_memory, "before")
        hooks[f"{_NIXL}.NixlKVManager._prepare_payload_xfer"] = (unequal_tp.prepare, "around")
        hooks["nixl._api.nixl_agent.__init__"] = (_limit_progress_polling, "around")
    return hooks


def register_in_child(device: str) -> None:
    """Register every hook of the scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in ("decode", "prefill"):
        logging.getLogger(f"sglang.srt.disaggregation.{name}").addFilter(_drop_abort_errors)
    # The client that sent a bad grammar gets the error; SGLang would also log the whole grammar as an error.
    logging.getLogger("sglang.srt.constrained").setLevel(logging.CRITICAL)
    for target, (hook, kind) in targets(device).items():
        HookRegistry.register(target, hook, HookType(kind))


def targets_in_main() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the worker's process: SGLang must not reconfigure its logging, and its bootstrap server is checked."""
    hooks: dict[str, tuple[Callable[..., Any], str]] = {
        "sglang.srt.utils.common.configure_logger": (_skip_configure_logger, "replace")
    }
    return hooks if importlib.util.find_spec("nixl") is None else hooks | bootstrap_server.targets_in_main()


def register_in_main() -> None:
    """Register every hook of the worker's process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (hook, kind) in targets_in_main().items():
        HookRegistry.register(target, hook, HookType(kind))


def in_place(names: list[str]) -> list[str]:
    """The targets that are hooked in this process."""
    return [name for name in names if hasattr(pkgutil.resolve_name(name), "__wrapped__")]


# --- Failure reports


def _report_start_failure(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    try:
        return original(*arguments, **keywords)
    except Exception as problem:  # the start raises exceptions of many libraries
        log.debug("SGLang's scheduler failed to start", exc_info=True)
        # Re-raising would make SGLang log a traceback and send SIGQUIT to the worker.
        reports.end(problem)


def _report_failure(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    try:
        return original(*arguments, **keywords)
    except Exception as problem:  # whatever ends the scheduler ends its process
        log.exception("SGLang's scheduler failed; this process exits")
        reports.end(problem)


def _skip_configure_logger(*arguments: Any, **keywords: Any) -> None:
    pass


def _drop_abort_errors(record: logging.LogRecord) -> bool:
    """Drop SGLang's error records about aborted requests: an abort is normal."""
    return "Aborted by" not in record.getMessage()


def _skip_detokenizer(original: Callable[..., Any], cls: type, *arguments: Any, **keywords: Any) -> Any:
    """Send token ids straight to the worker's process: frontends detokenize, and `launch` starts no detokenizer."""
    return original(cls, *arguments, **{**keywords, "skip_tokenizer_init": True})


def _meet_in_a_file(method: str, *, dist_port: int) -> str:
    """Let the ranks of this engine, all on this machine, meet in a file: torch's store listens on every address.

    The port is the same in all ranks, and no other group's.
    """
    if not method.startswith("tcp://"):
        return method
    return Path(os.environ[REPORT_FILE]).with_name(f"ranks-{dist_port}").as_uri()


# --- What the scheduler reports


def _describe(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Add the applied hooks and the KV pool's sizes to the scheduler's start-up message."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    _, _, page_bytes = pool.get_contiguous_buf_infos()
    device = "cpu" if str(pool.device).startswith("cpu") else "cuda"
    info[FACTS_KEY] = {
        "hooks": in_place(list(targets(device))),
        "context_tokens_max": {role: _context_tokens_max(scheduler, role) for role in ROLES},
        "running_requests_max": scheduler.max_running_requests,
        "page_size_tokens": scheduler.page_size,
        "kv_dtype": str(pool.dtype).removeprefix("torch."),
        "kv_bytes_per_token": sum(page_bytes) // scheduler.page_size * _kv_shards(scheduler),
    }
    return info


def _kv_shards(scheduler: Any) -> int:
    """How many ranks share out the KV of a token."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.runtime_context import get_parallel

    config = scheduler.model_config
    if config.attention_arch == AttentionArch.MLA:
        # Each rank has the whole latent.
        return 1
    return kv_shards(config.get_total_num_kv_heads(), config.get_num_kv_heads(get_parallel().attn_tp_size))


def _use_whole_context(info: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """Use the 5 tokens of context that SGLang reserves without a need; speculative decoding does need them."""
    server_args = worker.server_args
    if server_args.speculative_algorithm is not None:
        return info
    kv_tokens, context_tokens = info[0], worker.model_config.context_len
    # A request gets `max_req_len - prompt - 1` tokens at most, and its prompt must be below `max_req_input_len`.
    max_req_len = min(context_tokens + 1, kv_tokens - 1)
    at = _MAX_REQ_LEN_AT
    return (*info[:at], max_req_len, max_req_len - 1, *info[at + 2 :])


def _context_tokens_max(scheduler: Any, role: str) -> int:
    """Largest number of prompt plus completion tokens that the scheduler accepts in a role."""
    # One page is the allocator's reserve, and the last page of a prompt may be nearly empty.
    reserve_tokens = 2 * scheduler.page_size
    if role == "decode":
        # A prompt is admitted only while this much stays free; otherwise it waits until it times out.
        reserve_tokens += scheduler.server_args.num_reserved_decode_tokens
    kv_tokens = scheduler.max_total_num_tokens - reserve_tokens
    return int(min(scheduler.max_req_len - 1, scheduler.max_req_input_len, kv_tokens))


def _streamer_class(streamer: type, scheduler: Any) -> type:
    """A subclass of SGLang's streamer that adds `_facts` to the end of each request."""
    shards = _kv_shards(scheduler)

    class FactStreamer(streamer):  # type: ignore[misc]
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            more: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
            mode = self.disaggregation_mode.value
            more[FACTS_KEY] = [[_facts(req, mode, shards)] if req.finished() else [] for req in reqs]
            return more

    return FactStreamer


def _facts(req: Any, mode: str, shards: int) -> dict[str, Any]:
    """Timings and counts of a request that has ended; keys are fields of EngineTimings and EngineFinish.

    Only the first rank reports; `shards` ranks have moved as many bytes as it has.
    """
    from sglang.srt.observability.req_time_stats import convert_time_to_realtime

    def time_s(counter: float) -> float | None:
        return convert_time_to_realtime(counter) if counter > 0 else None

    stats = req.time_stats
    transfer, recomputed_tokens = _transfers.close(req.bootstrap_room, req.rid)
    decodes = mode == "decode"
    first_token = stats.decode_prebuilt_finish_time if decodes else stats.prefill_finished_time
    return {
        "queued_time_s": time_s(stats.scheduler_recv_time),
        "bootstrap_end_time_s": time_s(stats.wait_queue_entry_time) if mode == "prefill" else None,
        "preallocation_end_time_s": time_s(stats.decode_transfer_queue_entry_time) if decodes else None,
        "prefill_start_time_s": None if decodes else time_s(stats.forward_entry_time),
        "prefill_end_time_s": None if decodes else time_s(stats.prefill_finished_time),
        "kv_transfer_start_time_s": transfer.start_s,
        "kv_transfer_end_time_s": transfer.end_s,
        "first_token_time_s": time_s(first_token),
        "kv_transfer_bytes": transfer.moved_bytes_of(shards),
        "recomputed_tokens": recomputed_tokens if decodes else None,
        "kv_checked": hasattr(req, kv_check.CHECKED) if decodes else None,
    }


def _account_for_pages(snapshot: Any, inquirer: Any) -> Any:
    from tandem.engine.sglang.hooks import kv_snapshot

    return kv_snapshot.account(snapshot, inquirer)


def _note_recomputed(scheduler: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
    """On decode, count prompt tokens that the model computes: their KV was not received."""
    if scheduler.disaggregation_mode.value == "decode" and batch.forward_mode.is_extend_without_speculative():
        for req, token_count in zip(batch.reqs, batch.extend_lens, strict=True):
            _transfers.recomputed(req.rid, token_count)


def _publish_while_waiting(result: None, scheduler: Any) -> None:
    """Publish KV events also while requests wait and nothing is computed; SGLang does so after a step or fully idle.

    A decode engine evicts pages for requests whose prefill worker has died. Until its next step, up to 30 s later,
    frontends would still take them for cached.
    """
    scheduler.kv_events_publisher.publish_kv_events()


# --- Transferred bytes, on prefill


def _capture_telemetry(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return original(*arguments, **{**keywords, "capture_telemetry": True})


def _note_room(manager: Any, bootstrap_room: int, status: Any) -> None:
    """Remember, per transfer thread, the room whose pages it is about to write: the write calls do not carry it."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    if status == KVPoll.Transferring:
        _sending.room, _sending.handles = bootstrap_room, []
        # Timed before the pages are submitted: with many small pages, submitting takes most of the time.
        _transfers.began(bootstrap_room, time.time())


def _note_handles(result: Any, *arguments: Any, **keywords: Any) -> None:
    """Collect the handles of KV page writes, so that metadata buffers are not counted as KV."""
    room = getattr(_sending, "room", None)
    if room is not None and result is not None:
        _sending.handles.extend(result if isinstance(result, list) else [result])


def _wait_and_count(
    original: Callable[..., Any], manager: Any, handles: list[Any], *, failure_seen: bool
) -> tuple[bool, bool]:
    """When every write of a chunk is complete, add the bytes that NIXL's telemetry reports."""
    if not failure_seen:
        transfer_queues.wait_with_pauses(manager, handles)
    settled, failed = original(manager, handles, failure_seen=failure_seen)
    _count_moved(manager, settled and not failed)
    return settled, failed


def _count_moved(manager: Any, arrived: bool) -> None:
    room, handles = getattr(_sending, "room", None), getattr(_sending, "handles", [])
    _sending.handles = []
    if room is None or not arrived:
        return
    try:
        moved_bytes = sum(manager.agent.get_xfer_telemetry(handle).totalBytes for handle in handles)
    except Exception as problem:  # an agent without telemetry raises its own errors
        log.warning("NIXL telemetry missing for room %s, its transferred bytes are not counted: %s", room, problem)
        return
    _transfers.moved(room, moved_bytes, time.time())


def _append_moved_bytes(frames: list[bytes], manager: Any, *, bootstrap_room: int, **keywords: Any) -> list[bytes]:
    """Send decode the number of bytes written; a decode engine without Tandem ignores the extra frame."""
    moved_bytes = _transfers.moved_bytes(bootstrap_room)
    if moved_bytes is not None and len(frames) == STATUS_FRAMES:
        # With more ranks on decode this one feeds several of them, in equal parts.
        frames.append(str(moved_bytes // unequal_tp.fed_ranks(manager, bootstrap_room)).encode("ascii"))
    return frames


# --- Transferred bytes, on decode


def _record_received_bytes(status: tuple[int, int, int, str | None] | None, manager: Any, msg: list[bytes]) -> None:
    """Record the bytes that prefill reports when a room's KV has arrived."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    if status is not None and status[1] == KVPoll.Success and len(msg) > STATUS_FRAMES:
        _transfers.moved(status[0], int(msg[STATUS_FRAMES]), time.time())


def _probe_peer_first(original: Callable[..., Any], manager: Any, bootstrap_addr: str) -> bool:
    """Probe a new prefill engine before SGLang contacts it in the scheduler loop, where every stream waits.

    A frozen peer would block the loop for SGLang's 5 s, and an incompatible one would crash this engine.
    """
    import requests

    if bootstrap_addr in manager.prefill_info_table:
        return True
    try:
        requests.get(f"http://{bootstrap_addr}/health", timeout=PEER_PROBE_TIMEOUT_S)
        return bool(original(manager, bootstrap_addr))
    except (requests.RequestException, ValueError) as problem:
        # ValueError: the host is not valid in a URL, for which `requests` has no error of its own.
        log.warning("prefill worker at %s is unreachable, its requests fail: %s", bootstrap_addr, problem)
    except RuntimeError as problem:
        log.error("prefill worker at %s is incompatible with this decode engine: %s", bootstrap_addr, problem)
    return False


# --- On a CPU


def _register_host_memory(manager: Any, kv_args: Any, *arguments: Any, **keywords: Any) -> None:
    """Register the KV pool as host memory; NIXL would otherwise register it as GPU memory, and fail."""
    kv_args.kv_data_mem_kinds = ["DRAM"] * len(kv_args.kv_data_ptrs)


def _apply_penalties_uncompiled(original: Callable[..., Any], logits: Any, scaling_penalties: Any) -> None:
    """SGLang's function, uncompiled: compiling it at first use, in the scheduler loop, would block every stream for
    tens of seconds. Functions compiled at start (rotary embedding) stay compiled, which is worth a tenth of the speed.
    """
    import torch

    logits[:] = torch.where(logits < 0, logits * scaling_penalties, logits / scaling_penalties)


def _publish_and_sleep_while_waiting(result: None, scheduler: Any) -> None:
    """Also sleep while requests wait for their other leg: SGLang busy-loops, on the core that the other leg needs."""
    _publish_while_waiting(result, scheduler)
    if scheduler.idle_sleeper is not None and not scheduler.is_fully_idle():
        scheduler.idle_sleeper.poller.poll(IDLE_POLL_MS)


def _limit_progress_polling(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Enforce a minimum delay: NIXL's Python API sets the progress thread's to 0, which busy-loops on one core."""
    bindings = importlib.import_module("nixl._api").nixlBind
    config_type: Any = bindings.nixlAgentConfig
    delay = config_type.pthrDelay

    class PollingConfig(config_type):  # type: ignore[misc]
        """A configuration whose delay is at least PROGRESS_DELAY_US."""

        @property
        def pthrDelay(self) -> int:  # noqa: N802 -- NIXL's name
            return int(delay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, delay_us: int) -> None:  # noqa: N802
            delay.__set__(self, max(delay_us, PROGRESS_DELAY_US))

    bindings.nixlAgentConfig = PollingConfig
    try:
        return original(*arguments, **keywords)
    finally:
        bindings.nixlAgentConfig = config_type
