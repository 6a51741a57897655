"""Errors on the wire: `TandemError` to `google.rpc.Status` with ErrorInfo (and RetryInfo), and back.

The only place that knows both forms, and how much of an error fits into a response's metadata. A status without
Tandem's ErrorInfo becomes the error that matches its code. Reading a status never raises: a peer may send anything, and
a waiting caller must get an error in any case. The message says what could not be read.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import accumulate

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem import errors
from tandem.errors import TandemError

log = logging.getLogger(__name__)

DOMAIN = "tandem"

# A peer accepts 8 KiB of metadata by default, and beyond it loses an error's type too. The message is sent twice, once
# within the details in base64: with these limits a whole status stays under 4 KiB.
MESSAGE_BYTES_MAX = 1_000
"""Of a message as HTTP/2 encodes it: each byte that is not printable ASCII takes three."""
VALUE_BYTES_MAX = 256
METADATA_BYTES_MAX = 1_000
CUT = "..."
RETRY_DELAY_S_MAX = 3_600.0
"""Limit of a peer's retry delay: a longer one is a defect, and one of 300 years could not be encoded again."""
OTHER_RELEASE = "the peer may run another release"
UNREADABLE = f"the reason of this error is malformed: {OTHER_RELEASE}"


def _all_errors(root: type[TandemError]) -> list[type[TandemError]]:
    return [root, *(error for child in root.__subclasses__() for error in _all_errors(child))]


# A parent class comes before its subclasses: where they share a reason, the subclass wins.
ERROR_BY_REASON: dict[str, type[TandemError]] = {error.reason: error for error in _all_errors(TandemError)}


def to_status(error: TandemError) -> status_pb2.Status:
    """The status a client sees."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_fitting(error.metadata))
    details = [_pack(info)]
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=_message(error.message), details=details)


def to_grpc_status(error: TandemError) -> grpc.Status:
    """The same as gRPC carries it: code, message, and the details in trailing metadata."""
    status: grpc.Status = rpc_status.to_status(to_status(error))
    return status


async def abort(context: grpc.aio.ServicerContext, error: TandemError) -> None:  # type: ignore[type-arg]
    """End a call with an error. Raises grpc's own AbortError, as `context.abort` does.

    Raises:
        asyncio.CancelledError: the call has ended already. gRPC's own exception would be logged with a traceback.
    """
    status = to_grpc_status(error)
    try:
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def from_rpc_error(failure: grpc.aio.AioRpcError, **metadata: str | int | None) -> TandemError:
    """The error of a failed call. `metadata` adds what the peer did not set (worker, leg, ...)."""
    try:
        error = _typed(failure) or _untyped(failure)
    except Exception as problem:  # details of a peer must not hide its code or message
        log.warning(
            "an error with code %s has malformed details: its reason is lost and its code alone counts; %s (%r)",
            failure.code(), OTHER_RELEASE, problem,
        )  # fmt: skip
        error = _untyped(failure, f" ({UNREADABLE})")
    for key, value in metadata.items():
        if value is not None:
            error.metadata.setdefault(key, str(value))
    return error


def from_status(status: status_pb2.Status) -> TandemError:
    """The error of a status inside a message."""
    sentence = status.message or "failed without a message"
    try:
        return _from_details(status) or TandemError(sentence)
    except Exception as problem:  # details of a peer must not hide its code or message
        log.warning(
            "a leg's error has malformed details: its reason is lost and the leg counts as failed; %s (%r)",
            OTHER_RELEASE, problem,
        )  # fmt: skip
        return TandemError(f"{sentence} ({UNREADABLE})")


def _typed(failure: grpc.aio.AioRpcError) -> TandemError | None:
    status = rpc_status.from_call(failure)  # type: ignore[arg-type]
    return None if status is None else _from_details(status)


def _from_details(status: status_pb2.Status) -> TandemError | None:
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
    TandemError.__init__(error, message)
    error.metadata = metadata
    if isinstance(error, errors.Overloaded):
        error._retry_delay_s = min(max(0.0, retry_delay_s or 1.0), RETRY_DELAY_S_MAX)
    if isinstance(error, errors.InvalidRequest):
        error.field = metadata.get("field", "request")
    return error


def _untyped(failure: grpc.aio.AioRpcError, unread: str = "") -> TandemError:
    details = (failure.details() or failure.code().name) + unread
    match failure.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlinePassed(details)
        case grpc.StatusCode.CANCELLED:
            return errors.RequestAborted(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            # gRPC's own message about a request beyond its size limit: a retry would fail too.
            return errors.InvalidRequest("request", details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(details)
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.NotSupported(details)
        case grpc.StatusCode.UNAVAILABLE:
            return errors.ServiceError(details)
        case _:
            return TandemError(f"{failure.code().name}: {details}")


def _message(text: str) -> str:
    """A message cut to MESSAGE_BYTES_MAX: it may repeat any amount of a client's input."""
    head = _encodable(text[: MESSAGE_BYTES_MAX + 1])
    ends = list(accumulate(map(_carried_bytes, head)))
    if not ends or ends[-1] <= MESSAGE_BYTES_MAX:
        return head
    return head[: sum(end <= MESSAGE_BYTES_MAX - len(CUT) for end in ends)] + CUT


def _carried_bytes(character: str) -> int:
    return 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())


def _fitting(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of an error, each value cut to its limit, and dropped beyond the total limit."""
    fitting: dict[str, str] = {}
    left_bytes = METADATA_BYTES_MAX
    for key, value in metadata.items():
        own = _encodable(value[: VALUE_BYTES_MAX + 1]).encode()
        if len(own) > VALUE_BYTES_MAX:
            own = own[: VALUE_BYTES_MAX - len(CUT)] + CUT.encode()
        left_bytes -= len(key.encode()) + len(own)
        if left_bytes < 0:
            break
        # A character that was cut in two is dropped.
        fitting[key] = own.decode(errors="ignore")
    return fitting


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can express and protobuf cannot."""
    return text.encode(errors="replace").decode()


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
