"""SGLang's switch between prefill and decode, from the worker's side: when it can be used, its arguments, the call.

The bootstrap server runs in this process, and only in the prefill role: a port of its own for each time, so that no
decode engine takes it for the former one. `hooks.role_switch` has what the scheduler needs.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import arguments
from tandem.engine.sglang.hooks.role_switch import PORT_FILE
from tandem.errors import EngineFailed

log = logging.getLogger(__name__)

NOT_IDLE = "not idle"
IDLE_TIMEOUT_S = 3.0
"""How long the engine may take to free the memory of requests that have just ended."""
IDLE_CHECK_S = 0.02
PEERS_FORGET_S = 10.0
"""Decode engines forget a prefill engine after two heartbeats that were not answered, 2 s apart."""
LISTEN_TIMEOUT_S = 2.0
EXTRA_SLOTS_BATCH_MAX = 32
EXCLUDED = {
    "tp_size": (None, 1),
    "pp_size": (None, 1),
    "dp_size": (None, 1),
    "ep_size": (None, 1),
    "dcp_size": (None, 1),
    "moe_a2a_backend": (None, "none"),
    "speculative_algorithm": (None,),
    "enable_hierarchical_cache": (None, False),
    "enable_hisparse": (None, False),
    "enable_lmcache": (None, False),
    "enable_unified_memory": (None, False),
    "disaggregation_decode_enable_offload_kvcache": (None, False),
    "disaggregation_decode_host_receive_threshold": (None, 1),
    "radix_cache_backend": (None,),
}
"""Arguments with which the switch was not tried, or which SGLang excludes; and the values that are no obstacle."""


def obstacle(settings: EngineSettings, device: str) -> str | None:
    """Why an engine that starts with these settings cannot switch; None: it can."""
    if settings.role is WorkerRole.AGGREGATED:
        return "SGLang switches between prefill and decode only, and this engine starts as aggregated"
    if not (device == "cpu" if settings.role_switch is None else settings.role_switch):
        return "this engine was started without role_switch"
    if settings.adapters is not None:
        return "with adapters no role is switched in place"
    if settings.transfer_backend != "nixl":
        return f"with transfer_backend {settings.transfer_backend} no role is switched"
    for name, harmless in EXCLUDED.items():
        if settings.extra.get(name) not in harmless:
            return f"with engine_extra.{name} no role is switched in place"
    return None


def server_arguments(settings: EngineSettings, device: str) -> dict[str, Any]:
    """Arguments of an engine that can switch: those that SGLang fixes at start must fit both roles."""
    count = arguments.running_requests_max(settings, device)
    return {
        "enable_pd_role_switch": True,
        # SGLang's default of a decode engine, which one that starts as prefill does not get.
        "disaggregation_decode_extra_slots": 2 * count if count <= EXTRA_SLOTS_BATCH_MAX else 0,
        **arguments.decode_arguments(settings, device),
        # A host pool would be built at the start of a decode engine only.
        "disaggregation_decode_retraction_backup": "cpu_tensor",
    }


async def switch(manager: Any, role: WorkerRole) -> None:
    """Have the scheduler switch, once it has freed what ended requests held.

    Args:
        manager: SGLang's tokenizer manager.
        role: prefill or decode.

    Raises:
        EngineFailed: the scheduler refused, or failed half way.
    """
    from sglang.srt.managers.io_struct import PdRoleSwitchReqInput

    loop = asyncio.get_running_loop()
    end_s = loop.time() + IDLE_TIMEOUT_S
    while True:
        # Without a size of decode's CUDA graphs SGLang refuses to capture them; with 0 it captures what fits.
        request = PdRoleSwitchReqInput(new_role=role.value, decode_cuda_graph_memory_gb=0.0)
        answer = await manager.pd_role_switch(request)
        if answer.success:
            return
        if NOT_IDLE not in answer.message or loop.time() > end_s:
            raise EngineFailed(f"SGLang did not switch to role {role.value}: {answer.message}")
        await asyncio.sleep(IDLE_CHECK_S)


async def open_bootstrap(manager: Any, host: str, port: int, directory: Path) -> None:
    """Start a bootstrap server for the prefill role; returns when it listens. The scheduler learns of it by a file.

    Raises:
        EngineFailed: it does not listen.
    """
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    (directory / PORT_FILE).write_text(str(port))
    server = manager.bootstrap_server = get_kv_class(TransferBackend.NIXL, KVClassType.BOOTSTRAP_SERVER)(host, port)
    try:
        async with asyncio.timeout(LISTEN_TIMEOUT_S):
            while not await _listens(host, port):
                if not server.thread.is_alive():
                    raise EngineFailed(f"SGLang's bootstrap server does not start at {host}:{port}")
                await asyncio.sleep(IDLE_CHECK_S)
    except TimeoutError:
        raise EngineFailed(f"SGLang's bootstrap server does not listen at {host}:{port}") from None


async def close_bootstrap(manager: Any) -> None:
    """End the bootstrap server, with all registrations, where there is one."""
    server, manager.bootstrap_server = manager.bootstrap_server, None
    if server is not None:
        await asyncio.to_thread(end_server, server)


def end_server(server: Any) -> None:
    """End a bootstrap server of SGLang's, within 2 s."""
    if server._loop.is_running():
        # SGLang leaves its task pending, which asyncio logs as an error when its loop has gone.
        server._loop.call_soon_threadsafe(lambda: [task.cancel() for task in server._background_tasks])
    server.close()


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host.strip("[]"), port)
    except OSError:
        return False
    writer.close()
    return True
