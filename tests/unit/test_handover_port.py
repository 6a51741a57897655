"""The hand-over port: what reaches SGLang's receiving thread, what the worker learns of it, and its end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.domain.handover import DropReason
from tandem.engine.sglang import pulse, reports
from tandem.engine.sglang.environment import REGISTRATION_KEY
from tandem.engine.sglang.handover import LOG_INTERVAL_S, SILENCE_MAX_S, HandoverWatch
from tandem.engine.sglang.hooks import bootstrap_server, handover_port, scheduler_hooks
from tandem.engine.sglang.hooks.handover_messages import GUARD
from tandem.observability.metrics import NONE, Attributes, Metrics
from tandem.worker.stats import DroppedMessages


class PlayedSocket:
    """Gives messages in turn."""

    def __init__(self, messages: list[list[bytes]]) -> None:
        self.messages = messages
        self.linger = 7

    def poll(self, timeout_ms: float) -> bool:
        return bool(self.messages)

    def recv_multipart(self) -> list[bytes]:
        return self.messages.pop(0)


class PlayedManager(SimpleNamespace):
    """SGLang's manager with one registered peer."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            decode_kv_args_table={"known": SimpleNamespace()},
            prep_handles={},
            prep_handles_slice_dst={},
            transfer_infos={},
            request_status={},
            agent=SimpleNamespace(remove_remote_agent=self.refuse),
            tandem_pulse=pulse.PulseWriter(directory, os.getpid()),
        )

    def refuse(self, name: str) -> None:
        raise RuntimeError(f"NIXL has no agent {name}")


def test_only_messages_that_pass_reach_the_thread(tmp_path: Path) -> None:
    writer = pulse.PulseWriter(tmp_path, 1)
    socket = PlayedSocket([[b"junk"], [b"junk"], [b"right"], [b"junk"], [b"right", b"too"]])
    checked = handover_port.CheckedSocket(
        socket, lambda frames: None if frames[0] == b"right" else DropReason.FOREIGN, writer
    )
    assert checked.recv_multipart() == [b"right"]
    assert pulse.read(tmp_path).dropped[DropReason.FOREIGN] == 2
    assert checked.recv_multipart() == [b"right", b"too"]
    assert pulse.read(tmp_path).dropped[DropReason.FOREIGN] == 3
    assert checked.reader is threading.current_thread()
    assert checked.linger == 7


def test_the_engine_ends_with_its_receiving_thread() -> None:
    go_on, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    reasons: list[BaseException] = []

    def end(reason: BaseException) -> None:
        reasons.append(reason)
        ended.set()

    watch = threading.Thread(target=handover_port._watch, args=(SimpleNamespace(reader=thread, is_closing=False), end))
    watch.start()
    assert not ended.wait(2 * handover_port.WATCH_INTERVAL_S)
    go_on.set()
    assert ended.wait(2)
    assert "has ended" in str(reasons[0])
    watch.join()


def test_a_port_that_is_shut_ends_its_thread_and_closes_its_socket_without_a_word(tmp_path: Path) -> None:
    class PlayedSocket:
        is_closed = False

        def poll(self, timeout_ms: float) -> int:
            return 0

        def close(self, linger: int) -> None:
            self.is_closed = True

    socket = PlayedSocket()
    ended: list[BaseException] = []
    checked = handover_port.CheckedSocket(socket, lambda frames: None, pulse.PulseWriter(tmp_path, 1))

    def read() -> None:
        # Python ends a thread that raises it, and prints nothing; pytest would report it.
        with contextlib.suppress(SystemExit):
            checked.recv_multipart()

    reader = threading.Thread(target=read)
    reader.start()
    watch = threading.Thread(target=handover_port._watch, args=(checked, ended.append))
    watch.start()
    checked.shut(timeout_s=5)
    assert not reader.is_alive()
    assert socket.is_closed
    watch.join(5)
    assert not watch.is_alive()
    assert not ended, "the engine goes on"


def test_a_registration_that_fails_is_forgotten_and_counted(tmp_path: Path) -> None:
    manager = PlayedManager(tmp_path)

    def add(manager: Any, peer: Any) -> None:
        manager.decode_kv_args_table[peer.agent_name] = peer
        raise RuntimeError("NIXL cannot read the metadata")

    for name in ("stranger", "known"):
        handover_port._refuse_bad_peer(add, manager, SimpleNamespace(agent_name=name))
    assert set(manager.decode_kv_args_table) == {"known"}
    assert pulse.read(tmp_path).dropped[DropReason.REFUSED] == 2


def test_rooms_without_a_request_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_port, "ROOMS_MAX", 32)
    manager = PlayedManager(tmp_path)
    manager.request_status = {0: 1, 1: 1}
    for room in range(100):
        handover_port._bound_rooms(manager)
        manager.transfer_infos[room] = {}
    assert len(manager.transfer_infos) <= 32
    assert {0, 1, 99} <= set(manager.transfer_infos)
    assert pulse.read(tmp_path).dropped[DropReason.UNKNOWN_ROOM] >= 68


def test_a_pulse_is_the_sum_of_all_processes(tmp_path: Path) -> None:
    assert pulse.read(tmp_path) == pulse.Pulse()
    for pid in (1, 2):
        pulse.PulseWriter(tmp_path, pid).drop(DropReason.MALFORMED)
    (tmp_path / f"{pulse.PREFIX}3").write_bytes(b"damaged")
    found = pulse.read(tmp_path)
    assert found.dropped[DropReason.MALFORMED] == 2
    assert 0 <= found.silent_s < 1


