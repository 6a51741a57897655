"""In the scheduler: what SGLang's switch between prefill and decode lacks over NIXL, and for its prefix cache.

SGLang rebuilds the structures of a role at run time, but its NIXL manager does not say that it can be taken down, and
cannot. A tree cache is built for the role that an engine starts in: here it is built for both, and disabled in the
decode role as SGLang's own would be. The bootstrap port of a prefill role is a new one each time, because decode
engines keep what they know of a prefill engine by that address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.engine.sglang.environment import PREFIX_CACHE, REPORT_FILE

log = logging.getLogger(__name__)

PORT_FILE = "bootstrap-port"
"""File in the engine's directory with the port of the bootstrap server that the worker has started."""
FITS_BOTH = "tandem_fits_both"
"""Attribute of a tree cache: whether `disable` follows from the role alone."""
THREAD_END_S = 2.0
"""How long the teardown waits for a thread of the former role; the port's notices within 0.25 s."""

_NIXL = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {
        "sglang.srt.disaggregation.role_switch.handle_pd_role_switch": (_switch, "around"),
        "sglang.srt.disaggregation.base.conn.BaseKVManager.teardown": (_tear_down, "replace"),
        "sglang.srt.managers.scheduler.Scheduler.init_disaggregation": (_fit_cache, "after"),
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.__init__": (_build_for_both_roles, "around"),
    }


def _switch(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """SGLang's switch, for a NIXL manager too; refused where memory or cache were built for one role."""
    from sglang.srt.disaggregation.nixl.conn import NixlKVManager
    from sglang.srt.managers.io_struct import PdRoleSwitchReqOutput
    from sglang.srt.runtime_context import get_context

    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm or not getattr(scheduler.tree_cache, FITS_BOTH, False):
        return PdRoleSwitchReqOutput(
            success=False,
            message="the memory or the prefix cache of this model was built for one role",
            old_role=scheduler.disaggregation_mode.value,
            new_role=request.new_role,
        )
    NixlKVManager.supports_role_switch = True
    if request.new_role == "prefill":
        port = int(Path(os.environ[REPORT_FILE]).with_name(PORT_FILE).read_text())
        get_context().override("tandem.role_switch", disaggregation_bootstrap_port=port)
    return original(scheduler, request)


class _End:
    """Ends the transfer thread that takes it from its queue: the first thing it reads is the room."""

    @property
    def room(self) -> int:
        raise SystemExit


def _tear_down(manager: Any) -> None:
    """End the threads of a NIXL manager, and release its peers, memory registrations and sockets.

    The engine is idle: no transfer is under way.
    """
    if (heartbeat := getattr(manager, "_heartbeat_shutdown", None)) is not None:
        heartbeat.set()
    for queue in getattr(manager, "transfer_queues", ()):
        queue.put(_End())
    if (queues := getattr(manager, "tandem_queues", None)) is not None:
        queues.end(_End())
    # Before the agent is touched: this thread may be taking in a peer.
    manager.server_socket.shut(THREAD_END_S)
    _release(manager)
    with manager._socket_lock:
        for socket in (*manager._socket_cache.values(), *manager._monitor_cache.values()):
            socket.close(0)
        manager._socket_cache.clear()
        manager._monitor_cache.clear()
    if (executor := getattr(manager, "_prefill_recompute_executor", None)) is not None:
        executor.shutdown(wait=False, cancel_futures=True)
    # In a thread, because it waits until the last socket of the context is closed.
    threading.Thread(target=manager._zmq_ctx.term, name="zmq-end", daemon=True).start()


def _release(manager: Any) -> None:
    """Have NIXL forget the peers and this engine's memory."""
    agent, peers = manager.agent, getattr(manager, "decode_kv_args_table", {})
    # Their handles first: they refer to the peers' memory.
    for handles in (manager.prep_handles, manager.prep_handles_slice_dst, manager.prep_handles_segment_src):
        handles.clear()
    manager._prepared_state_plans.clear()
    manager.prep_handle_slice_src = None
    for peer in list(peers):
        # NIXL raises for a peer that has disconnected.
        with contextlib.suppress(Exception):
            agent.remove_remote_agent(peer)
    peers.clear()
    for registered in (*manager.kv_descs, manager.aux_descs, getattr(manager, "state_descs", None)):
        if registered:
            agent.deregister_memory(registered)
    # With the last reference to it go its threads and connections; the manager itself is in a cycle of references.
    manager.agent = None


def _build_for_both_roles(original: Callable[..., Any], cache: Any, params: Any) -> None:
    """Build a complete tree, with its events, also where the first role uses none; `disable` is checked at each use."""
    from sglang.srt.runtime_context import get_disagg

    if not get_disagg().enable_pd_role_switch:
        original(cache, params)
        return
    original(cache, replace(params, disable=False))
    cache.disable = params.disable
    # SGLang disables it for some models, whatever the role.
    setattr(cache, FITS_BOTH, bool(params.disable) is _is_disabled(get_disagg().disaggregation_mode))


def _fit_cache(result: None, scheduler: Any) -> None:
    """After a switch: use the prefix cache as an engine would that had started in this role."""
    if getattr(scheduler, "_pd_role_switch_in_progress", False):
        is_disabled = _is_disabled(scheduler.disaggregation_mode.value)
        scheduler.tree_cache.disable = scheduler.disable_radix_cache = is_disabled


def _is_disabled(role: str) -> bool:
    """Whether an engine that starts in this role has no prefix cache, by its arguments."""
    from sglang.srt.runtime_context import get_disagg

    if os.environ[PREFIX_CACHE] != "1":
        return True
    return role == "decode" and not get_disagg().disaggregation_decode_enable_radix_cache
