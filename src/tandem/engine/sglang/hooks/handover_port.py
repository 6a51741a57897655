"""The hand-over port of an engine: limits on what it takes, checks before SGLang reads, and a watch on the thread.

The port (SGLang's "rank port", a ZMQ PULL socket) carries no authentication: whatever reaches it, SGLang's receiving
thread reads, and ends if it cannot. Here only checked messages reach that thread. Should it end all the same, the
engine ends with it, so that the worker restarts; a thread that hangs is seen by the worker in its pulse.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tandem.domain.handover import DropReason
from tandem.engine.sglang import reports
from tandem.engine.sglang.environment import REPORT_FILE
from tandem.engine.sglang.hooks import handover_messages
from tandem.engine.sglang.pulse import PulseWriter
from tandem.errors import EngineFailed

log = logging.getLogger(__name__)

_COMMON = "sglang.srt.disaggregation.common.conn"
_MANAGER = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"

FRAME_BYTES_MAX = 16 * 2**20
"""Four million page numbers; libzmq closes the connection that announces more."""
WAITING_MESSAGES_MAX = 1_000
"""Received and not yet read, for each connection; beyond it TCP holds the sender up."""
ROOMS_MAX = 65_536
"""Rooms of which pages are known. Beyond it the oldest without a request is removed."""
BEAT_INTERVAL_S = 0.25
WATCH_INTERVAL_S = 0.25

_opening = threading.local()


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {
        f"{_COMMON}.CommonKVManager.__init__": (_note_opening, "around"),
        f"{_COMMON}.get_zmq_socket_on_host": (_limit_socket, "around"),
        f"{_MANAGER}._start_bootstrap_thread": (_check_at_prefill, "before"),
        f"{_MANAGER}._start_decode_listener_thread": (_check_at_decode, "before"),
        f"{_MANAGER}._add_remote_peer": (_refuse_bad_peer, "around"),
        f"{_MANAGER}._handle_staging_req": (_drop_unreadable, "around"),
    }


# --- The socket


@functools.cache
def _limited_socket() -> type:
    import zmq

    class LimitedSocket(zmq.Socket):  # type: ignore[type-arg]
        """A ZMQ socket whose limits are set before it listens; later they would not apply to its connections."""

        def bind_to_random_port(self, *arguments: Any, **keywords: Any) -> int:
            """See pyzmq."""
            self.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
            self.setsockopt(zmq.RCVHWM, WAITING_MESSAGES_MAX)
            return super().bind_to_random_port(*arguments, **keywords)

    return LimitedSocket


def _note_opening(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Mark the time in which SGLang opens the hand-over port: it opens other sockets by the same function."""
    _opening.is_on = True
    try:
        return original(*arguments, **keywords)
    finally:
        _opening.is_on = False


def _limit_socket(original: Callable[..., Any], context: Any, *arguments: Any, **keywords: Any) -> Any:
    if getattr(_opening, "is_on", False):
        context = SimpleNamespace(socket=functools.partial(context.socket, socket_class=_limited_socket()))
    return original(context, *arguments, **keywords)


