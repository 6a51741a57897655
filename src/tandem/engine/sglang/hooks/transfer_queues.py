"""A queue and a thread for each decode engine that a prefill engine writes to, so that none waits behind another.

SGLang spreads decode engines over a few transfer threads, by port number, and a thread waits for each write without a
limit. A decode engine that stands still (its host is frozen, its process stopped) thus holds up the hand-overs to every
engine that shares its thread; on a CPU, where there is one thread, to all. Here each engine has a thread of its own,
which ends when it was idle for THREAD_IDLE_S. A long wait also polls less often: SGLang polls without a pause, and
would spend a core, and the interpreter's lock, as long as the peer stands still.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_MANAGER = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"

THREAD_IDLE_S = 60.0
POLL_SHARE = 0.05
"""A wait is polled after this share of the time that it has lasted: a write is seen complete at most 5 % late."""
POLL_MIN_S, POLL_MAX_S = 0.000_05, 0.005
"""Below the first it only yields, as SGLang does."""


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {f"{_MANAGER}.add_transfer_request": (_queue_for_peer, "around")}


class IdlePeer(Exception):
    """Nothing was written to this peer for a while: ends its thread."""


class PeerQueue:
    """What is to be written to one decode engine, in order. SGLang's transfer thread calls `get`."""

    def __init__(self, idle_s: float = THREAD_IDLE_S) -> None:
        self._idle_s = idle_s
        self._chunks: deque[Any] = deque()
        self._changed = threading.Condition()
        self.is_closed = False

    def get(self) -> Any:
        """The next chunk; waits for it.

        Raises:
            IdlePeer: none came for so long. SGLang's loop does not catch it; the queue is closed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._chunks, self._idle_s):
                self.is_closed = True
                raise IdlePeer
            return self._chunks.popleft()

    def put(self, chunk: Any) -> bool:
        """Append a chunk; False if the queue is closed: nothing was appended."""
        with self._changed:
            if self.is_closed:
                return False
            self._chunks.append(chunk)
            self._changed.notify()
            return True


class PeerQueues:
    """The queues of a prefill engine, by the agents that a request's pages go to. Used by the scheduler's thread."""

    def __init__(self, run: Callable[[PeerQueue], None], idle_s: float = THREAD_IDLE_S) -> None:
        self._run, self._idle_s = run, idle_s
        self._queues: dict[tuple[str, ...], PeerQueue] = {}

    def put(self, peer: tuple[str, ...], chunk: Any) -> None:
        """Append a chunk to that peer's queue; start its thread if it has none."""
        queue = self._queues.get(peer)
        if queue is not None and queue.put(chunk):
            return
        for gone in [name for name, other in self._queues.items() if other.is_closed]:
            del self._queues[gone]
        self._queues[peer] = queue = PeerQueue(self._idle_s)
        queue.put(chunk)
        threading.Thread(target=self._serve, args=(queue,), name=f"transfer-{peer[0][:8]}", daemon=True).start()

    def _serve(self, queue: PeerQueue) -> None:
        with contextlib.suppress(IdlePeer):
            self._run(queue)

    def end(self, last: Any) -> None:
        """Append to each queue what makes SGLang's loop end its thread."""
        for queue in self._queues.values():
            queue.put(last)

    def __len__(self) -> int:
        return sum(not queue.is_closed for queue in self._queues.values())


class _ManagerOfOne:
    """SGLang's manager with one transfer queue: what `add_transfer_request` chooses is then the peer's."""

    def __init__(self, manager: Any, queues: PeerQueues, peer: tuple[str, ...]) -> None:
        self._manager, self._queues, self._peer = manager, queues, peer
        self.transfer_queues = [self]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def put(self, chunk: Any) -> None:
        self._queues.put(self._peer, chunk)


def _queue_for_peer(
    original: Callable[..., Any], manager: Any, bootstrap_room: int, *arguments: Any, **keywords: Any
) -> Any:
    """Queue a chunk for the agents that its room goes to."""
    peers = manager.transfer_infos.get(bootstrap_room)
    if not peers or manager.enable_staging or _packs(manager, peers):
        # A staging or packing buffer belongs to one of SGLang's own threads.
        return original(manager, bootstrap_room, *arguments, **keywords)
    queues: PeerQueues | None = getattr(manager, "tandem_queues", None)
    if queues is None:
        queues = manager.tandem_queues = PeerQueues(manager.transfer_worker)
    return original(_ManagerOfOne(manager, queues, tuple(sorted(peers))), bootstrap_room, *arguments, **keywords)


def _packs(manager: Any, peers: Iterable[str]) -> bool:
    """Whether pages are packed before they are written, as for decode engines with decode context parallelism."""
    known = (manager.decode_kv_args_table.get(peer) for peer in peers)
    return any(peer is not None and peer.requires_dcp_relayout for peer in known)


def wait_with_pauses(manager: Any, handles: list[Any]) -> None:
    """Return when SGLang's own wait for these writes has something to decide: all are complete, or one has failed."""
    started_s = time.monotonic()
    while True:
        try:
            states = {manager.agent.check_xfer_state(handle) for handle in handles}
        except Exception:  # NIXL's errors have no common base; SGLang's wait meets the same one and reports it
            return
        if "ERR" in states or states <= {"DONE"}:
            return
        pause_s = min((time.monotonic() - started_s) * POLL_SHARE, POLL_MAX_S)
        time.sleep(pause_s if pause_s >= POLL_MIN_S else 0)
