"""`tandem health`: does a process serve?"""

from __future__ import annotations

from tandem.client import calls
from tandem.errors import ConfigError, InvalidRequest, NotSupported, StartError
from tandem.tls.paths import Tls


async def health(address: str, service: str, tls: Tls | None = None) -> int:
    """Print what a process says of itself, or of one of its services. Returns the exit status: 0 when it serves.

    Raises:
        ConfigError: it carries no such service.
        StartError: it answers no health checks.
        TandemError: it does not answer.
    """
    try:
        serving = await calls.is_serving(address, service, tls=tls)
    except InvalidRequest as problem:
        raise ConfigError("service", problem.message.removeprefix("service: ")) from None
    except NotSupported:
        raise StartError(f"{address} is not a process of Tandem: it answers no health checks") from None
    print("serving" if serving else "not serving")
    return 0 if serving else 1
