"""What a service process asks of its system."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from tandem.service.process import WANTED
from tandem.testing.eventually import assert_eventually

SOFT = 256


def with_few_files() -> None:
    """In the child, before it becomes the service."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


async def test_a_service_may_have_more_connections_than_systems_give_unasked(tmp_path: Path) -> None:
    announced = tmp_path / "registry.json"
    command = [sys.executable, "-m", "tandem_registry", "--announce-file", str(announced)]
    process = await asyncio.create_subprocess_exec(*command, preexec_fn=with_few_files, stderr=subprocess.DEVNULL)
    try:
        await assert_eventually(announced.exists, within_s=20)
        soft, hard = psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert soft == (WANTED if hard < 0 else min(WANTED, hard))
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
