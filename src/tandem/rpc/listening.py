"""Checks a listening address before gRPC binds it: gRPC would write a line of its own to stderr on failure."""

from __future__ import annotations

import errno
import socket

from tandem.domain.network_address import bare_host, join_address
from tandem.errors import StartError


def listen_problem(host: str, port: int) -> str | None:
    """Why the address cannot be listened on; None when it can."""
    try:
        family = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((bare_host(host), port))
    except OSError as problem:
        return "the port is in use" if problem.errno == errno.EADDRINUSE else problem.strerror or str(problem)
    return None


def check_listenable(host: str, port: int) -> None:
    """Check that the address can be listened on.

    Raises:
        StartError: it cannot, with the reason.
    """
    problem = listen_problem(host, port)
    if problem is not None:
        raise StartError(f"cannot listen on {join_address(host, port)}: {problem}")
