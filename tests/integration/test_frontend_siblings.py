"""A frontend of three processes on one port: where connections go, what a dead one costs, and that all are as one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from operator import le
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.frontend.v1 import sibling_service_pb2 as sibling_pb
from tandem.client import admin_calls, calls
from tandem.client.sibling_calls import SiblingCalls
from tandem.errors import RequestNotFound, ServiceError, TandemError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.observability.merged_scrape import LABEL
from tandem.testing.eventually import assert_eventually
from tandem.tls.paths import client_tls
from tests.integration.conftest import DEMO_MODEL, SIMULATED
from tests.integration.support import baseline
from tests.integration.support.calls import Stream, generate, request_of
from tests.integration.support.otlp_receiver import values
from tests.integration.support.scraped import samples, scrape
from tests.integration.test_simulated_cluster import STORY, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

COUNT = 3
SILENCE = "process 0 of this frontend does not respond; results are without it"
SLOW = {"engine-extra": json.dumps({"decode_step_s": 0.02})}
COMES_BACK_WITHIN_S = 20.0
"""A second of pause, and the start of a process on a machine that others use."""


class Processes:
    """The processes of a cluster's first frontend, looked at from outside."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.frontend = cluster.frontend
        self.tls = client_tls(cluster.spec.tls)

    @property
    def _listening(self) -> dict[int, tuple[int, Path]]:
        """Process id and socket for siblings, by number."""
        return {
            int(Path(path).stem): (child.pid, Path(path))
            for child in psutil.Process(self.frontend.pid).children()
            for connection in child.net_connections("unix")
            if (path := str(connection.laddr)).endswith(".rpc")
        }

    @property
    def pids(self) -> dict[int, int]:
        """By number."""
        return {number: pid for number, (pid, _) in self._listening.items()}

    @property
    def paths(self) -> dict[int, Path]:
        """Where each of them answers its siblings."""
        return {number: path for number, (_, path) in self._listening.items()}

    async def open_requests(self) -> dict[int, set[str]]:
        """Ids of the open requests of each."""
        request = sibling_pb.ListSiblingRequestsRequest(open_only=True, count=1_000)
        return {
            number: {one.summary.request_id for one in await SiblingCalls(path).requests(request)}
            for number, path in sorted(self.paths.items())
        }

    async def all_serve(self, count: int = COUNT) -> None:
        await assert_eventually(
            lambda: admin_calls.frontend_figures(self.frontend.address, tls=self.tls),
            lambda stats: stats.processes == count,
            within_s=COMES_BACK_WITHIN_S,
            every_s=0.1,
            what="every process serves",
        )


@asynccontextmanager
async def several(
    logs: Path, worker_flags: dict[str, str] = SIMULATED, count: int = COUNT, **spec: Any
) -> AsyncIterator[LocalCluster]:
    """A cluster whose frontend has so many processes, all serving. Nothing of its requests is left in the end."""
    flags: dict[str, Any] = {"engine": "simulated", "frontend_processes": count, "worker_flags": worker_flags, **spec}
    async with LocalCluster(ClusterSpec(model=DEMO_MODEL, log_directory=logs, **flags)) as cluster:
        await Processes(cluster).all_serve(count)
        before = await baseline.take(cluster)
        yield cluster
        await baseline.assert_back(cluster, before)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    async with several(tmp_path_factory.mktemp("processes"), metrics=True) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    async with several(tmp_path_factory.mktemp("slow"), SLOW) as cluster:
        yield cluster


async def open_streams(cluster: LocalCluster, count: int, max_tokens: int) -> dict[str, asyncio.Task[Stream]]:
    """Streams over a connection each, by the id that they were given; all have begun."""
    streams = {}
    for number in range(count):
        request = request_of(f"{STORY} {number}", max_tokens=max_tokens, ignore_eos=True)
        request.request_id = f"stream-{number}"
        streams[request.request_id] = asyncio.create_task(generate(cluster, request))
    processes = Processes(cluster)
    await assert_eventually(
        processes.open_requests,
        lambda found: sum(map(len, found.values())) == count,
        what=f"{count} open streams",
    )
    return streams


async def test_streams_of_several_connections_are_spread_evenly(slow: LocalCluster) -> None:
    streams = await open_streams(slow, 12, 100)
    found = await Processes(slow).open_requests()
    # A process that let a connection lie for a moment, because the machine is busy, is passed over once.
    assert all(3 <= len(ids) <= 5 for ids in found.values()), found
    stats = await admin_calls.frontend_figures(slow.frontend.address)
    assert stats.open_requests == 12, "each process answers for all"
    for number, stream in enumerate(await asyncio.gather(*streams.values())):
        assert stream.token_ids == oracle(f"{STORY} {number}", 100)


