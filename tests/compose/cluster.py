"""The composed cluster as the tests see it: health, logs, processes of containers, the edge's address.

Owns waiting and asking. What is done to the cluster, and what must follow, is `scenario.py`'s.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tests.compose.docker import Docker

OURS = (
    "registry-1",
    "registry-2",
    "frontend-1",
    "frontend-2",
    "prefill-1",
    "prefill-2",
    "decode-1",
    "decode-2",
    "envoy",
)
ALL = ("consul", *OURS)
UP_TIMEOUT_S = 420.0

T = TypeVar("T")


class Cluster:
    """One `docker compose up`."""

    def __init__(self, docker: Docker, settings: dict[str, str]) -> None:
        """`settings`: variables of docker-compose.yml."""
        self.docker = docker
        self.settings = settings

    @property
    def address(self) -> str:
        """Where the edge is published."""
        return f"127.0.0.1:{self.settings['HTTP_PORT']}"

    def compose(self, *arguments: str, check: bool = True, **settings: str) -> str:
        """`docker compose ...`, with some settings changed."""
        return self.docker.compose(
            *arguments, check=check, timeout_s=UP_TIMEOUT_S, settings={**self.settings, **settings}
        )

    def up(self, *services: str, **settings: str) -> float:
        """Bring services up and wait for their health; how long that took."""
        begin_s = time.monotonic()
        self.compose("up", "--detach", "--wait", "--no-build", *services, check=True, **settings)
        return time.monotonic() - begin_s

    def state(self, service: str) -> dict[str, Any]:
        """The container's, with its health and count of restarts."""
        found = self.docker.inspect(self.container(service))
        return {**found["State"], "RestartCount": found["RestartCount"]}

    def container(self, service: str) -> str:
        """Its id, whether it runs or not."""
        ids = self.compose("ps", "--all", "--quiet", service).split()
        assert len(ids) == 1, f"{service} has {len(ids)} containers"
        return ids[0]

    def health(self, service: str) -> str:
        """healthy, unhealthy or starting."""
        return str(self.state(service)["Health"]["Status"])

    def logs(self, service: str) -> str:
        """Of its present container."""
        return self.docker.run("logs", self.container(service))

    def healthy_after_s(self, since_s: float) -> dict[str, float]:
        """For each service, from the start of its container to its first passed check, of those since that moment."""
        output = self.docker.run(
            *("events", "--since", f"{since_s:.0f}", "--until", f"{time.time() + 1:.0f}", "--filter", "type=container"),
            *("--format", '{{.TimeNano}} {{index .Actor.Attributes "com.docker.compose.service"}} {{.Action}}'),
        )
        begun: dict[str, int] = {}
        found: dict[str, float] = {}
        for line in output.splitlines():
            nanoseconds, service, action = line.split(" ", 2)
            if action == "start":
                begun[service] = int(nanoseconds)
            elif action == "health_status: healthy" and service in begun:
                found.setdefault(service, (int(nanoseconds) - begun[service]) / 1e9)
        return found

    def wait_health(self, service: str, wanted: str, within_s: float = 180.0) -> float:
        """Wait until its health is that; how long it took."""
        return until(lambda: self.health(service), lambda seen: seen == wanted, within_s, f"{service} is {wanted}")

    def wait_log(self, service: str, sentence: str, within_s: float = 120.0) -> None:
        """Wait until its log has that sentence."""
        until(lambda: self.logs(service), lambda seen: sentence in seen, within_s, f"{service} says {sentence!r}")

    def kill_process(self, service: str) -> None:
        """SIGKILL to the service's own process, from outside: a crash, and not an order to Docker."""
        top = self.state(service)["Pid"]
        children = [int(pid) for pid in open(f"/proc/{top}/task/{top}/children").read().split()]  # noqa: SIM115
        os.kill(children[0], signal.SIGKILL)


def until(look: Callable[[], T], accept: Callable[[T], object], within_s: float, what: str) -> float:
    """Look until what is seen is accepted; how long it took."""
    begin_s = time.monotonic()
    while not accept(seen := look()):
        if time.monotonic() - begin_s > within_s:
            raise AssertionError(f"not within {within_s:g} s: {what}; last seen: {str(seen)[-1500:]}")
        time.sleep(0.5)
    return time.monotonic() - begin_s


def free_port() -> int:
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
