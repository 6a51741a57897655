"""A Consul agent of this machine in development mode, for tests of what its DNS says."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tandem.testing.eventually import assert_eventually


@dataclass
class ConsulAgent:
    """Its ports, once it leads."""

    http_port: int
    dns_port: int

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}/v1/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=2) as response:
            return json.loads(response.read() or b"null")

    def register(self, service_id: str, port: int, tag: str) -> None:
        service = {"ID": service_id, "Name": "tandem", "Tags": [tag], "Address": "127.0.0.1", "Port": port}
        self.ask("PUT", "agent/service/register", service)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@asynccontextmanager
async def consul_agent(directory: Path) -> AsyncIterator[ConsulAgent]:
    program = shutil.which("consul")
    if program is None:
        assert not os.environ.get("CI"), "CI runs with a consul on PATH"
        pytest.skip("no consul on PATH")
    names = ("http", "dns", "serf_lan", "serf_wan", "server")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    config = directory / "consul.json"
    config.write_text(json.dumps({"ports": {**ports, "grpc": -1}}))
    command = [program, "agent", "-dev", "-bind=127.0.0.1", f"-config-file={config}"]
    with (directory / "consul.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    agent = ConsulAgent(ports["http"], ports["dns"])
    try:
        await assert_eventually(lambda: asyncio.to_thread(_leads, agent), bool, within_s=20, what="a leader")
        yield agent
    finally:
        process.kill()
        await process.wait()


def _leads(agent: ConsulAgent) -> bool:
    try:
        return bool(agent.ask("GET", "status/leader"))
    except (urllib.error.URLError, ConnectionError):
        return False
