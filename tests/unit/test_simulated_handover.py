"""KV transfer between two simulated engines: mixed up, disconnected, late, faked, failed, and its timing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.generation import Bootstrap, FinishReason
from tandem.domain.worker import EngineLoad, WorkerRole, incompatible_field
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.rendezvous import BootstrapServer
from tandem.engine.simulated.wire import ConnectionLost, Line
from tandem.errors import LegFailed
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tests.unit.support.simulated_engines import DECODE, PREFILL, PROMPT, collect, expected, request, room, running

PHASES = {"bootstrap": "bootstrapping", "transfer": "transferring"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


def server(engine: SimulatedEngine) -> BootstrapServer:
    assert engine._machine is not None
    return engine._machine._hand_over.server


def at_rest(load: EngineLoad) -> bool:
    return (load.running_requests, load.transferring_requests, load.kv_used_tokens) == (0, 0, 0)


async def test_decode_speaks_of_what_it_received_not_of_its_own_prompt(model_path: Path) -> None:
    other = tuple(reversed(PROMPT))
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE) as decode:
        where = room(prefill)
        _, (tokens, _) = await asyncio.gather(
            collect(prefill, request(other, bootstrap=where)), collect(decode, request(PROMPT, bootstrap=where))
        )
    assert tokens == expected(model_path, other, 8)


async def test_kv_of_another_length_is_refused(model_path: Path) -> None:
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE) as decode:
        where = room(prefill)
        endings = await asyncio.gather(
            collect(prefill, request(PROMPT[:-1], bootstrap=where)),
            collect(decode, request(PROMPT, bootstrap=where)),
            return_exceptions=True,
        )
    assert [(type(e), e.metadata["phase"]) for e in endings if isinstance(e, LegFailed)] == [
        (LegFailed, "transferring")
    ] * 2


@pytest.mark.parametrize("gone", ["prefill", "decode"])
async def test_a_leg_that_is_aborted_ends_the_other_one(model_path: Path, gone: str) -> None:
    # Slow prefill: both legs have met and neither has finished. Pages come back when the chunk in hand is computed.
    slow = {"prefill_tokens_per_s": 80, "chunked_prefill_tokens": 16}
    async with running(model_path, PREFILL, **slow) as prefill, running(model_path, DECODE) as decode:
        where = room(prefill)
        requests = {"prefill": request(bootstrap=where), "decode": request(bootstrap=where)}
        engines = {"prefill": prefill, "decode": decode}
        legs = {name: asyncio.create_task(collect(engines[name], requests[name])) for name in engines}
        await assert_eventually(prefill.load, lambda load: load.kv_used_tokens, what="prefill computing")
        assert engines[gone].abort(requests[gone].request_id)
        left = ({"prefill", "decode"} - {gone}).pop()
        with pytest.raises(LegFailed) as caught:
            await asyncio.wait_for(legs[left], 2)
        assert caught.value.metadata == {"leg": left, "phase": "transferring", "room": str(where.room)}
        assert (await legs[gone])[1].reason is FinishReason.ABORTED
        for engine in (prefill, decode):
            await assert_eventually(engine.load, at_rest, what="an engine without legs")


async def test_a_stopped_prefill_engine_ends_waiting_decodes(model_path: Path) -> None:
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE) as decode:
        leg = asyncio.create_task(collect(decode, request(bootstrap=room(prefill))))
        await assert_eventually(lambda: len(server(prefill)._early_decodes))
        await prefill.stop()
        with pytest.raises(LegFailed, match="bootstrap"):
            await asyncio.wait_for(leg, 2)
        with pytest.raises(LegFailed, match="cannot connect to the prefill engine at"):
            await collect(decode, request(bootstrap=Bootstrap(host="127.0.0.1", port=1, room=5)))


@pytest.mark.parametrize(("host", "port"), [("a" * 300, 1), ("..", 1), ("\x00", 1), ("127.0.0.1", 99_999)])
async def test_a_host_that_cannot_be_one_is_a_failed_leg(model_path: Path, host: str, port: int) -> None:
    async with running(model_path, DECODE) as decode:
        with pytest.raises(LegFailed, match="cannot connect to the prefill engine at") as caught:
            await collect(decode, request(bootstrap=Bootstrap(host=host, port=port, room=5)))
        assert caught.value.metadata["phase"] == "bootstrapping"
        assert len(str(caught.value)) < 300
        await assert_eventually(decode.load, at_rest)


async def test_a_decode_leg_that_goes_before_the_kv_is_no_defect(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The connection breaks at the moment at which prefill begins to send: nothing may be left unawaited or unread."""
    defects: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))

    async def lost(line: Line, kind: str, **body: Any) -> None:
        if kind == "begin":
            line.close()
            # Longer than the server needs to see that the connection is gone.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.2)
            raise ConnectionLost("gone")
        await send(line, kind, **body)

    send = Line.send

    async def endings() -> list[type]:
        async with running(model_path, PREFILL) as prefill, running(model_path, DECODE) as decode:
            where = room(prefill)
            legs = [collect(engine, request(bootstrap=where)) for engine in (prefill, decode)]
            return [type(ending) for ending in await asyncio.gather(*legs, return_exceptions=True)]

    monkeypatch.setattr(Line, "send", lost)
    # In a task of its own: what asyncio complains about only when it goes, a traceback would keep alive.
    assert await asyncio.create_task(endings()) == [LegFailed, LegFailed]
    await asyncio.sleep(0.05)
    gc.collect()
    assert defects == []
    assert [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)] == []


