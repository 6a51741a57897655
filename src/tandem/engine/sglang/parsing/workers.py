"""Forks the parser workers: processes that have SGLang imported already, so that one is replaced in milliseconds.

Owns the processes' start and their ties: a worker ends with its connection, and with the host. Knows nothing of
streams.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Protocol

from tandem.engine.sglang.parsing.bounds import limit_memory
from tandem.service.parent_death import follow


class Serves(Protocol):
    """The part of `host.Host` that a worker needs."""

    def serve(self, lines: Iterable[str], write: Callable[[str], object]) -> None:
        """Respond to each line until the input ends."""
        ...


def serve_workers(control: socket.socket, host: Serves) -> None:
    """Fork a worker for each connection that arrives over `control`; returns when `control` is closed."""
    # The kernel reaps the workers; their connections show their ends.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # What is loaded now stays shared: a collection in a worker would copy its pages.
    gc.collect()
    gc.freeze()
    own_pid = os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            _work(connection, host, own_pid)
        connection.close()


def _work(connection: socket.socket, host: Serves, host_pid: int) -> None:
    """Serve the connection until it is closed, and exit."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if follow(host_pid, signal.SIGKILL):
            limit_memory()
            with connection.makefile("r", encoding="utf-8") as lines, connection.makefile("w", encoding="utf-8") as out:

                def write(line: str) -> None:
                    out.write(line)
                    out.flush()

                write(json.dumps({"pid": os.getpid()}) + "\n")
                host.serve(lines, write)
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        # The frontend has ended.
        status = 0
    finally:
        sys.stderr.flush()
        # Not sys.exit: the fork has the host's stack below it, and its exit handlers.
        os._exit(status)
