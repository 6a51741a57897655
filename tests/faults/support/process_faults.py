"""Faults of processes, each with the proof that it is there: what the kernel says of the process and of its port.

Owns signals and proofs. Ends only processes it was given. Which process serves what is the test's business.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tandem.local_cluster.child_process import ClusterProcess
from tandem.testing.eventually import assert_eventually
from tests.faults.support.history import now_s

PROOF_WITHIN_S = 5.0
PORTS = 12_000, 32_000


def state_of(pid: int) -> str | None:
    """The letter the kernel gives a process's state ("T" is stopped, "Z" dead and unburied); None: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before it stands in brackets and may hold anything.
    return text.rpartition(")")[2].split()[0]


async def kill(process: ClusterProcess) -> float:
    """End a process of a cluster with SIGKILL, and prove that it is gone. Returns when it was killed."""
    pid, address = process.pid, process.address
    # Where others reach it there may be a proxy of the test's, which stays.
    own_address = f"{process.flags.get('host', '127.0.0.1')}:{address.rpartition(':')[2]}"
    killed_s = now_s()
    process.signal(signal.SIGKILL)
    await process.wait_ended()
    assert process.exit_status == -signal.SIGKILL, f"{process.name} ended with {process.exit_status} by itself"
    await prove_gone(pid)
    if address:
        await prove_refused(own_address)
    return killed_s


async def prove_gone(pid: int) -> None:
    """Return when no such process runs."""
    gone = (None, "Z", "X")
    await assert_eventually(
        lambda: state_of(pid), gone.__contains__, within_s=PROOF_WITHIN_S, what=f"end of process {pid}"
    )


@asynccontextmanager
async def frozen(pid: int) -> AsyncIterator[float]:
    """A process that is there and does nothing, as long as the block; yields since when."""
    frozen_s = now_s()
    os.kill(pid, signal.SIGSTOP)
    try:
        await assert_eventually(
            lambda: state_of(pid), "T".__eq__, within_s=PROOF_WITHIN_S, what=f"standstill of process {pid}"
        )
        yield frozen_s
        assert state_of(pid) == "T", f"process {pid} did not stand still to the end"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def prove_refused(address: str) -> None:
    """Return when a connection to host:port is refused."""
    await assert_eventually(
        lambda: knock(address), "refused".__eq__, within_s=PROOF_WITHIN_S, what=f"refusal of connections to {address}"
    )


def knock(address: str, timeout_s: float = 0.5) -> str:
    """What a new connection to host:port meets: "open", "refused", "reset" or "silence"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout_s):
            return "open"
    except ConnectionRefusedError:
        return "refused"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "silence"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now.

    Drawn from below those that the kernel gives to any process that asks for one: a connection of another process may
    hold such a port by the time it is listened on.
    """
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
