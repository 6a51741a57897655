"""In the scheduler: publishes, on request, the hashes of all blocks of the prefix cache among the KV events.

Read from the radix tree, not from earlier events, so that it repairs what they lost and proves what they reported. In
order with them: pending events are published before. SGLang's tree in Rust cannot be walked from Python, but prints the
ids of its nodes, and returns a node's tokens by its id; their hashes are computed here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from tandem.domain.kv_blocks import chain, first_digest, hashes_of
from tandem.engine.sglang.kv_events import DUMP

log = logging.getLogger(__name__)

REQUEST_KEY = "tandem_cache_dump"
"""Key in SGLang's request to change settings: its value is the number under which the cache is published."""
_NODE = re.compile(r"^ *\[(\d+)\] \d+ .*\bFull=yes", re.MULTILINE)


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler."""
    return {"sglang.srt.managers.scheduler.Scheduler.set_internal_state": (_publish_on_request, "around")}


def _publish_on_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    number = request.server_args.get(REQUEST_KEY)
    if number is None:
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    try:
        # Of several ranks, the one that publishes events has the cache that they describe.
        if scheduler.kv_events_publisher.enable_kv_cache_events:
            publish(scheduler, int(number))
    except Exception:  # whatever a debugging aid of SGLang's does, the engine goes on
        log.exception("the prefix cache could not be read")
        return SetInternalStateReqOutput(updated=False)
    return SetInternalStateReqOutput(updated=True)


def publish(scheduler: Any, number: int) -> None:
    """Publish the pending events, and then the contents of the cache."""
    from sglang.srt.disaggregation.kv_events import KVEventBatch

    publisher = scheduler.kv_events_publisher
    publisher.publish_kv_events()
    dump = {"type": DUMP, "number": number, "block_hashes": cached_blocks(scheduler.tree_cache)}
    publisher.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=[dump]))


def cached_blocks(tree_cache: Any) -> list[int]:
    """Hashes of all blocks in a tree cache of SGLang's, in any of its implementations."""
    tree = getattr(tree_cache, "tree_core", tree_cache)
    return list(_rust_blocks(tree) if hasattr(tree, "_binding") else _python_blocks(tree))


def _rust_blocks(tree: Any) -> Iterator[int]:
    binding, page, lora_names = tree._binding, tree.page_size, tree.kv_events._lora_names
    digests: dict[int, list[bytes]] = {}
    # Printed in the order of a walk: a parent comes before its children.
    for node_id in map(int, _NODE.findall(_printed(binding.pretty_print))):
        node = binding.snapshot_buffer_backup(node_id, False)
        before = first_digest(node.cache_salt) if node.parent_is_root else digests[node.parent_node_id][-1]
        digests[node_id] = chain(before, array("q", node.key_token_ids), page)
        has_adapter = lora_names.get(node.extra_key) is not None
        yield from hashes_of(digests[node_id], node.extra_key if has_adapter else None)


def _printed(print_tree: Callable[[], None]) -> str:
    """What native code writes to the standard output."""
    sys.stdout.flush()
    with os.fdopen(os.memfd_create("tree"), "w+b") as file:
        output = os.dup(1)
        try:
            os.dup2(file.fileno(), 1)
            print_tree()
        finally:
            os.dup2(output, 1)
            os.close(output)
        file.seek(0)
        return file.read().decode()


def _python_blocks(tree: Any) -> Iterator[int]:
    """Hashes as the tree's recorder would publish them: the events of a removal of every node, which are not sent."""
    recorder = tree.kv_events
    pending, recorder._queue = recorder._queue, []
    try:
        nodes = list(tree.root_node.children.values())
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if not node.evicted:
                recorder.record_remove(node)
        for event in recorder._queue:
            yield from event.block_hashes
    finally:
        recorder._queue = pending
