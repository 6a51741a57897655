"""A frontend follows its workers' prefix caches where it has room for blocks, and asks for none where it has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.model_fleet import ModelFleet
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.testing.eventually import assert_eventually
from tests.unit.support.cache_events import PublishedCache
from tests.unit.support.cache_publisher import publishing
from tests.unit.support.frontend_workers import prefill

MODEL = Path("models/tandem-demo")
PROMPT = tuple(range(20))


def fleet_of(blocks_max: int) -> tuple[Fleet, ModelFleet]:
    config = FrontendConfig(registry=("127.0.0.1:1",), model=MODEL, prefix_blocks_max=blocks_max)
    fleet, backlog = Fleet(config, "frontend-0"), PrefillBacklog("m", 5.0)
    model = ServedModel("m", Tokenizer.open(MODEL), {})
    return fleet, ModelFleet(config, model, fleet.access, (), backlog, lambda: None)


async def test_a_fleet_with_room_for_blocks_follows_the_caches_of_its_view() -> None:
    (fleet, followed), cache = fleet_of(1_000), PublishedCache(epoch=prefill().epoch)
    cache.store(PROMPT)
    index = followed.prefixes
    assert index is not None
    async with publishing(cache.snapshot) as (servicer, address), fleet.connected(), fleet.following(followed):
        worker = replace(prefill(), address=address)
        fleet.follow((worker,))
        matched = await assert_eventually(lambda: index.match(PromptBlocks([*PROMPT, 0])), within_s=5)
        assert matched == {worker.start: 20}
        fleet.note_load(worker.start, None)
        assert index.match(PromptBlocks(PROMPT)) == {}, "it may be silent on all streams"
        await assert_eventually(lambda: index.is_trusted(worker.start), within_s=5)
        assert len(servicer.requests) == 2
        fleet.follow(())
        assert (index.trusted_count, index.suspected_count) == (0, 0)


async def test_a_fleet_without_room_for_blocks_asks_for_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("tandem_frontend.model_fleet.KvWatch", opened.append)
    fleet, followed = fleet_of(0)
    assert followed.prefixes is None
    async with fleet.connected(), fleet.following(followed):
        fleet.follow((prefill(),))
    assert not opened
