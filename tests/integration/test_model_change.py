"""The model is changed under a name while streams run: no stream goes on with other weights than it began with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.errors import LegFailed
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.calls import request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

TOKENS = 600
OLD = ("decode-0", "decode-1")


class LongStream:
    """A stream that its test reads while workers come and go."""

    def __init__(self, cluster: LocalCluster, number: int) -> None:
        request = request_of(token_ids=[20 + number, 30, 40], max_tokens=TOKENS, ignore_eos=True)
        self.events: list[pb.GenerateResponse] = []
        self.ending = asyncio.create_task(self._read(cluster.frontend.address, request))

    @property
    def token_count(self) -> int:
        return sum(len(event.chunk.token_ids) for event in self.events)

    @property
    def began_on(self) -> str:
        return self.events[0].accepted.route.decode_worker_id

    @property
    def ended_on(self) -> str:
        return self.events[-1].finish.route.decode_worker_id

    async def _read(self, address: str, request: pb.GenerateRequest) -> None:
        async with contextlib.aclosing(calls.generate(address, request, 30)) as events:
            async for event in events:
                self.events.append(event)


@contextlib.asynccontextmanager
async def two_models(logs: Path) -> AsyncIterator[LocalCluster]:
    """Two pairs with the old weights and a pair with the new ones, all of one model name."""
    spec = ClusterSpec(model=DEMO_MODEL, log_directory=logs, engine="simulated", prefill=2, decode=3)
    cluster = LocalCluster(spec)
    for worker in cluster.workers:
        is_new = worker.name in ("prefill-1", "decode-2")
        worker.flags["engine-extra"] = json.dumps({"decode_step_s": 0.01, **({"weights": "new"} if is_new else {})})
    async with cluster:
        yield cluster


async def streams_on_each(cluster: LocalCluster, workers: set[str]) -> list[LongStream]:
    """So many streams that each worker has one; routes are random."""
    streams: list[LongStream] = []
    while {stream.began_on for stream in streams} != workers:
        streams.append(LongStream(cluster, len(streams)))
        await assert_eventually(lambda: streams[-1].token_count > 5, within_s=10)
    return streams


async def test_streams_keep_the_weights_that_they_began_with(tmp_path: Path) -> None:
    async with two_models(tmp_path) as cluster:
        streams = await streams_on_each(cluster, {*OLD, "decode-2"})
        pairs = {(stream.events[0].accepted.route.prefill_worker_id, stream.began_on) for stream in streams}
        assert pairs == {("prefill-0", "decode-0"), ("prefill-0", "decode-1"), ("prefill-1", "decode-2")}
        counts = [stream.token_count for stream in streams]

        cluster.process("decode-0").signal(signal.SIGKILL)
        moved = [stream for stream in streams if stream.began_on == "decode-0"]
        await assert_eventually(lambda: all(stream.token_count > 20 + max(counts) for stream in moved), within_s=20)
        cluster.process("decode-1").signal(signal.SIGKILL)
        await asyncio.wait([stream.ending for stream in streams])

        new = [stream for stream in streams if stream.began_on == "decode-2"]
        for stream in new:
            stream.ending.result()
            assert (stream.ended_on, stream.token_count) == ("decode-2", TOKENS)
        for stream in [stream for stream in streams if stream not in new]:
            failed = stream.ending.exception()
            assert isinstance(failed, LegFailed), failed
            assert failed.metadata["worker"] == "decode-1", "it went on with its own weights once"
            assert failed.metadata["continuation"] == "weights"
            assert "no worker has the weights that this stream began with" in str(failed)
            assert stream.token_count < TOKENS
        assert {failed.metadata["attempt"] for failed in map(_failure, moved)} == {"2"}


def _failure(stream: LongStream) -> LegFailed:
    failed = stream.ending.exception()
    assert isinstance(failed, LegFailed)
    return failed
