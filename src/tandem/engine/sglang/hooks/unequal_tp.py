"""Hands KV over between engines of unequal tensor parallelism on a CPU, in the scheduler of the prefill engine.

SGLang slices pages by KV heads for it, and has NIXL write the slices; it does so for GPU memory only. Here the same
lists are made of host memory, which is what the pools on a CPU are registered as.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HOST = "DRAM"
"""NIXL's word for host memory."""


def prepare(original: Callable[..., Any], manager: Any, peer_info: Any) -> Any:
    """Prepare the writes to a decode engine, once for each of its ranks."""
    is_equal = peer_info.decode_tp_size == manager.attn_tp_size
    is_latent = manager.is_mla_backend or manager.is_hybrid_mla_backend
    if is_equal or is_latent or peer_info.requires_dcp_relayout or not manager.kv_args.kv_item_lens:
        return original(manager, peer_info)
    peer_info.dst_homogeneous_mem_kind = HOST
    manager._init_hetero_tp_prep_handle(peer_info.agent_name, peer_info, src_mem_kind=HOST, dst_mem_kind=HOST)
    return None


def fed_ranks(manager: Any, bootstrap_room: int) -> int:
    """Ranks of a room's decode engine to which this rank of prefill writes KV, at least 1."""
    peers = manager.transfer_infos.get(bootstrap_room, {}).values()
    return max(1, sum(not peer.is_dummy for peer in peers))
