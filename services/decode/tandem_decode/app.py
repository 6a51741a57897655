"""Composition root of the decode worker: the shared life of a worker with the decode call on it."""

from __future__ import annotations

from functools import partial

from tandem.api.decode.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server
from tandem.engine.port import Engine
from tandem.model.worker import Worker
from tandem.rpc.server import AddServicer
from tandem.worker.host import WorkerHost
from tandem.worker.legs import Legs
from tandem_decode.config import DecodeConfig
from tandem_decode.decode import Decode
from tandem_decode.servicer import SERVICE_NAME, DecodeServicer


def build(config: DecodeConfig) -> WorkerHost:
    """The worker as `tandem.runtime.process` runs it; nothing is opened yet."""
    return WorkerHost(config, config.worker_role, _role_service)


def _role_service(engine: Engine, legs: Legs, worker: Worker) -> tuple[str, AddServicer]:
    servicer = DecodeServicer(Decode(legs, worker), worker)
    return SERVICE_NAME, partial(add_DecodeServiceServicer_to_server, servicer)
