"""Transfer queues of a prefill engine: a thread for each decode engine, which none of the others waits for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.sglang.hooks import transfer_queues
from tandem.engine.sglang.hooks.transfer_queues import PeerQueue, PeerQueues

WAIT_S = 10.0


class Written:
    """Transfer threads that write what they are given, but to the peers that stand still."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[str]] = {}
        self.changed = threading.Condition()
        self.may_write: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    def run(self, queue: PeerQueue) -> None:
        self.threads.append(threading.current_thread())
        while True:
            peer, _, chunk = queue.get().partition(":")
            if peer in self.may_write:
                self.may_write[peer].wait(6 * WAIT_S)
            with self.changed:
                self.chunks.setdefault(peer, []).append(chunk)
                self.changed.notify_all()

    def wait_for(self, peer: str, chunks: list[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.chunks.get(peer) == chunks, WAIT_S), self.chunks


def test_peer_queues_of_a_peer_that_stands_still_hold_up_no_other() -> None:
    written = Written()
    written.may_write["frozen"] = threading.Event()
    queues = PeerQueues(written.run)
    for chunk in ("1", "2"):
        queues.put(("frozen",), f"frozen:{chunk}")
        queues.put(("alive",), f"alive:{chunk}")
    written.wait_for("alive", ["1", "2"])
    assert "frozen" not in written.chunks
    written.may_write["frozen"].set()
    written.wait_for("frozen", ["1", "2"])


def test_peer_queues_keep_the_order_of_a_peers_chunks() -> None:
    written = Written()
    queues = PeerQueues(written.run)
    chunks = [str(number) for number in range(200)]
    for chunk in chunks:
        queues.put(("peer",), f"peer:{chunk}")
    written.wait_for("peer", chunks)


def test_peer_queues_of_an_idle_peer_end_their_thread_and_start_another() -> None:
    written = Written()
    queues = PeerQueues(written.run, idle_s=0.01)
    queues.put(("peer",), "peer:1")
    written.wait_for("peer", ["1"])
    written.threads[0].join(WAIT_S)
    assert len(queues) == 0
    queues.put(("peer",), "peer:2")
    written.wait_for("peer", ["1", "2"])
    assert len(written.threads) == 2


class PlayedManager(SimpleNamespace):
    """SGLang's manager, whose rooms go to agents."""

    def __init__(
        self, written: Written, rooms: dict[int, list[str]], *, enable_staging: bool = False, packed: str = ""
    ) -> None:
        infos = {room: dict.fromkeys(agents) for room, agents in rooms.items()}
        peers = {
            name: SimpleNamespace(requires_dcp_relayout=name == packed) for agents in rooms.values() for name in agents
        }
        super().__init__(
            transfer_infos=infos,
            enable_staging=enable_staging,
            transfer_worker=written.run,
            decode_kv_args_table=peers,
        )
        self.transfer_queues = [SimpleNamespace(put=lambda chunk: self.shared.append(chunk))]
        self.shared: list[str] = []

    def add_transfer_request(self, room: int, chunk: str) -> None:
        """As SGLang does it: one of its queues, by a sum of ports."""
        self.transfer_queues[room % len(self.transfer_queues)].put(chunk)


def add(manager: PlayedManager, room: int, chunk: str) -> Any:
    return transfer_queues._queue_for_peer(PlayedManager.add_transfer_request, manager, room, chunk)


def test_transfer_request_goes_to_the_queue_of_its_rooms_agents() -> None:
    written = Written()
    written.may_write["a"] = threading.Event()
    manager = PlayedManager(written, {1: ["a"], 2: ["b"], 3: ["b"]})
    add(manager, 1, "a:1")
    add(manager, 2, "b:1")
    add(manager, 3, "b:2")
    written.wait_for("b", ["1", "2"])
    assert "a" not in written.chunks
    assert not manager.shared
    written.may_write["a"].set()
    written.wait_for("a", ["1"])


@pytest.mark.parametrize(
    ("room", "staging", "packed"),
    [(1, True, ""), (1, False, "a"), (9, False, "")],
    ids=["staging buffers", "packing buffers", "unknown room"],
)
def test_transfer_request_that_needs_sglangs_own_threads_is_left_to_them(room: int, staging: bool, packed: str) -> None:
    manager = PlayedManager(Written(), {1: ["a"]}, enable_staging=staging, packed=packed)
    add(manager, room, "a:1")
    assert manager.shared == ["a:1"]


class PlayedAgent:
    """Gives each handle's states in turn; an exception is raised."""

    def __init__(self, *states: str | Exception) -> None:
        self.states = list(states)

    def check_xfer_state(self, handle: int) -> str:
        state = self.states.pop(0)
        if isinstance(state, Exception):
            raise state
        return state


@pytest.mark.parametrize(
    "states",
    [("PROC", "PROC", "DONE"), ("PROC", "ERR"), ("PROC", RuntimeError("gone"))],
    ids=["done", "failed", "error"],
)
def test_wait_returns_when_a_write_is_over_or_cannot_be_read(states: tuple[str | Exception, ...]) -> None:
    agent = PlayedAgent(*states)
    transfer_queues.wait_with_pauses(SimpleNamespace(agent=agent), [1])
    assert agent.states == []


def test_wait_pauses_longer_the_longer_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, pauses = 0.0, []

    def sleep(pause_s: float) -> None:
        nonlocal now_s
        pauses.append(pause_s)
        now_s += max(pause_s, 0.000_01)

    monkeypatch.setattr(transfer_queues, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=sleep))
    states = ["PROC"] * 400 + ["DONE"]
    transfer_queues.wait_with_pauses(SimpleNamespace(agent=PlayedAgent(*states)), [1])
    assert pauses[0] == 0
    assert pauses[-1] == transfer_queues.POLL_MAX_S
    assert pauses == sorted(pauses)