class CheckedSocket:
    """SGLang's `server_socket` as its receiving thread sees it: only messages that pass the check arrive."""

    def __init__(self, socket: Any, check: Callable[[list[bytes]], DropReason | None], pulse: PulseWriter) -> None:
        self._socket = socket
        self._check = check
        self._pulse = pulse
        self._is_closing = False
        self.reader: threading.Thread | None = None
        """The thread that receives, once it has begun to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self) -> list[bytes]:
        """The next message that SGLang can read; blocks until there is one, and beats meanwhile."""
        self.reader = threading.current_thread()
        while not self._is_closing:
            self._pulse.beat()
            if not self._socket.poll(BEAT_INTERVAL_S * 1_000):
                continue
            frames: list[bytes] = self._socket.recv_multipart()
            reason = self._check(frames)
            if reason is None:
                return frames
            self._pulse.drop(reason)
        # By the thread that uses it: a ZMQ socket is no two threads'.
        self._socket.close(0)
        raise SystemExit  # ends this thread, without a word

    @property
    def is_closing(self) -> bool:
        """Whether the reading thread ends because it was asked to."""
        return self._is_closing

    def shut(self, timeout_s: float) -> None:
        """End the reading thread and close the socket: the engine takes another role."""
        self._is_closing = True
        if self.reader is not None:
            self.reader.join(timeout_s)


# --- The thread


def _check_at_prefill(manager: Any) -> None:
    def check(frames: list[bytes]) -> DropReason | None:
        reason = handover_messages.check_at_prefill(frames, manager)
        if reason is None and frames[0] == handover_messages.GUARD and frames[1] != b"None":
            _bound_rooms(manager)
        elif reason in (DropReason.UNKNOWN_PEER, DropReason.REFUSED) and frames[0] == handover_messages.GUARD:
            _fail_room(manager, int(frames[1]), reason)
        return reason

    _take_over(manager, check)


def _check_at_decode(manager: Any) -> None:
    _take_over(manager, lambda frames: handover_messages.check_at_decode(frames, manager))


def _take_over(manager: Any, check: Callable[[list[bytes]], DropReason | None]) -> None:
    """Put the check between the socket and the thread that SGLang is about to start, and watch that thread."""
    pulse = manager.tandem_pulse = PulseWriter(Path(os.environ[REPORT_FILE]).parent, os.getpid())
    manager.server_socket = checked = CheckedSocket(manager.server_socket, check, pulse)
    threading.Thread(target=_watch, args=(checked, reports.end), name="handover-watch", daemon=True).start()


def _watch(checked: CheckedSocket, end: Callable[[BaseException], None]) -> None:
    """End the engine when the receiving thread has ended: no hand-over would succeed any more."""
    while (reader := checked.reader) is None or reader.is_alive():
        time.sleep(WATCH_INTERVAL_S)
    if checked.is_closing:
        return
    end(EngineFailed("the thread that receives the messages of the KV hand-over has ended"))


def _bound_rooms(manager: Any) -> None:
    """Remove the oldest rooms without a request: no request may ever come, and SGLang would keep them."""
    rooms = manager.transfer_infos
    if len(rooms) < ROOMS_MAX:
        return
    for room in [room for room in list(rooms) if room not in manager.request_status][: ROOMS_MAX // 16]:
        rooms.pop(room, None)
        manager.tandem_pulse.drop(DropReason.UNKNOWN_ROOM)


def _fail_room(manager: Any, room: int, reason: DropReason) -> None:
    """End the request of that room now; it would wait for its pages until its timeout."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    if reason is DropReason.UNKNOWN_PEER and manager.request_status.get(room) == KVPoll.Bootstrapping:
        manager.record_failure(room, "the decode engine has not registered with this engine")
        manager.update_status(room, KVPoll.Failed)


def _refuse_bad_peer(original: Callable[..., Any], manager: Any, peer: Any) -> None:
    """Forget a decode engine whose registration failed; NIXL alone can read its metadata."""
    known = peer.agent_name in manager.decode_kv_args_table
    try:
        original(manager, peer)
    except Exception as problem:
        # Whatever NIXL raises: the message is at fault, and the thread must go on.
        log.debug("a registration at the hand-over port failed", exc_info=problem)
        manager.tandem_pulse.drop(DropReason.REFUSED)
        if not known:
            _forget_peer(manager, peer.agent_name)


def _forget_peer(manager: Any, name: str) -> None:
    for table in (manager.decode_kv_args_table, manager.prep_handles, manager.prep_handles_slice_dst):
        table.pop(name, None)
    # NIXL raises for an agent that it has not taken.
    with contextlib.suppress(Exception):
        manager.agent.remove_remote_agent(name)


def _drop_unreadable(original: Callable[..., Any], manager: Any, *arguments: Any, **keywords: Any) -> None:
    try:
        original(manager, *arguments, **keywords)
    except Exception as problem:
        # The message is at fault, whatever it raised, and the thread must go on.
        log.debug("a staging request at the hand-over port failed", exc_info=problem)
        manager.tandem_pulse.drop(DropReason.MALFORMED)
