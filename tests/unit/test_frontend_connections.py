"""Which connections a frontend keeps when the registry's view changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig

from tandem.domain.worker import WorkerState
from tests.unit.support.frontend_workers import decode, prefill


async def test_a_new_start_at_an_address_gets_a_connection_of_its_own() -> None:
    """The former one may be waiting after its last refusal, for up to a second."""
    app = FrontendApp(FrontendConfig(registry=("127.0.0.1:1",), model=Path("models/tandem-demo")))
    try:
        d, p = decode(), prefill()
        app._follow((d, p))
        former, other = app._channels.get(d.address), app._channels.get(p.address)
        app._follow((replace(d, state=WorkerState.DRAINING), p))
        assert app._channels.get(d.address) is former, "the same start"
        app._follow((replace(d, epoch=d.epoch + 1), p))
        assert app._channels.get(d.address) is not former
        assert app._channels.get(p.address) is other
    finally:
        await app.stop()
