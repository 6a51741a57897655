"""Which connections a frontend keeps when the registry's view changes."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.model_fleet import ModelFleet
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.domain.worker import WorkerState
from tandem.testing.eventually import assert_eventually
from tests.unit.support.frontend_workers import decode, prefill

MODEL = Path("models/tandem-demo")


async def test_a_new_start_at_an_address_gets_a_connection_of_its_own() -> None:
    """The former one may be waiting after its last refusal, for up to a second."""
    config = FrontendConfig(registry=("127.0.0.1:1",), model=MODEL)
    model = ServedModel("m", Tokenizer.open(MODEL), {})
    changes: list[None] = []
    fleet, backlog = Fleet(config, "frontend-0"), PrefillBacklog("m", 5.0)
    followed = ModelFleet(config, model, fleet.access, (Capacity("m"),), backlog, lambda: changes.append(None))
    async with fleet.connected(), fleet.following(followed):
        d, p = decode(), prefill()
        fleet.follow((d, p))
        former, other = fleet.channels.get(d.address), fleet.channels.get(p.address)
        fleet.follow((replace(d, state=WorkerState.DRAINING), p))
        assert fleet.channels.get(d.address) is former, "the same start"
        fleet.follow((replace(d, epoch=d.epoch + 1), p))
        assert fleet.channels.get(d.address) is not former
        assert fleet.channels.get(p.address) is other
        assert len(changes) == 3, "a queued request may fit after each change"


FEW = 6
"""A stream that is cancelled while it opens may still be kept."""


@asynccontextmanager
async def listening(count: int) -> AsyncIterator[list[str]]:
    """Addresses of processes that only serve their health."""
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    ports = [server.add_insecure_port("127.0.0.1:0") for _ in range(count)]
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    yield [f"127.0.0.1:{port}" for port in ports]
    await server.stop(0)


async def test_connections_to_workers_that_left_are_closed_without_a_garbage_collection() -> None:
    """A circle of references once kept a hundred of them open until the collector came by."""
    config = FrontendConfig(registry=("127.0.0.1:1",), model=MODEL)
    model = ServedModel("m", Tokenizer.open(MODEL), {})
    fleet = Fleet(config, "frontend-0")
    followed = ModelFleet(config, model, fleet.access, (), PrefillBacklog("", 5.0), lambda: None)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async with listening(10) as addresses, fleet.connected(), fleet.following(followed):
        before = descriptors()
        gc.disable()
        # A captured record would keep an error, its frames and so the call that failed.
        logging.disable(logging.CRITICAL)
        try:
            for turn in range(3):
                fleet.follow(tuple(replace(decode(f"{turn}-{at}"), address=at, epoch=turn + 1) for at in addresses))
                await assert_eventually(lambda: descriptors() >= before + 2 * len(addresses))
                # No step stream opens here; one that is cancelled before it has failed is freed later.
                await assert_eventually(lambda: all(link._problem for link in fleet._links._links.values()))
                fleet.follow(())
                await assert_eventually(lambda: descriptors() <= before + FEW)
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()
