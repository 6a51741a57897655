"""Client of leg contract 2: the step stream of a worker, starting and aborting legs.

Owns the calls only; the caller assigns messages to legs and decides what a failure means for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from tandem.api.decode.v2.decode_service_pb2 import StartLegsRequest as StartDecodeLegs
from tandem.api.decode.v2.decode_service_pb2_grpc import DecodeServiceStub
from tandem.api.prefill.v2.prefill_service_pb2 import StartLegsRequest as StartPrefillLegs
from tandem.api.prefill.v2.prefill_service_pb2_grpc import PrefillServiceStub
from tandem.api.types.v2 import leg_pb2
from tandem.api.worker.v2 import step_service_pb2 as pb
from tandem.api.worker.v2.step_service_pb2_grpc import StepServiceStub
from tandem.domain.worker import LEG_CONTRACT, Worker, WorkerRole
from tandem.errors import NotSupported, RequestAborted, ServiceError, StartError, TandemError
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_rpc_error

ABORT_TIMEOUT_S = 5.0
"""After a timeout the abort is sent again when the worker reports the leg the next time."""


class StepCall:
    """One step stream, open until it is cancelled or fails."""

    def __init__(self, channel: grpc.aio.Channel, worker: Worker, frontend_id: str) -> None:
        """Starts the call without waiting for a response."""
        request = pb.StreamStepsRequest(leg_contract=LEG_CONTRACT, worker_epoch=worker.epoch, frontend_id=frontend_id)
        stub: Any = StepServiceStub(channel)
        self._worker = worker
        self._call = stub.StreamSteps(request)

    async def read(self) -> pb.StreamStepsResponse:
        """The next message.

        Raises:
            TandemError: the stream could not be opened, or has ended; every end is an error.
        """
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise _of_worker(self._worker, from_rpc_error(failure)) from None
        if message is grpc.aio.EOF:
            raise ServiceError(f"worker {self._worker.worker_id} closed its step stream")
        if message is None:
            # gRPC returns None for bytes that are no message of this type.
            raise ServiceError(
                f"worker {self._worker.worker_id} sent a step message that cannot be read: it may run another release"
            )
        return message  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """End the stream, which aborts all its legs. No effect after its end."""
        self._call.cancel()


class WorkerCalls:
    """Calls to workers, over channels cached by address."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    def connection(self, worker: Worker) -> object:
        """The channel to a worker, as an identity to compare: a renewed certificate opens a new one.

        Raises:
            ServiceError: the TLS files are unusable.
        """
        return self._channel(worker)

    def open_steps(self, worker: Worker, frontend_id: str) -> StepCall:
        """Open a step stream.

        Raises:
            ServiceError: as `connection`.
        """
        return StepCall(self._channel(worker), worker, frontend_id)

    async def start_legs(
        self, worker: Worker, stream_id: int, legs: Sequence[leg_pb2.LegStart]
    ) -> Sequence[leg_pb2.LegStartResult]:
        """Start legs on a stream; a result for each, in order.

        Raises:
            TandemError: the call failed; whether a leg has been started is not known.
        """
        channel = self._channel(worker)
        stub: Any
        if worker.role is WorkerRole.PREFILL:
            stub, request = PrefillServiceStub(channel), StartPrefillLegs(stream_id=stream_id, legs=legs)
        else:
            stub, request = DecodeServiceStub(channel), StartDecodeLegs(stream_id=stream_id, legs=legs)  # type: ignore[assignment]
        try:
            answer = await stub.StartLegs(request)
        except grpc.aio.AioRpcError as failure:
            raise _of_worker(worker, from_rpc_error(failure)) from None
        if answer is None:
            raise ServiceError(f"worker {worker.worker_id} sent a response to StartLegs that cannot be read")
        results: Sequence[leg_pb2.LegStartResult] = answer.results
        if len(results) != len(legs):
            raise ServiceError(f"worker {worker.worker_id} returned {len(results)} start results for {len(legs)} legs")
        return results

    async def abort_legs(self, worker: Worker, stream_id: int, legs: Iterable[int]) -> None:
        """Abort legs of a stream.

        Raises:
            TandemError: the call failed.
        """
        stub: Any = StepServiceStub(self._channel(worker))
        try:
            await stub.AbortLegs(pb.AbortLegsRequest(stream_id=stream_id, legs=legs), timeout=ABORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise _of_worker(worker, from_rpc_error(failure)) from None

    def _channel(self, worker: Worker) -> grpc.aio.Channel:
        try:
            return self._channels.get(worker.address)
        except StartError as problem:
            raise ServiceError(f"cannot connect to worker {worker.worker_id}: {problem}") from None


def _of_worker(worker: Worker, problem: TandemError) -> TandemError:
    """Turn a failed call into a failure of that worker, so that it is retried on another one."""
    if type(problem) is NotSupported and not problem.metadata:
        return ServiceError(
            f"worker {worker.worker_id} does not implement leg contract {LEG_CONTRACT} of this frontend"
        )
    if isinstance(problem, RequestAborted):
        return ServiceError(f"worker {worker.worker_id} ended the call: {problem.message}")
    return problem
