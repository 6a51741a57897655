"""Whether an address can be listened on, asked before gRPC is: gRPC writes a line of its own about it first."""

from __future__ import annotations

import errno
import socket

from tandem.errors import StartError


def listen_problem(host: str, port: int) -> str | None:
    """Why nobody can listen there; None when one can."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as problem:
        return "the port is in use" if problem.errno == errno.EADDRINUSE else problem.strerror or str(problem)
    return None


def check_listenable(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        StartError: says why.
    """
    problem = listen_problem(host, port)
    if problem is not None:
        raise StartError(f"cannot listen on {host}:{port}: {problem}")
