"""The files of a model, from a worker to a frontend that has none of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.config import FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.models.opening import DIRECTORY_PREFIX, ModelOpener, Shared
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.tenancy import Tenancy

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.client.model_files import copy_model_files
from tandem.clock import monotonic
from tandem.domain.checkpoint import FRONTEND_FILES, tokenizer_digest
from tandem.domain.worker import Worker
from tandem.errors import NotSupported, ServiceError, StartError
from tandem.observability.metrics import Metrics
from tandem.observability.trace_store import TraceStore
from tandem.rpc.channels import Channels
from tandem.rpc.server import RpcServer
from tandem.service import run_directory
from tandem.testing.fake_model import write_fake_model
from tandem.worker.model_files import PART_BYTES
from tandem.worker.servicer import SERVICE_NAME, WorkerServicer
from tests.wire.support.registry_host import make_worker


class Sends(pb_grpc.WorkerServiceServicer):
    """A worker that sends these parts."""

    GetCapabilities = WatchLoad = WatchKvEvents = cast("Any", None)
    Abort = Drain = FlushCache = ChangeRole = cast("Any", None)
    LoadAdapter = ServeAdapter = UnloadAdapter = cast("Any", None)

    def __init__(self, *parts: tuple[str, bytes]) -> None:
        self._parts = parts

    async def ReadModelFiles(  # noqa: N802
        self, request: pb.ReadModelFilesRequest, context: Any
    ) -> AsyncIterator[pb.ReadModelFilesResponse]:
        for name, data in self._parts:
            yield pb.ReadModelFilesResponse(name=name, data=data)


@contextlib.asynccontextmanager
async def serving(servicer: pb_grpc.WorkerServiceServicer) -> AsyncIterator[tuple[Channels, Worker]]:
    server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, servicer))])
    await server.start("127.0.0.1", 0)
    channels = Channels(None)
    try:
        yield channels, replace(make_worker(), address=f"127.0.0.1:{server.port}")
    finally:
        await channels.close()
        await server.stop(0)


def worker_of(model: Path | None) -> WorkerServicer:
    nothing = cast("Any", None)
    return WorkerServicer(nothing, nothing, nothing, lambda: None, model=model)


async def test_a_copy_has_all_that_a_tokenizer_needs_and_no_weights(tmp_path: Path) -> None:
    model, copied = write_fake_model(tmp_path / "model"), tmp_path / "copied"
    (model / "merges.txt").write_bytes(bytes(range(256)) * (PART_BYTES // 256) + b"more than one part")
    (model / "added_tokens.json").touch()
    copied.mkdir()
    (copied / "config.json").write_text("of a copy that failed")
    async with serving(worker_of(model)) as (channels, worker):
        await copy_model_files(channels, worker, copied)
    here, there = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (copied, model))
    assert here == {name: data for name, data in there.items() if name in FRONTEND_FILES}
    assert len(there) == len(here) + 1, "the weights stay"
    assert tokenizer_digest(copied) == tokenizer_digest(model)
    assert Tokenizer.open(copied).chat_template is not None


@pytest.mark.parametrize("name", ["../escaped.json", "/tmp/escaped.json", "model.safetensors", ""])
async def test_a_name_that_is_no_file_of_a_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "copied"
    directory.mkdir()
    async with serving(Sends(("config.json", b"{}"), (name, b"x"))) as (channels, worker):
        with pytest.raises(ServiceError, match="no file of a tokenizer"):
            await copy_model_files(channels, worker, directory)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["config.json"]


async def test_files_without_end_are_refused(tmp_path: Path) -> None:
    async with serving(Sends(*[("tokenizer.json", bytes(100))] * 50)) as (channels, worker):
        with pytest.raises(ServiceError, match="over 1000 bytes"):
            await copy_model_files(channels, worker, tmp_path, bytes_max=1_000)
    assert (tmp_path / "tokenizer.json").stat().st_size == 1_000


async def test_a_worker_that_sends_no_files_is_named_without_its_address(tmp_path: Path) -> None:
    async with serving(worker_of(None)) as (channels, worker):
        with pytest.raises(NotSupported, match=worker.worker_id) as refused:
            await copy_model_files(channels, worker, tmp_path)
    assert worker.address not in str(refused.value)


@contextlib.asynccontextmanager
async def opener() -> AsyncIterator[ModelOpener]:
    """Of a frontend that has no model of its own."""
    chosen = FrontendConfig(registry=("127.0.0.1:1",))
    fleet, requests, metrics = Fleet(chosen, "frontend-0"), OpenRequests(8, monotonic), Metrics()
    shared = Shared(chosen, fleet, requests, TraceStore(), Coalescing(), Tenancy(), metrics)
    async with fleet.connected():
        yield ModelOpener(shared, None)


def described(worker: Worker, model: Path, **more: Any) -> Worker:
    capabilities = replace(worker.capabilities, model="m", tokenizer_digest=tokenizer_digest(model))
    return replace(worker, capabilities=capabilities, **more)


async def test_a_model_is_opened_with_the_files_of_the_first_worker_that_sends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv(run_directory.VARIABLE, str(run))
    model = write_fake_model(tmp_path / "model")
    async with serving(worker_of(None)) as (_, gone):
        pass
    async with (
        serving(worker_of(None)) as (_, earlier),
        serving(worker_of(model)) as (_, good),
        opener() as made,
        made.open("m", [described(one, model) for one in (gone, earlier, good)]) as opened,
    ):
        assert opened.pipeline.model.tokenizer.digest == tokenizer_digest(model)
        assert opened.pipeline.model.name == "m"
        copies = [*run.glob(f"{DIRECTORY_PREFIX}*")]
        assert len(copies) == 1
    assert not copies[0].exists()


async def test_files_that_are_not_those_of_the_registered_digest_are_refused(tmp_path: Path) -> None:
    model, other = write_fake_model(tmp_path / "model"), write_fake_model(tmp_path / "other", vocabulary_size=400)
    async with serving(worker_of(other)) as (_, worker), opener() as made:
        with pytest.raises(StartError, match="sent another tokenizer than it registered"):
            async with made.open("m", [described(worker, model)]):
                pass


async def test_a_damaged_file_is_named_without_the_path_of_its_copy(tmp_path: Path) -> None:
    model = write_fake_model(tmp_path / "model")
    (model / "generation_config.json").write_text("{")
    async with serving(worker_of(model)) as (_, worker), opener() as made:
        with pytest.raises(StartError, match=r"^generation_config\.json cannot be read"):
            async with made.open("m", [described(worker, model)]):
                pass


async def test_a_worker_that_is_gone_is_named_without_its_address(tmp_path: Path) -> None:
    async with serving(worker_of(None)) as (_, worker):
        pass
    channels = Channels(None)
    with pytest.raises(ServiceError, match=worker.worker_id) as failed:
        await copy_model_files(channels, worker, tmp_path)
    await channels.close()
    assert worker.address not in str(failed.value)
