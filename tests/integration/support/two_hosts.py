"""Two hosts on one machine: network namespaces with a link between them, for tests that are root.

Each host has its own loopback, a default route that leads nowhere, and an address on the link, which is its second
network. The link is a pair of veth devices, or, with a delay, two tun devices and a thread that forwards each packet
late: the kernels of small machines have no netem.

    with two_hosts(mtu=1280, delay_s=0.02) as (near, far):
        process = HostProcess(far, "decode", "decode", flags, logs)
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tandem.local_cluster.child_process import ClusterProcess

TUN = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES_MAX = 65_536
BRIDGE_ADDRESS = "172.30.0.1"
"""Of a bridge that both hosts have, as each Docker host has 172.17.0.1."""


@dataclass(frozen=True)
class Host:
    """One namespace."""

    namespace: str
    ipv4: str
    """Its address on the link."""
    ipv6: str

    def command(self, *words: str) -> list[str]:
        """A command as it is run there; `ip` replaces itself by it."""
        return ["ip", "netns", "exec", self.namespace, *words]


class HostProcess(ClusterProcess):
    """A service process on one of the hosts."""

    def __init__(self, host: Host, name: str, role: str, flags: dict[str, str], logs: Path) -> None:
        super().__init__(name, role, flags, logs)
        self._host = host

    def _command(self) -> list[str]:
        return self._host.command(*super()._command())


@cache
def why_not(*, delay: bool = False) -> str | None:
    """Why this machine can have no two hosts; None: it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip of iproute2 is not installed"
    if delay and not TUN.exists():
        return f"there is no {TUN}, which a link with a delay needs"
    try:
        with two_hosts(delay_s=0.001 if delay else 0.0):
            return None
    except (subprocess.CalledProcessError, OSError) as problem:
        stderr = getattr(problem, "stderr", None)
        return f"this machine has no network namespaces: {(stderr or str(problem)).strip()}"


@contextlib.contextmanager
def two_hosts(*, mtu: int = 1500, delay_s: float = 0.0) -> Iterator[tuple[Host, Host]]:
    """Both hosts; each packet between them takes `delay_s`."""
    hosts = tuple(Host(f"tandem{os.getpid()}-{number}", f"198.18.77.{number}", f"fd77::{number}") for number in (1, 2))
    with contextlib.ExitStack() as undo:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            undo.callback(_ip, "netns", "delete", host.namespace)
            _in(host, "link", "set", "lo", "up")
            _in(host, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
            for device in ("other0", "other1"):
                _in(host, "link", "set", device, "up")
            _in(host, "address", "add", "203.0.113.9/24", "dev", "other0")
            _in(host, "route", "add", "default", "via", "203.0.113.1", "dev", "other0")
            _in(host, "link", "add", "bridge0", "type", "bridge")
            _in(host, "address", "add", f"{BRIDGE_ADDRESS}/16", "dev", "bridge0")
            _in(host, "link", "set", "bridge0", "up")
        if delay_s:
            undo.enter_context(_slow_link(hosts, delay_s))
        else:
            _ip("link", "add", "link0", "netns", hosts[0].namespace, "type", "veth", "peer", "name", "link0",
                "netns", hosts[1].namespace)  # fmt: skip
        for host in hosts:
            _in(host, "link", "set", "link0", "up", "mtu", str(mtu))
            _in(host, "address", "add", f"{host.ipv4}/24", "dev", "link0")
            _in(host, "address", "add", f"{host.ipv6}/64", "dev", "link0", "nodad")
        yield hosts[0], hosts[1]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _in(host: Host, *words: str) -> None:
    _ip("-netns", host.namespace, *words)


@contextlib.contextmanager
def _slow_link(hosts: tuple[Host, ...], delay_s: float) -> Iterator[None]:
    ends = []
    try:
        for number, host in enumerate(hosts):
            end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            ends.append(end)
            name = f"tt{os.getpid()}-{number}"
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
            _ip("link", "set", name, "netns", host.namespace, "name", "link0")
        stop_read, stop_write = os.pipe()
        forwarding = threading.Thread(target=_forward, args=(ends, delay_s, stop_read), name="Thread-slow-link")
        forwarding.start()
        try:
            yield
        finally:
            os.close(stop_write)
            forwarding.join()
            os.close(stop_read)
    finally:
        for end in ends:
            os.close(end)


def _forward(ends: list[int], delay_s: float, stop: int) -> None:
    """Forward every packet to the other end after the delay, until `stop` is closed."""
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([*ends, stop], [], [], timeout_s)
        if stop in ready:
            return
        for number, end in enumerate(ends):
            if end in ready:
                count += 1
                packet = os.read(end, PACKET_BYTES_MAX)
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, ends[1 - number], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            # A full queue of the device drops it, as a network does.
            with contextlib.suppress(OSError):
                os.write(end, packet)
