"""SGLang's KV events: the settings under which it publishes them, and what its messages mean for the mirror.

A message is a sequence number and a batch of events, as MessagePack. Owns the check that the events are of the page
size and the hash rule that this worker knows: others are refused, because a wrong cache is worse than an unknown one.
`kv_follower` owns the sockets. Imports none of SGLang.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from tandem.domain.kv_blocks import HASH_RULE, block_hashes
from tandem.domain.worker import EMBED, WorkerRole
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.settings import EngineSettings

ARGUMENT = "kv_events_config"
REPLAY_STEPS = 1_000
"""Messages that SGLang keeps for a replay: some 20 MB where each is of a prompt of 2,000 pages. What is older is read
from the engine's cache itself."""
PAGE_MIN_TOKENS = 16
"""Smaller pages have events only on request: engine, worker and frontends spend time on each page."""
DEVICE_MEDIUM = "GPU"
"""SGLang's name for the engine's own KV memory, also on a CPU; blocks elsewhere (host memory, disk) are not counted."""
DUMP = "TandemCacheDump"
"""Type of the event that `hooks.cache_dump` publishes: the hashes of all blocks at that moment."""


def unavailable(settings: EngineSettings) -> str | None:
    """Why an engine with these settings cannot publish its KV events; None: it can."""
    extra = settings.extra
    page = int(extra.get("page_size") or 1)
    if settings.kv_events is False:
        return "this engine was started without KV events (kv_events)"
    if settings.kv_events is None and page < PAGE_MIN_TOKENS:
        return f"pages of {page} tokens (engine_extra.page_size) have KV events only on request (kv_events)"
    if settings.task == EMBED:
        return "an engine that computes embeddings keeps no prefix cache (task)"
    if extra.get("disable_radix_cache"):
        return "this engine has no prefix cache (engine_extra.disable_radix_cache)"
    if settings.role is WorkerRole.DECODE and not extra.get("disaggregation_decode_enable_radix_cache"):
        return "this engine has no prefix cache (engine_extra.disaggregation_decode_enable_radix_cache is not set)"
    if extra.get("dp_size", 1) != 1:
        return "KV events are not supported with several data-parallel ranks (engine_extra.dp_size)"
    return None


def is_published(settings: EngineSettings, *, both_roles: bool) -> bool:
    """Whether the engine must publish its events: it has some in its role, or (`both_roles`) in the other of a pair."""
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE) if both_roles else (settings.role,)
    return any(unavailable(replace(settings, role=role)) is None for role in roles)


def endpoints(directory: Path) -> tuple[str, str]:
    """Addresses of SGLang's event and replay sockets: files in the engine's own directory, so no port is open."""
    return f"ipc://{directory}/kv", f"ipc://{directory}/kvr"


def arguments(directory: Path) -> dict[str, Any]:
    """The argument of SGLang that makes it publish its events there."""
    endpoint, replay = endpoints(directory)
    config = {
        "publisher": "zmq",
        "endpoint": endpoint,
        "replay_endpoint": replay,
        "bind": True,
        "buffer_steps": REPLAY_STEPS,
    }
    return {ARGUMENT: json.dumps(config)}


class Refused(Exception):
    """An event that this worker does not understand; `str()` is one sentence."""


class EventReader:
    """Applies the batches of one engine to its mirror, in order."""

    def __init__(self, mirror: KvCacheMirror) -> None:
        self._mirror = mirror
        self._page = mirror.block_size_tokens
        self._checked = False
        """Whether the hash rule has been found right."""

    def apply(self, payload: bytes) -> list[Mapping[str, Any]]:
        """Apply the events of a batch; returns the dumps in it, which change nothing here.

        Raises:
            Refused: the batch cannot be read, or has an event of another page size, hash rule or type.
        """
        dumps = []
        for event in events_of(payload):
            if event["type"] == DUMP:
                dumps.append(event)
                continue
            try:
                self._apply(event)
            except (KeyError, TypeError, ValueError, OverflowError) as problem:
                raise Refused(f"its event {event['type']} cannot be read: {problem!r}") from None
        return dumps

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if event.get("medium") not in (None, DEVICE_MEDIUM):
            return
        if kind == "BlockStored":
            self._check(event)
            self._mirror.stored(event["block_hashes"], event.get("parent_block_hash"), array("i", event["token_ids"]))
        elif kind == "BlockRemoved":
            self._mirror.removed(event["block_hashes"])
        elif kind == "AllBlocksCleared":
            self._mirror.cleared()
        else:
            raise Refused(f"it has an event of the unknown type {kind}")

    def _check(self, event: Mapping[str, Any]) -> None:
        hashes, token_ids = event["block_hashes"], event["token_ids"]
        if event["block_size"] != self._page or len(token_ids) != len(hashes) * self._page:
            raise Refused(f"its blocks have {event['block_size']} tokens, its pages {self._page}")
        # A chain's first block can be hashed from its event alone. The hash of an adapter's block has its id in it,
        # which events do not carry.
        if self._checked or event.get("parent_block_hash") is not None or event.get("lora_name") is not None:
            return
        if block_hashes(token_ids, self._page, event.get("cache_salt")) != hashes:
            raise Refused(f"its hashes do not follow the rule {HASH_RULE}")
        self._checked = True


def events_of(payload: bytes) -> Sequence[Mapping[str, Any]]:
    """The events of a batch.

    Raises:
        Refused: it is no batch.
    """
    try:
        events = msgspec.msgpack.decode(payload)[1]
        if all("type" in event for event in events):
            return events  # type: ignore[no-any-return]
    except (msgspec.DecodeError, TypeError, LookupError) as problem:
        raise Refused(f"its message cannot be read: {problem}") from None
    raise Refused("its message has an event without a type")
