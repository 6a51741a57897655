"""`tandem profile`: have a process record a profile and write it to local files.

Owns the lookup of the process and the files; the process itself records, and must run with admin_enabled.
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

SAME_NAMES = {"frontend-0": "frontend", "frontend": "frontend-0"}
FORMS = {"speedscope": pb.PROFILE_FORMAT_SPEEDSCOPE, "html": pb.PROFILE_FORMAT_HTML}


def profile_request(duration_s: float, form: str | None, *, with_stack: bool) -> pb.CaptureProfileRequest:
    """Build the request.

    Raises:
        ConfigError: `form` is unknown.
    """
    if form is not None and form not in FORMS:
        raise ConfigError("form", f"must be {' or '.join(FORMS)}, not {form}")
    return pb.CaptureProfileRequest(
        duration_ms=round(duration_s * 1_000),
        format=None if form is None else FORMS[form],
        with_stack=with_stack,
    )


async def address_of(process: str, registries: Sequence[str], tls: Tls | None) -> str:
    """Look up the address of a worker or frontend by its id.

    Raises:
        StartError: no process with that id is registered.
        TandemError: no registry can be reached.
    """
    fleet = await ask_all(registries, tls)
    by_name = {entry.worker.worker_id: entry.worker.address for entry in fleet.workers}
    by_name |= {entry.frontend.frontend_id: entry.frontend.address for entry in fleet.frontends}
    # `tandem up` names a frontend without a number while it is the only one.
    process = SAME_NAMES.get(process, process) if process not in by_name else process
    if process not in by_name:
        raise StartError(
            f"no worker or frontend {process} is registered (registered: {', '.join(sorted(by_name)) or 'none'})"
        )
    return by_name[process]


async def profile(
    process: str, address: str, request: pb.CaptureProfileRequest, directory: Path, tls: Tls | None = None
) -> int:
    """Record a profile and write its files. Returns the exit status.

    Raises:
        ConfigError: the directory cannot be written to.
        TandemError: the process could not record a profile.
    """
    async for name, data in admin_calls.capture_profile(address, request, tls=tls):
        # The name comes from the remote process: keep its last part, so that it cannot escape the directory.
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
