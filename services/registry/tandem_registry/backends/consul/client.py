"""What the registry asks of Consul: the health of one service, one key, and entries at the agent.

Owns the requests and their forms. When they are made, and what answers mean, is others' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from consul import base
from consul.callback import CB

from tandem.errors import ServiceError
from tandem_registry.backends.consul.records import Record, meta, place, service_id, tags
from tandem_registry.backends.consul.settings import ConsulSettings
from tandem_registry.backends.consul.transport import ANSWER_TIMEOUT_S, TandemConsul, is_refusal
from tandem_registry.view import Health

DEREGISTER_CRITICAL_AFTER = "1m"
"""Consul's least. By then the lease is over, or its keeper is dead."""
FAILURES_BEFORE_CRITICAL = 2
"""One check that gets no answer in time may be a busy worker's."""
NEVER = "8760h"
NOBODY = 'Service.ID == ""'
"""Selects no instance."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Consul's answer about the service at one index, as `answers` reads it; None where nothing changed."""

    index: int
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Generation:
    """The key that names one life of Consul's data."""

    registry_id: str
    modify_index: int


class ConsulClient:
    """One agent, one service name."""

    def __init__(self, settings: ConsulSettings, *, interval_s: float, checks_tls: bool) -> None:
        """`interval_s`: between two checks of one member; `checks_tls`: members serve with TLS."""
        self._settings = settings
        self._consul = TandemConsul(settings)
        self._service = settings.service
        self._interval_s = interval_s
        self._checks_tls = checks_tls

    @property
    def has_checks(self) -> bool:
        """Whether the agent checks the health of members."""
        return self._settings.has_checks

    async def close(self) -> None:
        """End all connections."""
        await self._consul.http.close()

    async def health(self, after: Answer | None = None, wait_s: float = 0.0, *, is_consistent: bool = False) -> Answer:
        """The service now, or once it has changed since `after`, or after `wait_s`."""
        params: list[tuple[str, Any]] = []
        if after is not None and wait_s > 0:
            params = [("index", after.index), ("wait", f"{int(wait_s * 1000)}ms")]
        if is_consistent:
            params.append(("consistent", "1"))
        # Consul adds up to a sixteenth to the wait, so that not all of its clients return at once.
        answer = await self._ask(params, wait_s * 17 / 16 + ANSWER_TIMEOUT_S)
        return Answer(answer.index, None) if after is not None and answer.index == after.index else answer

    async def index(self) -> int:
        """The index of the service at this moment, as its leader knows it: without the service, which is megabytes."""
        return (await self._ask([("consistent", "1"), ("filter", NOBODY)], ANSWER_TIMEOUT_S)).index

    async def _ask(self, params: list[tuple[str, Any]], timeout_s: float) -> Answer:
        path = f"/v1/health/service/{self._service}"

        def read(response: base.Response) -> Answer:
            return Answer(int(response.headers["X-Consul-Index"]), response.body)

        answer: Answer = await self._allowed(
            lambda: self._consul.http.send(
                read, "GET", path, params, headers=self._consul.prepare_headers(), timeout_s=timeout_s
            )
        )
        return answer

    async def generation(self) -> Generation | None:
        """The present generation; None: Consul's data are new."""
        _, found = await self._allowed(lambda: self._consul.kv.get(self._key, consistency="consistent"))
        if found is None:
            return None
        return Generation((found["Value"] or b"").decode(errors="replace"), int(found["ModifyIndex"]))

    async def begin_generation(self, registry_id: str, instead_of: Generation | None) -> bool:
        """Write a new generation, unless somebody else has. Returns whether this one counts."""
        cas = 0 if instead_of is None else instead_of.modify_index
        return bool(await self._allowed(lambda: self._consul.kv.put(self._key, registry_id, cas=cas)))

    async def register(self, record: Record, health: Health = Health.PASSING) -> None:
        """Enter or replace an entry at this agent."""
        host, port = place(record)
        await self._allowed(
            lambda: self._consul.agent.service.register(
                self._service,
                service_id=service_id(self._service, record),
                address=host,
                port=port,
                tags=tags(record),
                meta=meta(record),
                check=self._check(record, f"{host}:{port}" if ":" not in host else f"[{host}]:{port}", health),
                replace_existing_checks=True,
            )
        )

    async def deregister(self, entry_id: str) -> None:
        """Remove an entry from this agent; one that it has not is no failure."""
        await self._allowed(lambda: self._consul.agent.service.deregister(entry_id))

    async def deregister_elsewhere(self, node: str, entry_id: str) -> None:
        """Remove an entry that a dead agent left in the catalog."""
        await self._allowed(lambda: self._consul.catalog.deregister(node, service_id=entry_id))

    async def keeper_of(self, entry_id: str) -> str | None:
        """Who wrote an entry of this agent last; None: there is no such entry."""
        path = f"/v1/agent/service/{entry_id}"
        found = await self._allowed(
            lambda: self._consul.http.get(CB.json(), path, headers=self._consul.prepare_headers())
        )
        return None if found is None else (found["Meta"] or {}).get("keeper")

    async def say_alive(self, entry_id: str) -> None:
        """Pass the check of an entry that says by itself that it lives."""
        await self._allowed(lambda: self._consul.agent.check.ttl_pass(f"service:{entry_id}"))

    def _check(self, record: Record, address: str, health: Health) -> dict[str, Any]:
        """How the agent finds out whether the member serves; its status until it has."""
        state = getattr(record.member, "state", None)
        if record.is_gone or (state is not None and state.value == "draining"):
            # It says so itself, and must not be found any more; its lease ends by the rules of leases.
            return {"TTL": NEVER, "Status": "critical", "Notes": "it takes nothing new"}
        status = "critical" if health is Health.CRITICAL else "passing"
        if not self.has_checks:
            if record.key[0] == "registry":
                return {"TTL": f"{self._interval_s * 3:g}s", "Status": status}
            return {}
        return {
            "GRPC": address,
            "GRPCUseTLS": self._checks_tls,
            "Interval": f"{self._interval_s:g}s",
            "Timeout": f"{self._interval_s:g}s",
            "FailuresBeforeCritical": FAILURES_BEFORE_CRITICAL,
            "DeregisterCriticalServiceAfter": DEREGISTER_CRITICAL_AFTER,
            "Status": status,
            # Without a word of why, critical only says that the agent has not looked yet.
            "Notes": "it was critical when it was entered again" if health is Health.CRITICAL else "",
        }

    @property
    def _key(self) -> str:
        return f"{self._service}/generation"

    async def _allowed(self, request: Callable[[], Any]) -> Any:
        """The answer; asked again with the token of now when the one in use was refused."""
        try:
            return await request()
        except ServiceError as problem:
            if not is_refusal(problem) or not self._consul.read_token_again():
                raise
            return await request()
