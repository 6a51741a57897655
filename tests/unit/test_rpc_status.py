"""Whatever a peer sends as an error, what is read of it is an error of Tandem's."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest, LegFailed, Overloaded, ServiceError, TandemError
from tandem.rpc.status import (
    DOMAIN,
    ERROR_BY_REASON,
    RETRY_DELAY_S_MAX,
    UNREADABLE,
    from_rpc_error,
    from_status,
    to_status,
)

KINDS = ("google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.Other")
DETAILS = st.builds(
    lambda kind, value: any_pb2.Any(type_url=f"type.googleapis.com/{kind}", value=value),
    st.sampled_from(KINDS),
    st.binary(max_size=12),
)


def packed(reason: str, retry_s: int = 0, **metadata: str) -> status_pb2.Status:
    details = [any_pb2.Any(), any_pb2.Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason=reason, metadata=metadata))
    details[1].Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=retry_s)))
    return status_pb2.Status(code=14, message="m", details=details)


def failure(code: grpc.StatusCode, details_bin: bytes) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", details_bin))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details="a proxy's sentence")


@given(st.lists(DETAILS, max_size=3), st.text(max_size=5))
def test_no_status_is_unreadable(details: list[any_pb2.Any], message: str) -> None:
    assert isinstance(from_status(status_pb2.Status(code=14, message=message, details=details)), TandemError)


@pytest.mark.parametrize("reason", sorted(ERROR_BY_REASON))
def test_metadata_may_have_any_name(reason: str) -> None:
    names = {"message": "a", "self": "b", "problem": "c", "field": "d", "retry_delay_s": "e", "phase": "f"}
    status = packed(reason)
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=reason, metadata=names)
    status.details[0].Pack(info)
    problem = from_status(status)
    assert problem.metadata == names
    assert from_status(to_status(problem)).metadata == names
    assert LegFailed("on the way", **problem.metadata).metadata == names
    assert InvalidRequest("own", "is wrong", **names).metadata == {**names, "field": "own"}
    if isinstance(problem, InvalidRequest):
        assert problem.field == "d"
        assert problem.renamed("other").metadata == {**names, "field": "other"}


@pytest.mark.parametrize(("sent_s", "read_s"), [(-5, 0.0), (7, 7.0), (2**60, RETRY_DELAY_S_MAX)])
def test_a_retry_delay_is_clamped_to_what_can_be_sent_again(sent_s: int, read_s: float) -> None:
    problem = from_status(packed("OVERLOADED", retry_s=sent_s))
    assert isinstance(problem, Overloaded)
    assert problem.retry_delay_s == read_s
    to_status(problem)


@pytest.mark.parametrize(
    "details_bin",
    [status_pb2.Status(code=13, message="a proxy's sentence").SerializeToString(), b"\xff\xff"],
    ids=["another code", "no status"],
)
def test_details_that_do_not_fit_their_call_leave_its_code(details_bin: bytes) -> None:
    problem = from_rpc_error(failure(grpc.StatusCode.UNAVAILABLE, details_bin), worker="decode-0")
    assert type(problem) is ServiceError
    assert str(problem) == f"a proxy's sentence ({UNREADABLE})"
    assert problem.metadata == {"worker": "decode-0"}
