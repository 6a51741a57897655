"""Load over gRPC with Locust: each user streams one generation after another from a frontend.

locust -f benchmarks/external/locustfile.py --headless --users 8 --run-time 30s --host 127.0.0.1:50051

Needs locust and Tandem in one environment. Locust's own figures are the whole streams; the first tokens are a second
row. TANDEM_PROMPT and TANDEM_MAX_TOKENS change the request.
"""

from __future__ import annotations

import os
import time

import grpc
import grpc.experimental.gevent
from locust import User, task
from locust.exception import LocustError

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub

grpc.experimental.gevent.init_gevent()

REQUEST = pb.GenerateRequest(
    prompt=os.environ.get("TANDEM_PROMPT", "Once upon a time"),
    stopping={"max_tokens": int(os.environ.get("TANDEM_MAX_TOKENS", "32")), "ignore_eos": True},
)


class Client(User):
    """One client with a channel of its own."""

    def on_start(self) -> None:
        """Open the channel."""
        if self.host is None:
            raise LocustError("give the frontend's address: --host HOST:PORT")
        self.channel = grpc.insecure_channel(self.host)
        self.stub = InferenceServiceStub(self.channel)

    def on_stop(self) -> None:
        """Close the channel, which aborts a stream."""
        self.channel.close()

    @task
    def generate(self) -> None:
        """Stream one generation to its end."""
        begin_s = time.perf_counter()
        first_s: float | None = None
        failure: Exception | None = None
        length = 0
        try:
            for event in self.stub.Generate(REQUEST, timeout=60):
                if event.HasField("chunk"):
                    first_s = first_s or time.perf_counter() - begin_s
                    length += len(event.chunk.token_ids)
        except grpc.RpcError as problem:
            failure = problem
        whole_s = time.perf_counter() - begin_s
        for name, duration_s in (("Generate, first token", first_s), ("Generate", whole_s)):
            if duration_s is not None:
                self.environment.events.request.fire(
                    request_type="grpc",
                    name=name,
                    response_time=duration_s * 1000,
                    response_length=length,
                    exception=failure,
                    context={},
                )
