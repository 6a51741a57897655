"""The registry's requests to Consul: the health of one service, one key, and entries at the agent.

Owns the requests and their formats. Their callers decide when to send them; `parsing` reads the responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from consul import base
from consul.callback import CB

from tandem.domain.network_address import join_address
from tandem.errors import ServiceError
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem_registry.backends.consul.records import Record, host_and_port, meta, service_id, tags
from tandem_registry.backends.consul.settings import ConsulSettings
from tandem_registry.backends.consul.transport import RESPONSE_TIMEOUT_S, TandemConsul, is_refusal
from tandem_registry.view import Health

DEREGISTER_CRITICAL_AFTER = "1m"
"""Consul's minimum. By then the lease has expired, or the replica that owned it is dead."""
FAILURES_BEFORE_CRITICAL = 2
"""A single check that times out may only mean that the worker is busy."""
NEVER = "8760h"
NO_INSTANCE = 'Service.ID == ""'
"""A filter that selects no instance."""


@dataclass(frozen=True, slots=True)
class HealthResponse:
    """Consul's response about the service at one index, for `parsing`; body None: nothing has changed."""

    index: int
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Generation:
    """The key that names one generation of Consul's data: it changes when Consul has lost its data."""

    registry_id: str
    modify_index: int


class ConsulClient:
    """One agent, one service name."""

    def __init__(self, settings: ConsulSettings, *, interval_s: float, checks_tls: bool) -> None:
        """`interval_s`: between two health checks of one member; `checks_tls`: members serve with TLS."""
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
        """Close all connections."""
        await self._consul.http.close()

    async def health(
        self, after: HealthResponse | None = None, wait_s: float = 0.0, *, is_consistent: bool = False
    ) -> HealthResponse:
        """The service's instances with their health. With `after` and `wait_s` a blocking query: returns once the index
        differs from that of `after`, or after `wait_s`. `is_consistent`: the leader answers, not a follower's copy.
        """
        params: list[tuple[str, Any]] = []
        if after is not None and wait_s > 0:
            params = [("index", after.index), ("wait", f"{int(wait_s * 1000)}ms")]
        if is_consistent:
            params.append(("consistent", "1"))
        # Consul adds a jitter of up to wait/16, so that not all clients return at once.
        response = await self._read(params, wait_s * 17 / 16 + RESPONSE_TIMEOUT_S)
        return HealthResponse(response.index, None) if after is not None and response.index == after.index else response

    async def index(self) -> int:
        """The service's current index at the leader. Filters out all instances, which can be megabytes."""
        return (await self._read([("consistent", "1"), ("filter", NO_INSTANCE)], RESPONSE_TIMEOUT_S)).index

    async def _read(self, params: list[tuple[str, Any]], timeout_s: float) -> HealthResponse:
        path = f"/v1/health/service/{self._service}"

        def parse(response: base.Response) -> HealthResponse:
            return HealthResponse(int(response.headers["X-Consul-Index"]), response.body)

        result: HealthResponse = await self._authorized(
            lambda: self._consul.http.send(
                parse, "GET", path, params, headers=self._consul.prepare_headers(), timeout_s=timeout_s
            )
        )
        return result

    async def generation(self) -> Generation | None:
        """The current generation; None: Consul's data is new."""
        _, found = await self._authorized(lambda: self._consul.kv.get(self._key, consistency="consistent"))
        if found is None:
            return None
        return Generation((found["Value"] or b"").decode(errors="replace"), int(found["ModifyIndex"]))

    async def begin_generation(self, registry_id: str, instead_of: Generation | None) -> bool:
        """Write a new generation by compare-and-set. Returns False where another replica has written one first."""
        cas = 0 if instead_of is None else instead_of.modify_index
        return bool(await self._authorized(lambda: self._consul.kv.put(self._key, registry_id, cas=cas)))

    async def read_key(self, name: str) -> tuple[bytes, int] | None:
        """Value and version of a key below this cluster's name, from the leader; None: there is none."""
        _, found = await self._authorized(lambda: self._consul.kv.get(self._below(name), consistency="consistent"))
        return None if found is None else (found["Value"] or b"", int(found["ModifyIndex"]))

    async def write_key(self, name: str, value: str, version: int) -> bool:
        """Write where the version is still that one; 0: where there is no key. Returns whether it did."""
        return bool(await self._authorized(lambda: self._consul.kv.put(self._below(name), value, cas=version)))

    async def register(self, record: Record, health: Health = Health.PASSING) -> None:
        """Create or replace an entry at this agent."""
        host, port = host_and_port(record)
        await self._authorized(
            lambda: self._consul.agent.service.register(
                self._service,
                service_id=service_id(self._service, record),
                address=host,
                port=port,
                tags=tags(record),
                meta=meta(record),
                check=self._check(record, join_address(host, port), health),
                replace_existing_checks=True,
            )
        )

    async def deregister(self, entry_id: str) -> None:
        """Remove an entry from this agent; succeeds where there is none."""
        await self._authorized(lambda: self._consul.agent.service.deregister(entry_id))

    async def deregister_elsewhere(self, node: str, entry_id: str) -> None:
        """Remove an entry of a dead agent from the catalog."""
        await self._authorized(lambda: self._consul.catalog.deregister(node, service_id=entry_id))

    async def owner_of(self, entry_id: str) -> str | None:
        """Id of the replica that wrote an entry of this agent last; None: there is no such entry."""
        path = f"/v1/agent/service/{entry_id}"
        found = await self._authorized(
            lambda: self._consul.http.get(CB.json(), path, headers=self._consul.prepare_headers())
        )
        return None if found is None else (found["Meta"] or {}).get("keeper")

    async def pass_ttl_check(self, entry_id: str) -> None:
        """Renew the TTL check of an entry."""
        await self._authorized(lambda: self._consul.agent.check.ttl_pass(f"service:{entry_id}"))

    def _check(self, record: Record, address: str, health: Health) -> dict[str, Any]:
        """The health check of an entry, with the status it has until the agent first runs it."""
        state = getattr(record.member, "state", None)
        if record.is_gone or (state is not None and state.value == "draining"):
            # DNS must no longer return it, so its check is critical; its lease still ends by the lease rules only.
            return {"TTL": NEVER, "Status": "critical", "Notes": "draining: accepts no new requests"}
        status = "critical" if health is Health.CRITICAL else "passing"
        if not self.has_checks:
            if record.key[0] == "registry":
                return {"TTL": f"{self._interval_s * 3:g}s", "Status": status}
            return {}
        return {
            # Not the process as a whole: one that works but is not ready for requests keeps its entry.
            "GRPC": f"{address}/{PROCESS_SERVICE_NAME}",
            "GRPCUseTLS": self._checks_tls,
            "Interval": f"{self._interval_s:g}s",
            "Timeout": f"{self._interval_s:g}s",
            "FailuresBeforeCritical": FAILURES_BEFORE_CRITICAL,
            "DeregisterCriticalServiceAfter": DEREGISTER_CRITICAL_AFTER,
            "Status": status,
            # `parsing` ignores critical without notes: it only means that the agent has not run the check yet.
            "Notes": "was critical before it was registered again" if health is Health.CRITICAL else "",
        }

    @property
    def _key(self) -> str:
        return self._below("generation")

    def _below(self, name: str) -> str:
        return f"{self._service}/{name}"

    async def _authorized(self, request: Callable[[], Any]) -> Any:
        """The response; retried once with the token from the file when Consul rejects the current one."""
        try:
            return await request()
        except ServiceError as problem:
            if not is_refusal(problem) or not self._consul.reload_token():
                raise
            return await request()