async def test_a_killed_process_costs_exactly_its_own_streams(slow: LocalCluster) -> None:
    processes = Processes(slow)
    before = processes.pids
    streams = await open_streams(slow, 12, 150)
    lost = (await processes.open_requests())[1]
    assert 3 <= len(lost) <= 5
    os.kill(before[1], signal.SIGKILL)
    meanwhile = [await generate(slow, request_of(STORY, max_tokens=5)) for _ in range(3)]
    assert [stream.token_ids for stream in meanwhile] == [oracle(STORY, 5)] * 3
    ended = dict(zip(streams, await asyncio.gather(*streams.values(), return_exceptions=True), strict=True))
    for number, (request_id, ending) in enumerate(ended.items()):
        if request_id in lost:
            assert isinstance(ending, ServiceError)
            assert ending.code == "UNAVAILABLE"
        else:
            assert isinstance(ending, Stream), ending
            assert ending.token_ids == oracle(f"{STORY} {number}", 150)
    await processes.all_serve()
    after = processes.pids
    assert after.keys() == before.keys()
    assert [number for number in before if after[number] != before[number]] == [1]
    assert slow.frontend.runs
    assert await calls.is_serving(slow.frontend.address)


async def test_every_process_knows_every_request(cluster: LocalCluster) -> None:
    address = cluster.frontend.address
    streams = await asyncio.gather(*(generate(cluster, request_of(f"{STORY} {n}")) for n in range(2 * COUNT)))
    ids = {stream.accepted.request_id for stream in streams}
    # The turn goes round, so so many calls meet each of the processes.
    for request_id in ids:
        for _ in range(COUNT):
            (timeline,) = await admin_calls.request_timelines(address, request_id)
            assert timeline.request_id == request_id
    for _ in range(COUNT):
        with pytest.raises(RequestNotFound):
            await admin_calls.request_timelines(address, "missing")
    for _ in range(COUNT):
        listed: list[admin_pb.RequestSummary] = []
        request = admin_pb.ListRequestsRequest(page_size=4)
        while True:
            page = await admin_calls.list_requests(address, request)
            assert len(page.requests) <= 4
            listed += page.requests
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        known = [one.request_id for one in listed]
        assert ids <= set(known)
        assert len(known) == len(set(known)), "no request is listed twice"
        begins = [one.begin_time.ToNanoseconds() for one in listed]
        assert begins == sorted(begins, reverse=True)


async def test_figures_are_those_of_all(cluster: LocalCluster) -> None:
    address = cluster.frontend.address
    before = await admin_calls.frontend_figures(address)
    await asyncio.gather(*(generate(cluster, request_of(STORY, max_tokens=10)) for _ in range(2 * COUNT)))
    for _ in range(COUNT):
        stats = await admin_calls.frontend_figures(address)
        assert stats.processes == COUNT
        assert stats.finished_requests - before.finished_requests == 2 * COUNT
        assert stats.completion_tokens - before.completion_tokens == 20 * COUNT
        assert stats.time_to_first_token.count - before.time_to_first_token.count == 2 * COUNT
        held = await calls.process_figures(address)
        assert held.pid == cluster.frontend.pid, "it is known by the one that was started"
        assert (held.resident_bytes or 0) > (COUNT + 1) * 30 * 2**20


async def test_one_scrape_covers_all_processes(cluster: LocalCluster) -> None:
    await asyncio.gather(*(generate(cluster, request_of(STORY, max_tokens=3)) for _ in range(2 * COUNT)))
    assert cluster.frontend.metrics_address is not None
    text = await scrape(cluster.frontend.metrics_address)
    found = samples(text)
    assert all(LABEL in labels for _, labels, _ in found), "each sample says of which process it is"
    numbers = {str(number) for number in range(COUNT)}
    admitted = {labels[LABEL]: value for name, labels, value in found if name == "tandem_requests_admitted_total"}
    assert admitted.keys() == numbers
    assert all(admitted.values())
    memory = {labels[LABEL] for name, labels, _ in found if name == "process_resident_memory_bytes"}
    assert memory == {*numbers, "parent"}
    states = {labels["tandem_state"]: value for name, labels, value in found if name == "tandem_processes"}
    assert states["serving"] == COUNT
    assert text.count("# TYPE tandem_requests_admitted_total counter") == 1, "a metric is described once"


async def test_a_process_that_does_not_answer_is_left_out_of_the_answers(tmp_path: Path) -> None:
    async with several(tmp_path, metrics=True) as cluster:
        processes, address = Processes(cluster), cluster.frontend.address
        streams = await asyncio.gather(*(generate(cluster, request_of(f"{STORY} {n}")) for n in range(COUNT)))
        frozen = processes.pids[0]
        silences = cluster.frontend.log.read_text().count(SILENCE)
        os.kill(frozen, signal.SIGSTOP)
        try:
            # The one connection that the frozen one is given shows that it does not take any.
            with contextlib.suppress(TandemError):
                for _ in range(COUNT):
                    await admin_calls.frontend_figures(address)
            stats = await admin_calls.frontend_figures(address)
            assert stats.processes == COUNT - 1
            reported_count = cluster.frontend.log.read_text().count(SILENCE) - silences
            assert 1 <= reported_count <= COUNT - 1, "each of the others says it once"
            assert stats.finished_requests == COUNT - 1
            assert cluster.frontend.metrics_address is not None
            found = {labels[LABEL] for _, labels, _ in samples(await scrape(cluster.frontend.metrics_address))}
            assert found == {"1", "2", "parent"}
        finally:
            os.kill(frozen, signal.SIGCONT)
        await processes.all_serve()
        assert (await admin_calls.frontend_figures(address)).finished_requests == COUNT
        assert len(streams) == COUNT


