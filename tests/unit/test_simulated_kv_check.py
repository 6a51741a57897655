"""The check of the KV that one simulated engine hands to another: each kind of damage, and what is not checked."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.generation import EngineFinish, KvCheck
from tandem.domain.kv_sample import is_sampled
from tandem.domain.worker import EngineLoad
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.kv_content import DAMAGES, KvContent
from tandem.errors import ConfigError, KvCorrupt
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tests.unit.support.simulated_engines import DECODE, PREFILL, PROMPT, collect, expected, request, room, running

Ending = tuple[list[int], EngineFinish] | BaseException


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"))


def damaging(kind: str, **more: Any) -> dict[str, Any]:
    return {"faults": [{"point": "kv_arrived", "kind": kind, **more}]}


async def handed_over(prefill: SimulatedEngine, decode: SimulatedEngine) -> tuple[Ending, Ending]:
    where = room(prefill)
    legs = (collect(engine, request(bootstrap=where)) for engine in (prefill, decode))
    sent, received = await asyncio.gather(*legs, return_exceptions=True)
    return sent, received


def at_rest(load: EngineLoad) -> bool:
    return (load.running_requests, load.transferring_requests, load.kv_used_tokens) == (0, 0, 0)


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damaged_kv_is_refused_before_anything_is_generated(model_path: Path, kind: str) -> None:
    async with running(model_path, PREFILL) as prefill, running(model_path, DECODE, **damaging(kind, nth=1)) as decode:
        sent, received = await handed_over(prefill, decode)
        assert not isinstance(sent, BaseException), "prefill has done its part"
        assert isinstance(received, KvCorrupt)
        assert received.metadata["phase"] == "transferring"
        assert [fault.kind for fault in decode.faults.fired] == [kind]
        await assert_eventually(decode.load, at_rest)
        _, again = await handed_over(prefill, decode)
        assert not isinstance(again, BaseException)
        assert (again[0], again[1].kv_check) == (expected(model_path, PROMPT, 8), KvCheck.MATCHED)


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damaged_kv_spoils_the_tokens_where_nothing_is_checked(model_path: Path, kind: str) -> None:
    async with (
        running(model_path, PREFILL) as prefill,
        running(model_path, DECODE, kv_check_share=0.0, **damaging(kind)) as decode,
    ):
        _, received = await handed_over(prefill, decode)
        assert not isinstance(received, BaseException)
        assert received[0] != expected(model_path, PROMPT, 8)
        assert received[1].kv_check is KvCheck.UNCHECKED


async def test_a_prefill_engine_without_digests_is_served_unchecked(model_path: Path) -> None:
    async with running(model_path, PREFILL, kv_check_share=0.0) as prefill, running(model_path, DECODE) as decode:
        sent, received = await handed_over(prefill, decode)
    assert not isinstance(sent, BaseException)
    assert not isinstance(received, BaseException)
    assert (received[0], received[1].kv_check) == (expected(model_path, PROMPT, 8), KvCheck.UNCHECKED)
    assert sent[1].kv_check is None, "only decode checks"


async def test_only_what_moved_is_checked_where_decode_holds_a_prefix(model_path: Path) -> None:
    caching = {"decode_prefix_cache": True, "page_size_tokens": 4, "chunked_prefill_tokens": 64}
    plain = {"page_size_tokens": 4, "chunked_prefill_tokens": 8}
    async with running(model_path, PREFILL, **plain) as prefill, running(model_path, DECODE, **caching) as decode:
        for cached_tokens in (0, len(PROMPT) // 4 * 4):
            _, received = await handed_over(prefill, decode)
            assert not isinstance(received, BaseException)
            assert received[0] == expected(model_path, PROMPT, 8)
            assert (received[1].kv_check, received[1].cached_tokens) == (KvCheck.MATCHED, cached_tokens)


def test_a_thousand_damages_of_each_kind_change_the_digest() -> None:
    draw = random.Random(1)
    for kind in DAMAGES:
        for number in range(1_000):
            tokens, page = draw.randrange(1, 200), draw.choice((1, 16, 64))
            content = KvContent(number.to_bytes(16, "little"), tokens)
            before = content.digest()
            content.damage(kind, page, draw)
            assert content.digest() != before, (kind, number)


async def test_damage_anywhere_else_is_no_rule(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine_extra.faults\[0\].point: must be kv_arrived with kind flip_bit"):
        async with running(model_path, DECODE, faults=[{"point": "admit", "kind": "flip_bit"}]):
            pass


def test_a_sample_is_its_share_of_rooms_and_part_of_each_larger_one() -> None:
    draw = random.Random(3)
    rooms = [draw.getrandbits(63) for _ in range(4_000)]
    for rooms_of in (rooms, range(1, 4_001)):
        quarter, half = ({room for room in rooms_of if is_sampled(room, share)} for share in (0.25, 0.5))
        assert quarter < half
        assert 850 < len(quarter) < 1_150
        assert 1_800 < len(half) < 2_200
        assert all(is_sampled(room, 1.0) and not is_sampled(room, 0.0) for room in rooms_of)
    assert not is_sampled(None, 1.0)


async def test_engines_of_different_shares_check_the_smaller_one(model_path: Path) -> None:
    async with (
        running(model_path, PREFILL, kv_check_share=0.5) as prefill,
        running(model_path, DECODE, kv_check_share=0.25) as decode,
    ):
        for number in range(1, 33):
            where = replace(room(prefill), room=number)
            legs = (collect(engine, request(bootstrap=where)) for engine in (prefill, decode))
            _, (_, finish) = await asyncio.gather(*legs)
            assert (finish.kv_check is KvCheck.MATCHED) == is_sampled(number, 0.25)
