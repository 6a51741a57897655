"""Cost of request traces and spans in a frontend: `python -m benchmarks.tracing --before ../checkout-before`.

Starts clusters of simulated workers side by side: with traces off, with every request traced, and, if the checkout of
an earlier state is given, one of that state in this environment. Requests go to them in turn, so that other load on the
machine affects all alike. Compares the CPU time of the frontend process per request, from /proc, including the
exporting thread and the log record. Also prints the cost of the parts alone: recording a request trace, its spans, and
one batch of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent import futures
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.observability.logs import log_request
from tandem.observability.otlp import Encoder
from tandem.observability.request_trace import AttemptTrace, RequestTrace
from tandem.observability.spans import spans_of
from tandem.observability.trace_store import TraceStore, trace_ids
from tandem.rpc.channels import open_channel

MODEL = Path("models") / "tandem-demo"
FAST = {"engine-extra": json.dumps({"decode_step_s": 0.0005})}
PROMPT = "Once upon a time there was a fox"


class Sink:
    """A collector that takes everything, in a thread of this process: its own cost is not the frontend's."""

    def __init__(self) -> None:
        self.span_count = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        method = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=collector_pb.ExportTraceServiceRequest.FromString,
            response_serializer=collector_pb.ExportTraceServiceResponse.SerializeToString,
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": method}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: Any, context: Any) -> Any:
        self.span_count += sum(len(scope.spans) for rs in request.resource_spans for scope in rs.scope_spans)
        return collector_pb.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(0)


def cpu_s(pid: int) -> float:
    """Processor time of a process and its threads, without its children, to the nanosecond."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@asynccontextmanager
async def cluster_here(**spec: Any) -> AsyncIterator[tuple[str, int]]:
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    spec = {"model": MODEL, "log_directory": logs, "engine": "simulated", "worker_flags": FAST, **spec}
    async with LocalCluster(ClusterSpec(**spec)) as cluster:
        yield cluster.frontend.address, cluster.frontend.pid


CHILD = """
import asyncio, json, sys
from pathlib import Path
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
async def main():
    spec = ClusterSpec(model=Path(sys.argv[1]), log_directory=Path(sys.argv[2]), engine="simulated",
                       worker_flags=json.loads(sys.argv[3]))
    async with LocalCluster(spec) as cluster:
        print(json.dumps([cluster.frontend.address, cluster.frontend.pid]), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""


@asynccontextmanager
async def cluster_before(checkout: Path) -> AsyncIterator[tuple[str, int]]:
    """A cluster of another checkout's code."""
    roots = [checkout / "src", *sorted((checkout / "services").iterdir())]
    path = os.pathsep.join(str(root.resolve()) for root in roots)
    logs = tempfile.mkdtemp(prefix="tandem-bench-")
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(MODEL.resolve()), logs, json.dumps(FAST)),
        env={**os.environ, "PYTHONPATH": path},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        address, pid = json.loads(await child.stdout.readline())
        yield address, pid
    finally:
        child.stdin.close()
        await child.wait()


async def one(stub: Any, tokens: int) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, stopping={"max_tokens": tokens, "ignore_eos": True}, sampling={"temperature": 0}
    )
    async for _ in stub.Generate(request):
        pass


async def measured(stub: Any, pid: int, requests: int, concurrency: int, tokens: int) -> float:
    """Milliseconds of the frontend's processor for each request."""
    before_s = cpu_s(pid)
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            await one(stub, tokens)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return (cpu_s(pid) - before_s) / requests * 1000


async def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    sink = Sink()
    async with AsyncExitStack() as stack:
        clusters = {"off": await stack.enter_async_context(cluster_here())}
        clusters["traced"] = await stack.enter_async_context(cluster_here(otlp_endpoint=sink.address))
        if arguments.before is not None:
            clusters["before"] = await stack.enter_async_context(cluster_before(arguments.before))
        stubs: dict[str, Any] = {}
        for name, (address, _) in clusters.items():
            stubs[name] = InferenceServiceStub(await stack.enter_async_context(open_channel(address)))
            await measured(stubs[name], clusters[name][1], 100, arguments.concurrency, arguments.tokens)
        measurements: dict[str, list[float]] = {name: [] for name in clusters}
        for number in range(arguments.rounds):
            names = list(clusters) if number % 2 else list(clusters)[::-1]
            for name in names:
                measurements[name].append(
                    await measured(
                        stubs[name], clusters[name][1], arguments.requests, arguments.concurrency, arguments.tokens
                    )
                )
    sink.stop()
    base = measurements.get("before") or measurements["off"]
    return {
        "requests": arguments.requests * arguments.rounds,
        "tokens_each": arguments.tokens,
        "spans_received": sink.span_count,
        "cpu_ms_per_request": {name: _summary(values) for name, values in measurements.items()},
        "percent_against": "before" if "before" in measurements else "off",
        "percent": {
            name: _summary([100 * (value / other - 1) for value, other in zip(values, base, strict=True)])
            for name, values in measurements.items()
        },
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def parts() -> dict[str, float]:
    """Microseconds of each part alone."""
    trace = RequestTrace(request_id="r", model="m")

    def whole(traces: TraceStore[RequestTrace]) -> RequestTrace:
        with traces.following(RequestTrace(request_id="r" * 32, model="tandem-demo", begin_s=time.time())) as made:
            for name in ("tokenise", "admit", "wait", "route"):
                made.step(name, made.begin_s)
            attempt = made.add_attempt(AttemptTrace(begin_s=time.time(), span_context=traces.child(made.span_context)))
            attempt.accepted("decode")
            made.note_tokens(time.time(), 1)
            attempt.end(None, None)
            made.finish("stop", 9, 1, 0)
        return made

    off, traced = TraceStore[RequestTrace](), TraceStore[RequestTrace](ids=trace_ids(1.0))
    closed = whole(traced)
    encoder, new_id = Encoder({}), trace_ids(1.0).span_id
    logging.getLogger("tandem.request").setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())
    return {
        "batch_of_tokens": _us(lambda: trace.note_tokens(1.0, 1), 200_000),
        "record_off": _us(lambda: whole(off), 5_000),
        "record_traced": _us(lambda: whole(traced), 5_000),
        "log_line_without_writing": _us(lambda: log_request(closed), 5_000),
        "spans": _us(lambda: spans_of(closed, new_id), 5_000),
        "spans_as_bytes": _us(lambda: encoder.request([closed]).SerializeToString(), 2_000),
    }


def _us(work: Any, count: int) -> float:
    best_s = float("inf")
    for _ in range(5):
        begin_s = time.process_time()
        for _ in range(count // 5):
            work()
        best_s = min(best_s, time.process_time() - begin_s)
    return round(best_s / (count // 5) * 1e6, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="checkout of an earlier state to compare with")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=20, help="requests per round and cluster")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--parts", action="store_true", help="measure only the parts by themselves")
    arguments = parser.parse_args()
    measurements = {"parts_us": parts()}
    if not arguments.parts:
        measurements |= asyncio.run(compare(arguments))
    json.dump(measurements, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
