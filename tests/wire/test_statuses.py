"""Errors over a real channel: none loses its type, whatever it echoes."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from tandem.errors import InvalidRequest, ModelNotFound, TandemError
from tandem.rpc.channels import open_channel
from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.server import RpcServer
from tandem.rpc.status import ERROR_BY_REASON, _rebuild, from_rpc_error, to_status
from tandem.testing.eventually import assert_eventually
from tests.wire.support.server_kinds import on_both_servers

NAME = "tandem.api.registry.v1.RegistryService"


class Failing(pb_grpc.RegistryServiceServicer):
    """Answers List with an error."""

    error: TandemError

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        self.requests.append(request)
        raise self.error

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        self.requests.append(request)
        try:
            raise ValueError("a cause with frames of its own")
        except ValueError:
            raise self.error  # noqa: B904
        yield pb.WatchResponse()


@asynccontextmanager
async def failing(server_type: Any, request_bytes_max: int = 2**20) -> AsyncIterator[tuple[Failing, Any]]:
    servicer = Failing()  # type: ignore[abstract]  # its other methods answer UNIMPLEMENTED
    server = server_type(request_bytes_max=request_bytes_max)
    server.add(NAME, lambda grpc_server: pb_grpc.add_RegistryServiceServicer_to_server(servicer, grpc_server))
    await server.start("127.0.0.1", 0)
    try:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield servicer, pb_grpc.RegistryServiceStub(channel)
    finally:
        await server.stop(0)


async def seen(stub: Any, request: pb.ListRequest | None = None) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.List(request or pb.ListRequest(), timeout=10)
    return from_rpc_error(failed.value)


def assert_begins(cut: str, whole: str) -> None:
    whole = whole.encode(errors="replace").decode()
    assert cut == whole or (cut.endswith("...") and whole.startswith(cut.removesuffix("...")))


# Half of a surrogate pair and control characters included: JSON can spell both.
TEXTS = st.one_of(
    st.text(st.characters(), max_size=40),
    st.text(st.characters(), min_size=1, max_size=3).map(lambda text: text * 20_000),
)
METADATA = st.dictionaries(st.from_regex("[a-z_]{1,20}", fullmatch=True), TEXTS, max_size=12)


@on_both_servers
@given(
    errors=st.lists(st.tuples(st.sampled_from(sorted(ERROR_BY_REASON)), TEXTS, METADATA), min_size=1, max_size=20),
)
@settings(max_examples=15, deadline=None)
async def test_every_error_arrives_as_what_it_was(
    server_type: Any, errors: list[tuple[str, str, dict[str, str]]]
) -> None:
    async with failing(server_type) as (servicer, stub):
        for reason, message, metadata in errors:
            servicer.error = _rebuild(reason, message, metadata, 2.5)
            assert to_status(servicer.error).ByteSize() < 3_000, "with the message and base64 this is 4 KiB"
            got = await seen(stub)
            assert type(got) is ERROR_BY_REASON[reason]
            assert got.retry_delay_s == servicer.error.retry_delay_s
            assert_begins(got.message, message)
            assert set(got.metadata) == set(list(metadata)[: len(got.metadata)]), (
                "the first ones, until there is no place"
            )
            for key, value in got.metadata.items():
                assert_begins(value, metadata[key])


@on_both_servers
async def test_a_few_long_values_all_arrive(server_type: Any) -> None:
    async with failing(server_type) as (servicer, stub):
        servicer.error = ModelNotFound("no model " + "m" * 10**6, model="m" * 10**6, second="é" * 10**6, third="t")
        got = await seen(stub)
    assert isinstance(got, ModelNotFound)
    assert len(got.message) == 1_000
    sizes = {key: len(value.encode()) for key, value in got.metadata.items()}
    assert sizes == {"model": 256, "second": 255, "third": 1}


@on_both_servers
async def test_what_fits_is_not_touched(server_type: Any) -> None:
    async with failing(server_type) as (servicer, stub):
        servicer.error = InvalidRequest("prompt", "f" * 992, limit=2048)
        got = await seen(stub)
    assert (got.message, got.metadata) == ("prompt: " + "f" * 992, {"field": "prompt", "limit": "2048"})


@on_both_servers
async def test_a_refused_request_does_not_wait_for_the_garbage_collector(server_type: Any) -> None:
    """It may be of many megabytes, and its client may come again at once."""
    async with failing(server_type) as (servicer, stub):
        gc.collect()
        gc.disable()
        try:
            servicer.error = InvalidRequest("model", "is wrong")
            await seen(stub)
            servicer.error = InvalidRequest("model", "is wrong")
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Watch(pb.WatchRequest()).read()

            async def holders() -> list[int]:
                # One is the list of the servicer, one the call that counts.
                return [sys.getrefcount(servicer.requests[number]) - 2 for number in range(2)]

            await assert_eventually(
                holders, lambda counts: counts == [0, 0], within_s=2, what="no worker holds a request"
            )
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("server_type", "bytes_over", "says"),
    [
        (RpcServer, 10, "are more than 1000"),
        (RpcServer, 17 * 2**20, "larger than max"),
        (Http2RpcServer, 10, "are more than 1000"),
        (Http2RpcServer, 17 * 2**20, "are more than 1000"),
    ],
)
async def test_a_request_beyond_its_limit_names_the_request(server_type: Any, bytes_over: int, says: str) -> None:
    async with failing(server_type, request_bytes_max=1_000) as (_, stub):
        got = await seen(stub, pb.ListRequest(model="m" * (1_000 + bytes_over)))
    assert isinstance(got, InvalidRequest)
    assert got.field == "request"
    assert says in got.message