def test_a_thread_that_hangs_is_trouble_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = HandoverWatch(tmp_path)
    silent = pulse.Pulse(silent_s=SILENCE_MAX_S + 1)
    monkeypatch.setattr(pulse, "read", lambda directory: silent)
    watch.check()
    assert watch.trouble is not None
    assert "read no message" in watch.trouble
    silent.silent_s = 0.1
    watch.check()
    assert watch.trouble is None


def test_drops_are_logged_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 100.0
    monkeypatch.setattr(bootstrap_server, "dropped", {DropReason.MALFORMED: 5, DropReason.REFUSED: 7})
    watch = HandoverWatch(tmp_path, lambda: now_s)
    writer = pulse.PulseWriter(tmp_path, 1)
    with caplog.at_level(logging.WARNING, "tandem.engine.sglang.handover"):
        watch.check()
        assert not caplog.messages
        for _ in range(50):
            writer.drop(DropReason.FOREIGN)
            bootstrap_server.dropped[DropReason.REFUSED] += 1
            watch.check()
        now_s += LOG_INTERVAL_S
        watch.check()
        watch.check()
    assert len(caplog.messages) == 2
    assert "dropped 98 messages" in caplog.messages[1]
    assert "100 since start (foreign 50, refused 50)" in caplog.messages[1]
    assert watch.dropped[DropReason.REFUSED] == 50


def test_drops_are_counted_as_a_metric() -> None:
    counted: list[tuple[str, float, Any]] = []

    class Counting(Metrics):
        def count(self, name: str, amount: float = 1, attributes: Attributes = NONE) -> None:
            counted.append((name, amount, attributes["tandem.reason"]))

    dropped = {DropReason.FOREIGN: 0, DropReason.REFUSED: 2}
    counter = DroppedMessages(SimpleNamespace(dropped_messages=lambda: dropped), Counting())
    counter.add()
    dropped[DropReason.FOREIGN] = 3
    counter.add()
    counter.add()
    name = "tandem.engine.messages.dropped"
    assert counted == [(name, 2, "refused"), (name, 3, "foreign")]


class PlayedRequest:
    """A request of aiohttp with a body."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def json(self) -> Any:
        return json.loads(self.body)


async def route(server: Any, request: Any) -> Any:
    """As SGLang's handlers read a body."""
    data = await request.json()
    int(data["rank_port"])
    return SimpleNamespace(status=200)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"tandem_registration_key": "right", "rank_port": 5}', 200),
        (b'{"tandem_registration_key": "right", "rank_port": "x"}', 400),
        (b'{"tandem_registration_key": "right"}', 400),
        (b'{"tandem_registration_key": "wrong", "rank_port": 5}', 403),
        ('{"tandem_registration_key": "ünrecht"}'.encode(), 403),
        (b'{"tandem_registration_key": 5}', 403),
        (b'{"rank_port": 5}', 403),
        (b"[]", 403),
        (b"null", 403),
        (b"\xff", 403),
        (b"[" * 100_000, 403),
        (b"", 403),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_the_bootstrap_server_takes_registrations_with_the_key(
    monkeypatch: pytest.MonkeyPatch, body: bytes, status: int
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv(REGISTRATION_KEY, "right")
    assert (await bootstrap_server._take_own(route, None, PlayedRequest(body))).status == status


def test_the_key_is_added_to_a_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REGISTRATION_KEY, "right")
    payload: dict[str, Any] = {"rank_port": 5}
    bootstrap_server._add_key(None, "http://127.0.0.1:1/route", payload)
    assert payload == {"rank_port": 5, "tandem_registration_key": "right"}


def test_the_port_has_its_limits_before_it_listens() -> None:
    zmq = pytest.importorskip("zmq")

    def open_socket(context: Any, kind: int, host: str) -> Any:
        socket = context.socket(kind)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind_to_random_port(f"tcp://{host}")
        return socket

    def limits() -> tuple[int, int]:
        with zmq.Context() as context:
            socket = handover_port._limit_socket(open_socket, context, zmq.PULL, host="127.0.0.1")
            try:
                return socket.getsockopt(zmq.MAXMSGSIZE), socket.getsockopt(zmq.RCVHWM)
            finally:
                socket.close()

    assert limits() == (-1, 0)
    assert handover_port._note_opening(limits) == (handover_port.FRAME_BYTES_MAX, handover_port.WAITING_MESSAGES_MAX)
    assert limits() == (-1, 0)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_the_thread_reads_only_what_passes_and_its_end_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The check is put between the socket and SGLang's thread, whose loop goes on over junk."""
    monkeypatch.setenv("TANDEM_SGLANG_REPORT", str(tmp_path / "report"))
    ended = threading.Event()
    monkeypatch.setattr(reports, "end", lambda problem: ended.set())
    manager = PlayedManager(tmp_path)
    real = {"prefill": [b"ABORT", b"1"], "decode": [b"KV_STATUS", b"1", b"4", b"0", b""]}[kind]
    manager.server_socket = PlayedSocket([[b"junk"], [GUARD], real])
    hook: Callable[[Any], None] = getattr(handover_port, f"_check_at_{kind}")
    hook(manager)
    received: list[list[bytes]] = []
    thread = threading.Thread(target=lambda: received.append(manager.server_socket.recv_multipart()))
    thread.start()
    assert ended.wait(5)
    thread.join()
    assert received == [real]
    assert sum(pulse.read(tmp_path).dropped.values()) == 2


def test_ranks_meet_in_a_file_and_not_at_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_SGLANG_REPORT", str(tmp_path / "report"))
    found = scheduler_hooks._meet_in_a_file("tcp://127.0.0.1:25000", dist_port=25000)
    assert found == f"file://{tmp_path}/ranks-25000"
    assert scheduler_hooks._meet_in_a_file("env://", dist_port=25000) == "env://"
