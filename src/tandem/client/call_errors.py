"""Errors of calls to an address that a person typed: what was called, what happened, what to do.

Owns the wording where gRPC's own text explains nothing: no connection, TLS that does not fit, no response. An error
that the peer itself sent stays as it is.
"""

from __future__ import annotations

import grpc

from tandem.errors import DeadlinePassed, ServiceError, TandemError
from tandem.rpc.status import from_rpc_error
from tandem.tls.paths import Tls

NO_CONNECTION = (
    "failed to connect",
    "errors resolving",
    "DNS resolution failed",
    "Socket closed",
    "onnection reset",
    "onnection refused",
    "roken pipe",
    "http1.x",
)
"""Words of gRPC's texts about a connection that was never made, or broke."""
DEADLINE_TEXT = "Deadline Exceeded"
"""gRPC's own text; a peer of Tandem's says more."""


def call_error(
    failure: grpc.aio.AioRpcError, address: str, tls: Tls | None, *, has_responded: bool = False
) -> TandemError:
    """The error of a failed call to `address`; `has_responded`: after the first message of its stream."""
    error, details = from_rpc_error(failure), failure.details() or ""
    if type(error) is ServiceError and any(words in details for words in NO_CONNECTION):
        if has_responded:
            return ServiceError(f"{address} closed the connection within its response: it may have died; see its log")
        return ServiceError(f"{address} {_no_connection(details, tls)}")
    if type(error) is DeadlinePassed and details == DEADLINE_TEXT and not has_responded:
        return DeadlinePassed(f"{address} did not respond in time: it hangs or is overloaded; see its log")
    return error


def _no_connection(details: str, tls: Tls | None) -> str:
    if "refused" in details:
        return "cannot be reached: nothing listens there; start the process, or correct the address"
    if "resolving" in details or "resolution" in details:
        return "cannot be reached: DNS does not know the host; correct the address (host:port)"
    if tls is None and ("Socket closed" in details or "reset" in details):
        return "closed the connection: if it serves TLS, pass the directory of its certificates (--tls DIR)"
    if tls is None and "http1.x" in details:
        return "serves HTTP, not gRPC: pass the address of a gRPC port"
    if "WRONG_VERSION_NUMBER" in details:
        return "serves no TLS, and was called with it: omit --tls, or correct the address"
    if "CERTIFICATE_VERIFY_FAILED" in details or "ostname" in details or "Peer name" in details:
        ca = "" if tls is None else f" ({tls.ca})"
        return f"presents a certificate that was not accepted: it must name this host and be signed by the CA{ca}"
    if "andshake" in details or (tls is not None and ("Socket closed" in details or "reset" in details)):
        return f"ended the TLS handshake: it may not accept this client certificate{_of(tls)}, or serves no TLS"
    if "timed out" in details:
        return "accepted the connection and sent nothing: it hangs, or serves TLS or another protocol"
    return f"cannot be reached: {details.rpartition('last error: ')[2]}"


def _of(tls: Tls | None) -> str:
    return "" if tls is None else f" ({tls.cert})"