@pytest.mark.parametrize("role", [PREFILL, DECODE])
async def test_waiting_for_a_peer_is_bounded(model_path: Path, role: WorkerRole) -> None:
    options = {"bootstrap_timeout_s": 0.05}
    async with running(model_path, PREFILL, **options) as prefill, running(model_path, DECODE, **options) as decode:
        engine = prefill if role is PREFILL else decode
        with pytest.raises(LegFailed) as caught:
            await collect(engine, request(bootstrap=room(prefill)))
        assert caught.value.metadata["phase"] == "bootstrapping"
        await assert_eventually(engine.load, at_rest)


@pytest.mark.parametrize("role", [PREFILL, DECODE])
@pytest.mark.parametrize("point", ["bootstrap", "transfer_begin", "transfer_middle", "transfer_end"])
async def test_fault_in_the_hand_over(model_path: Path, role: WorkerRole, point: str) -> None:
    bounds = {"bootstrap_timeout_s": 0.3}
    faults = {role: {"faults": [{"point": point, "kind": "fail"}]}}
    async with (
        running(model_path, PREFILL, **bounds, **faults.get(PREFILL, {})) as prefill,
        running(model_path, DECODE, **bounds, **faults.get(DECODE, {})) as decode,
    ):
        where = room(prefill)
        legs = await asyncio.gather(
            collect(prefill, request(bootstrap=where)),
            collect(decode, request(bootstrap=where)),
            return_exceptions=True,
        )
        broken = legs[0 if role is PREFILL else 1]
        assert isinstance(broken, LegFailed)
        assert (broken.metadata["leg"], broken.metadata["phase"]) == (role.value, PHASES[point.split("_")[0]])
        fired = (prefill if role is PREFILL else decode).faults.fired
        assert [(fault.point, fault.kind) for fault in fired] == [(point, "fail")]
        assert all(isinstance(leg, LegFailed) for leg in legs)
        for engine in (prefill, decode):
            await assert_eventually(engine.load, at_rest)


async def test_sabotaged_engines_move_nothing(model_path: Path) -> None:
    async with (
        running(model_path, PREFILL, transfer_backend="fake") as prefill,
        running(model_path, DECODE, transfer_backend="fake") as decode,
        running(model_path, DECODE) as honest,
    ):
        first, finish = await collect(prefill, request(bootstrap=room(prefill)))
        assert first == expected(model_path, PROMPT, 1)
        assert finish.timings is not None
        assert finish.timings.kv_transfer_bytes == 0
        tokens, finish = await collect(decode, request(bootstrap=room(prefill)))
        assert tokens != expected(model_path, PROMPT, 8)
        assert incompatible_field(prefill.capabilities(), honest.capabilities()) == "transfer_backend"


async def test_prefill_time_and_bandwidth_are_spent(model_path: Path) -> None:
    speed = {"prefill_tokens_per_s": 400, "transfer_bytes_per_s": 48 * 512 * 10}
    async with running(model_path, PREFILL, **speed) as prefill, running(model_path, DECODE) as decode:
        where = room(prefill)
        (_, one), (_, two) = await asyncio.gather(
            collect(prefill, request(bootstrap=where)), collect(decode, request(bootstrap=where))
        )
    p, d = one.timings, two.timings
    assert p is not None
    assert d is not None
    assert p.prefill_end_time_s - p.prefill_start_time_s >= 0.09  # type: ignore[operator]
    assert d.kv_transfer_end_time_s - d.kv_transfer_start_time_s >= 0.09  # type: ignore[operator]
    assert p.kv_transfer_bytes == d.kv_transfer_bytes == 48 * 512
