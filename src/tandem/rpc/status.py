"""Errors on the wire: `TandemError` to `google.rpc.Status` with ErrorInfo (and RetryInfo), and back.

The only place that knows both sides. A status that carries no ErrorInfo of ours becomes the error that fits its code.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem import errors
from tandem.errors import TandemError

DOMAIN = "tandem"
MESSAGE_BYTES_MAX = 1024
METADATA_BYTES_MAX = 256
"""A status travels in headers: beyond 8 KiB of them gRPC may end the call for that alone, and beyond 60 KiB Envoy
breaks the connection with all other streams on it. A message may quote what a client sent, however long."""


def _all_errors(root: type[TandemError]) -> list[type[TandemError]]:
    return [root, *(error for child in root.__subclasses__() for error in _all_errors(child))]


# A parent comes before its children: where they share a reason, the more precise error wins.
ERROR_BY_REASON: dict[str, type[TandemError]] = {error.reason: error for error in _all_errors(TandemError)}


def to_status(error: TandemError) -> status_pb2.Status:
    """The status a client sees; texts that are too long for headers are cut."""
    message = _cut(error.message, MESSAGE_BYTES_MAX)
    metadata = {key: _cut(value, METADATA_BYTES_MAX) for key, value in error.metadata.items()}
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))]
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message, details=details)


async def abort(context: grpc.aio.ServicerContext, error: TandemError) -> None:  # type: ignore[type-arg]
    """End a call with an error. Raises grpc's own AbortError, as `context.abort` does."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def from_rpc_error(failure: grpc.aio.AioRpcError, **metadata: str | int | None) -> TandemError:
    """The error a call failed with. `metadata` fills in what the peer did not say (worker, leg, ...)."""
    error = _typed(failure) or _untyped(failure)
    for key, value in metadata.items():
        if value is not None:
            error.metadata.setdefault(key, str(value))
    return error


def _typed(failure: grpc.aio.AioRpcError) -> TandemError | None:
    status = rpc_status.from_call(failure)  # type: ignore[arg-type]
    if status is None:
        return None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_delay_s: float | None = None
    for detail in status.details:
        if detail.Unpack(retry):
            retry_delay_s = retry.retry_delay.ToNanoseconds() / 1e9
        detail.Unpack(info)
    if info.domain != DOMAIN:
        return None
    return _rebuild(info.reason, status.message, dict(info.metadata), retry_delay_s)


def _rebuild(reason: str, message: str, metadata: dict[str, str], retry_delay_s: float | None) -> TandemError:
    kind = ERROR_BY_REASON.get(reason, TandemError)
    error = kind.__new__(kind)
    TandemError.__init__(error, message, **metadata)
    if isinstance(error, errors.Overloaded):
        error._retry_delay_s = retry_delay_s or 1.0
    if isinstance(error, errors.InvalidRequest):
        error.field = metadata.get("field", "request")
    return error


def _untyped(failure: grpc.aio.AioRpcError) -> TandemError:
    details = failure.details() or failure.code().name
    match failure.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlinePassed(details)
        case grpc.StatusCode.CANCELLED:
            return errors.RequestAborted(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(details)
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.NotSupported(details)
        case grpc.StatusCode.UNAVAILABLE:
            return errors.ServiceError(details)
        case _:
            return TandemError(f"{failure.code().name}: {details}")


def _cut(text: str, bytes_max: int) -> str:
    """The text, or as many whole characters of it as there is room for beside a mark."""
    encoded = text.encode()
    if len(encoded) <= bytes_max:
        return text
    mark = "…"
    return encoded[: bytes_max - len(mark.encode())].decode(errors="ignore") + mark


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