async def test_a_profile_names_the_process_that_was_recorded(tmp_path: Path) -> None:
    async with several(tmp_path, role_flags={"frontend": {"admin-enabled": "true"}}) as cluster:
        names = []
        for _ in range(COUNT):
            request = admin_pb.CaptureProfileRequest(duration_ms=100)
            async for name, _data in admin_calls.capture_profile(cluster.frontend.address, request):
                names.append(name)
        assert sorted(names) == [f"{number}-profile.speedscope.json" for number in range(COUNT)]


async def test_two_hundred_connections_leave_nothing_behind(cluster: LocalCluster) -> None:
    """The baseline of the fixture is held at its end; here it is held over as many connections as would show a leak."""
    parent = psutil.Process(cluster.frontend.pid)
    children = {child.pid for child in parent.children(recursive=True)}

    async def held() -> tuple[int, int]:
        stats = await calls.process_figures(cluster.frontend.address)
        return stats.descriptors, stats.open_calls

    await asyncio.gather(*(generate(cluster, request_of(STORY, max_tokens=2)) for _ in range(2 * COUNT)))
    before = await held()
    for _ in range(10):
        await asyncio.gather(*(generate(cluster, request_of(STORY, max_tokens=2)) for _ in range(20)))
    await assert_eventually(held, lambda now: now[0] <= before[0] + 6 and now[1] == 0, what=f"as before {before}")
    assert {child.pid for child in parent.children(recursive=True)} == children


async def test_a_drain_by_sigterm_loses_nothing(tmp_path: Path) -> None:
    """One frontend after the other is stopped and started, under load that knows both."""
    spec: dict[str, Any] = {"frontends": 2, "frontend_processes": 2, "engine": "simulated", "worker_flags": SIMULATED}
    async with LocalCluster(ClusterSpec(model=DEMO_MODEL, log_directory=tmp_path, **spec)) as cluster:
        ended: list[int] = []
        failures: list[TandemError] = []
        callers = [asyncio.create_task(ask_for_ever(cluster, ended, failures)) for _ in range(6)]
        for frontend in cluster.frontends:
            begun = len(ended)
            await assert_eventually(lambda: len(ended), partial(le, begun + 20), within_s=20)
            assert await frontend.stop() == 0
            await cluster.restart(frontend.name)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert not failures
        assert set(ended) == {40}
        assert len(ended) > 40, "too few requests to prove anything"


async def ask_for_ever(cluster: LocalCluster, ended: list[int], failures: list[TandemError]) -> None:
    """As an edge does: where a frontend is going away, the next one is asked before the first byte."""
    request, number = request_of(STORY, max_tokens=40, ignore_eos=True), 0
    while True:
        number += 1
        for attempt in range(2):
            frontend = cluster.frontends[(number + attempt) % 2]
            count = 0
            try:
                async for event in calls.generate(frontend.address, request, 30):
                    count += len(event.chunk.token_ids)
            except TandemError as problem:
                if count or attempt:
                    failures.append(problem)
                    break
            else:
                ended.append(count)
                break


async def test_each_process_pushes_under_a_name_of_its_own(tmp_path: Path) -> None:
    """What is left is pushed at the end, so nothing has to wait for the interval."""
    async with pushed_metrics() as (address, pushed):
        async with several(tmp_path, otlp_endpoint=address) as cluster:
            await asyncio.gather(*(generate(cluster, request_of(STORY, max_tokens=3)) for _ in range(2 * COUNT)))
        own = {f"frontend/{number}" for number in range(COUNT)}
        admitted = {instance: names for instance, names in pushed.items() if instance.startswith("frontend")}
        assert admitted.keys() == {"frontend", *own}
        assert all("tandem.requests.admitted" in admitted[instance] for instance in own)
        assert "tandem.requests.admitted" not in admitted["frontend"], "the parent serves no requests"
        assert "tandem.processes" in admitted["frontend"]


@asynccontextmanager
async def pushed_metrics() -> AsyncIterator[tuple[str, dict[str, set[str]]]]:
    """A collector of metrics: its address, and the names of what each instance has pushed."""
    found: dict[str, set[str]] = {}

    class Collector(MetricsServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            for pushed in request.resource_metrics:
                names = {metric.name for scope in pushed.scope_metrics for metric in scope.metrics}
                found.setdefault(values(pushed.resource.attributes)["service.instance.id"], set()).update(names)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    add_MetricsServiceServicer_to_server(Collector(), server)  # type: ignore[no-untyped-call]  # generated
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address, found
    finally:
        await server.stop(0)
