"""When an engine on SGLang can switch its role in place, what it is started with, and what a teardown releases."""

from __future__ import annotations

import queue
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import AdapterSettings, EngineSettings
from tandem.engine.sglang import arguments, kv_events, role_switch
from tandem.engine.sglang.environment import PREFIX_CACHE
from tandem.engine.sglang.hooks import role_switch as hooks
from tandem.engine.sglang.hooks import transfer_queues
from tandem.errors import ConfigError, EngineFailed

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of SGLang's, which is not imported here."""
    monkeypatch.setitem(sys.modules, name, cast("ModuleType", SimpleNamespace(**contents)))


def settings(role: WorkerRole = PREFILL, **more: Any) -> EngineSettings:
    return EngineSettings(role=role, model_path=Path("m"), model_name="m", **more)


@pytest.mark.parametrize(
    ("given", "device", "sentence"),
    [
        (settings(), "cpu", None),
        (settings(DECODE, extra={"tp_size": 1, "page_size": 16}), "cpu", None),
        (settings(role_switch=True), "cuda", None),
        (settings(), "cuda", "started without role_switch"),
        (settings(role_switch=False), "cpu", "started without role_switch"),
        (settings(AGGREGATED), "cpu", "between prefill and decode only"),
        (settings(DECODE, transfer_backend="fake"), "cpu", "with transfer_backend fake"),
        (settings(extra={"tp_size": 2}), "cpu", "with engine_extra.tp_size"),
        (settings(extra={"speculative_algorithm": "EAGLE"}), "cpu", "with engine_extra.speculative_algorithm"),
        (settings(adapters=AdapterSettings(rank_max=8, per_batch_max=1, modules=("q_proj",))), "cpu", "with adapters"),
    ],
)
def test_an_engine_switches_in_place_where_that_was_tried(
    given: EngineSettings, device: str, sentence: str | None
) -> None:
    found = role_switch.obstacle(given, device)
    assert found is None if sentence is None else sentence in str(found)


def test_an_engine_that_can_switch_is_started_alike_in_both_roles() -> None:
    prefill, decode = (settings(role, kv_capacity_tokens=4096, running_requests_max=8) for role in (PREFILL, DECODE))
    started = role_switch.server_arguments(prefill, "cuda")
    assert started == role_switch.server_arguments(decode, "cuda")
    assert started["enable_pd_role_switch"]
    assert started["disaggregation_decode_extra_slots"] == 16
    assert started["num_reserved_decode_tokens"] == 512
    assert (
        role_switch.server_arguments(settings(running_requests_max=64), "cpu")["disaggregation_decode_extra_slots"] == 0
    )


def test_a_decode_engine_publishes_events_for_the_role_that_it_may_take() -> None:
    paged = settings(DECODE, extra={"page_size": 16})
    assert not kv_events.is_published(paged, both_roles=False)
    assert kv_events.is_published(paged, both_roles=True)


def test_an_engine_without_a_transfer_has_no_prefill_role() -> None:
    with pytest.raises(ConfigError, match="transfer_backend: must not be fake on a prefill engine"):
        arguments.check_settings(settings(transfer_backend="fake"))


def answer(message: str = "", *, success: bool = False) -> SimpleNamespace:
    return SimpleNamespace(success=success, message=message)


class PlayedScheduler:
    """Answers requests to switch, in turn."""

    def __init__(self, *answers: SimpleNamespace) -> None:
        self.answers = list(answers)

    async def pd_role_switch(self, request: Any) -> SimpleNamespace:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


BUSY = answer("instance is not idle; drain all requests before switching")


async def test_a_switch_waits_until_ended_requests_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sglang.srt.managers.io_struct", PdRoleSwitchReqInput=SimpleNamespace)
    await role_switch.switch(PlayedScheduler(BUSY, BUSY, answer(success=True)), DECODE)
    monkeypatch.setattr(role_switch, "IDLE_TIMEOUT_S", 0.05)
    with pytest.raises(EngineFailed, match="did not switch to role decode: instance is not idle"):
        await role_switch.switch(PlayedScheduler(BUSY), DECODE)
    with pytest.raises(EngineFailed, match="unhealthy"):
        await role_switch.switch(PlayedScheduler(answer("instance unhealthy")), DECODE)


class Counted:
    """Whatever is called on it is noted; calls of `refused` raise."""

    def __init__(self, log: list[tuple[str, Any]], refused: str = "") -> None:
        self._log = log
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self._log.append((name, arguments))
            if name == self._refused:
                raise RuntimeError("NIXL does not know this peer")

        return call


