"""Which connections a frontend keeps when the registry's view changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.config import FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.domain.worker import WorkerState
from tests.unit.support.frontend_workers import decode, prefill


async def test_a_new_start_at_an_address_gets_a_connection_of_its_own() -> None:
    """The former one may be waiting after its last refusal, for up to a second."""
    config = FrontendConfig(registry=("127.0.0.1:1",), model=Path("models/tandem-demo"))
    model = ServedModel("tandem-demo", Tokenizer.open(config.model), {})
    changes: list[None] = []
    fleet = Fleet(config, "frontend-0", model, (Capacity("tandem-demo"),), lambda: changes.append(None))
    async with fleet.connected():
        d, p = decode(), prefill()
        fleet.follow((d, p))
        former, other = fleet.channels.get(d.address), fleet.channels.get(p.address)
        fleet.follow((replace(d, state=WorkerState.DRAINING), p))
        assert fleet.channels.get(d.address) is former, "the same start"
        fleet.follow((replace(d, epoch=d.epoch + 1), p))
        assert fleet.channels.get(d.address) is not former
        assert fleet.channels.get(p.address) is other
        assert len(changes) == 3, "a queued request may fit after each change"
