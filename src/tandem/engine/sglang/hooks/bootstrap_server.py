"""SGLang's bootstrap server in the worker's process: it takes registrations of its own engine only.

The server reports to decode engines where a prefill engine takes hand-overs. SGLang takes that address from any caller
that puts it there. Here the engine adds a secret that only its own processes have. A malformed request gets
status 400.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from tandem.domain.handover import DropReason
from tandem.engine.sglang.environment import REGISTRATION_KEY

log = logging.getLogger(__name__)

_COMMON = "sglang.srt.disaggregation.common.conn"
_SERVER = f"{_COMMON}.CommonKVBootstrapServer"
FIELD = "tandem_registration_key"

Handler = Callable[[Any, Any], Awaitable[Any]]
"""A method of SGLang's server: (server, aiohttp's request) -> aiohttp's response."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What SGLang's handlers raise for a body or a query that is not what they expect."""

dropped = dict.fromkeys((DropReason.MALFORMED, DropReason.REFUSED), 0)
"""Requests that this process's bootstrap server did not accept. Written by its thread only."""


def targets_in_main() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the worker's process."""
    return {
        f"{_SERVER}._handle_route_put": (_take_own, "around"),
        f"{_SERVER}._handle_register_dp_rank": (_take_own, "around"),
        f"{_SERVER}._handle_route_get": (_refuse_malformed, "around"),
        f"{_SERVER}._handle_query_dp_ranks": (_refuse_malformed, "around"),
    }


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler."""
    return {
        f"{_COMMON}.CommonKVManager._register_topology_row": (_add_key, "before"),
        f"{_COMMON}.CommonKVSender._register_prefill_dp_rank": (_register_rank, "around"),
    }


def _add_key(manager: Any, url: str, payload: dict[str, Any]) -> None:
    payload[FIELD] = os.environ[REGISTRATION_KEY]


def _register_rank(original: Callable[..., Any], sender: Any) -> None:
    """SGLang's own request, with the key; a failure is left to the timeout of the decode engine, as SGLang's is."""
    import requests

    url = f"http://{sender.bootstrap_server_url}/register_dp_rank"
    rank = {
        "bootstrap_room": sender.bootstrap_room,
        "dp_rank": sender.kv_mgr.attn_dp_rank,
        FIELD: os.environ[REGISTRATION_KEY],
    }
    try:
        requests.post(url, json=rank, timeout=5).raise_for_status()
    except requests.RequestException as problem:
        log.error("registering a request's data-parallel rank failed: %s", problem)


async def _take_own(original: Handler, server: Any, request: Any) -> Any:
    """Accept what the own engine puts here; 403 for any other caller."""
    try:
        key = (await request.json())[FIELD]
        is_own = hmac.compare_digest(key.encode(), os.environ[REGISTRATION_KEY].encode())
    except UNREADABLE:
        is_own = False
    if not is_own:
        dropped[DropReason.REFUSED] += 1
        return _response("only this server's own engine may register here", 403)
    return await _refuse_malformed(original, server, request)


async def _refuse_malformed(original: Handler, server: Any, request: Any) -> Any:
    """400 for a request that SGLang's handler cannot read; without this 500, and a traceback in the log for each."""
    try:
        return await original(server, request)
    except UNREADABLE:
        dropped[DropReason.MALFORMED] += 1
        return _response("malformed request", 400)


def _response(text: str, status: int) -> Any:
    from aiohttp import web

    return web.Response(text=text, status=status)