def test_a_teardown_ends_the_threads_and_releases_peers_memory_and_sockets() -> None:
    log: list[tuple[str, Any]] = []
    transfers: queue.Queue[Any] = queue.Queue()
    ended = threading.Event()

    def transfer() -> None:
        try:
            assert transfers.get().room is None
        except SystemExit:
            ended.set()

    threading.Thread(target=transfer).start()
    peers_ended = threading.Event()

    def write_to_peer(chunks: Any) -> None:
        try:
            while True:
                assert chunks.get().room == 1
        except SystemExit:
            peers_ended.set()

    peers = transfer_queues.PeerQueues(write_to_peer)
    peers.put(("peer",), SimpleNamespace(room=1))
    manager = SimpleNamespace(
        _heartbeat_shutdown=threading.Event(), transfer_queues=[transfers], server_socket=Counted(log),
        agent=Counted(log, refused="remove_remote_agent"), decode_kv_args_table={"peer": 1}, prep_handles={"peer": 1},
        prep_handles_slice_dst={}, prep_handles_segment_src={}, _prepared_state_plans={}, prep_handle_slice_src=1,
        kv_descs=["pages"], aux_descs="buffers", _socket_lock=threading.Lock(), _socket_cache={"a": Counted(log)},
        _monitor_cache={"a": Counted(log)}, _zmq_ctx=Counted(log), tandem_queues=peers,
    )  # fmt: skip
    hooks._tear_down(manager)
    assert ended.wait(5)
    assert peers_ended.wait(5)
    assert manager._heartbeat_shutdown.is_set()
    assert manager.agent is None
    assert [call for call in log if call[0] != "term"] == [
        ("shut", (hooks.THREAD_END_S,)),
        ("remove_remote_agent", ("peer",)),
        ("deregister_memory", ("pages",)),
        ("deregister_memory", ("buffers",)),
        ("close", (0,)),
        ("close", (0,)),
    ]
    assert [manager.decode_kv_args_table, manager.prep_handles, manager._socket_cache] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("mode", "has_cache", "decode_has_cache", "is_used"),
    [
        ("prefill", "1", False, True),
        ("prefill", "0", False, False),
        ("decode", "1", False, False),
        ("decode", "1", True, True),
        ("decode", "0", True, False),
    ],
)
def test_the_prefix_cache_is_used_as_by_an_engine_that_started_in_the_role(
    mode: str, has_cache: str, decode_has_cache: bool, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disagg = SimpleNamespace(
        enable_pd_role_switch=True,
        disaggregation_mode=mode,
        disaggregation_decode_enable_radix_cache=decode_has_cache,
    )
    stand_in(monkeypatch, "sglang.srt.runtime_context", get_disagg=lambda: disagg)
    monkeypatch.setenv(PREFIX_CACHE, has_cache)
    cache, scheduler_mode = SimpleNamespace(disable=None), SimpleNamespace(value=mode)
    scheduler = SimpleNamespace(disaggregation_mode=scheduler_mode, tree_cache=cache, disable_radix_cache=None)
    hooks._fit_cache(None, scheduler)
    assert cache.disable is None, "at the start SGLang's own choice holds"
    scheduler._pd_role_switch_in_progress = True
    hooks._fit_cache(None, scheduler)
    assert cache.disable is scheduler.disable_radix_cache is not is_used


@dataclass
class Params:
    """What SGLang builds a tree cache from."""

    disable: bool


@pytest.mark.parametrize(("mode", "is_disabled", "fits_both"), [("decode", True, True), ("prefill", True, False)])
def test_a_cache_is_built_whole_and_one_that_the_model_forbids_stays_disabled(
    mode: str, is_disabled: bool, fits_both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disagg = SimpleNamespace(
        enable_pd_role_switch=True, disaggregation_mode=mode, disaggregation_decode_enable_radix_cache=False
    )
    stand_in(monkeypatch, "sglang.srt.runtime_context", get_disagg=lambda: disagg)
    monkeypatch.setenv(PREFIX_CACHE, "1")
    built: list[Params] = []
    cache = SimpleNamespace()
    hooks._build_for_both_roles(lambda cache, params: built.append(params), cache, Params(disable=is_disabled))
    assert built == [Params(disable=False)]
    assert cache.disable is is_disabled
    assert getattr(cache, hooks.FITS_BOTH) is fits_both
