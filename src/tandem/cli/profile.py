"""`tandem profile`: what a process does, recorded by itself and written to files here.

Owns the finding of the process and the files; recording is the process's, which must have been started with
admin_enabled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.cli.membership import ask_all
from tandem.client import admin_calls
from tandem.errors import ConfigError, StartError
from tandem.tls.paths import Tls

FORMS = {"speedscope": pb.PROFILE_FORMAT_SPEEDSCOPE, "html": pb.PROFILE_FORMAT_HTML}


def profile_request(duration_s: float, form: str | None, *, with_stack: bool) -> pb.CaptureProfileRequest:
    """What is asked of the process.

    Raises:
        ConfigError: there is no such form.
    """
    if form is not None and form not in FORMS:
        raise ConfigError("form", f"must be {' or '.join(FORMS)}, not {form}")
    return pb.CaptureProfileRequest(
        duration_ms=round(duration_s * 1_000),
        format=None if form is None else FORMS[form],
        with_stack=with_stack,
    )


async def address_of(process: str, registries: Sequence[str], tls: Tls | None) -> str:
    """Address of a worker or frontend by its name; what has a colon is an address already.

    Raises:
        StartError: nobody has that name.
        TandemError: no registry answers.
    """
    fleet = await ask_all(registries, tls)
    by_name = {entry.worker.worker_id: entry.worker.address for entry in fleet.workers}
    by_name |= {entry.frontend.frontend_id: entry.frontend.address for entry in fleet.frontends}
    if process not in by_name:
        raise StartError(f"nobody is called {process} (known: {', '.join(sorted(by_name)) or 'none'})")
    return by_name[process]


async def profile(
    process: str, address: str, request: pb.CaptureProfileRequest, directory: Path, tls: Tls | None = None
) -> int:
    """Record, and write what comes back. Returns the exit status.

    Raises:
        ConfigError: the directory cannot be written to.
        TandemError: the process gives no profile.
    """
    async for name, data in admin_calls.capture_profile(address, request, tls=tls):
        # The name comes from elsewhere, and must not lead out of the directory.
        file = directory / f"{process.replace(':', '-')}-{Path(name).name}"
        try:
            await asyncio.to_thread(_write, file, data)
        except OSError as problem:
            raise ConfigError("out", f"{file} cannot be written: {problem.strerror}") from None
        print(f"{file} ({len(data):,} bytes)", flush=True)
    return 0


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
