"""The other frontends of the registry serve this frontend's model too: checked once, at start.

An edge spreads requests over all frontends of its registry and does not read the model's name, so a registry holds one
model. Owns the check; the edge has one of its own for what this one cannot see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState
from tandem.errors import ConfigError
from tandem_frontend.config import FrontendConfig

log = logging.getLogger(__name__)

LIST_TIMEOUT_S = 5.0
"""Wait for the registry's list. After it the start continues: a frontend does not need a registry to serve."""
EXPIRY_WAIT_S = 10.0
"""Wait for the end of a conflicting entry: a frontend that was killed is listed until its lease expires."""


def conflicting(frontends: Iterable[Frontend], model: str, frontend_id: str, address: str) -> Frontend | None:
    """A serving frontend of another model. An entry with this id or address is of an earlier start of this one."""
    for other in frontends:
        is_own = frontend_id == other.frontend_id or address == other.address
        if not is_own and other.model != model and other.state is WorkerState.SERVING:
            return other
    return None


async def check_models(config: FrontendConfig, frontend_id: str, address: str) -> None:
    """Return when no serving frontend of another model is registered.

    Raises:
        ConfigError: there is one, and it did not leave within EXPIRY_WAIT_S; names both models.
    """
    watch = FrontendWatch(config.registry, tls=config.tls)
    await watch.start()
    try:
        async with asyncio.timeout(LIST_TIMEOUT_S):
            await _live(watch)
        await _wait_alone(watch, config, frontend_id, address)
    except TimeoutError:
        log.warning("could not check the models of other frontends: no registry lists them yet")
    finally:
        await watch.close()


async def _live(watch: FrontendWatch) -> None:
    while True:
        changed = watch.next_change
        if watch.state.is_live:
            return
        await changed.wait()


async def _wait_alone(watch: FrontendWatch, config: FrontendConfig, frontend_id: str, address: str) -> None:
    loop, other = asyncio.get_running_loop(), None
    end_s = loop.time() + EXPIRY_WAIT_S
    while True:
        changed = watch.next_change
        found = conflicting(watch.frontends(), config.served_name, frontend_id, address)
        if found is None:
            return
        if other is None:
            log.warning(
                "frontend %s serves model %r, this one %r: waiting %g s for it to leave the registry",
                found.frontend_id, found.model, config.served_name, EXPIRY_WAIT_S,
            )  # fmt: skip
        other = found
        try:
            async with asyncio.timeout(end_s - loop.time()):
                await changed.wait()
        except TimeoutError:
            raise ConfigError("model_name", _refusal(config, other)) from None


def _refusal(config: FrontendConfig, other: Frontend) -> str:
    return (
        f"this frontend serves {config.served_name!r}, but frontend {other.frontend_id} ({other.address}) of the same "
        f"registry serves {other.model!r}; a registry holds one model: start another registry for "
        f"{config.served_name!r}, over the same Consul with another consul_service"
    )
