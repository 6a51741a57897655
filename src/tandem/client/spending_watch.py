"""What other frontends, and the other processes of this one, have admitted of tenants with quotas.

Owns one stream for each of them. What is made of it is `tandem_frontend.admission.quotas`'.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from tandem.api.frontend.v1 import quota_service_pb2 as pb
from tandem.api.frontend.v1.quota_service_pb2_grpc import QuotaServiceStub
from tandem.domain.quota import Spending
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels

log = logging.getLogger(__name__)

FAILURES_WARNED = 4
"""Failures in succession after which an operator is to know: some seconds."""
Report = Callable[[Sequence[str], Sequence[Spending]], None]
"""Called with the sources that a peer reports for, and what they have admitted."""


class SpendingWatch:
    """The streams of all peers."""

    def __init__(self, channels: Channels, report: Report, lost: Callable[[Iterable[str]], None]) -> None:
        """`lost` is called with the sources that a peer reported for, and does no longer. Neither must raise."""
        self._channels = channels
        self._report = report
        self._lost = lost
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, addresses: Iterable[str]) -> None:
        """Set the addresses of the peers: begin new streams, end those of others."""
        wanted = set(addresses)
        for address in self._tasks.keys() - wanted:
            self._tasks.pop(address).cancel()
        for address in wanted - self._tasks.keys():
            self._tasks[address] = asyncio.create_task(self._follow(address), name=f"spending-{address}")

    async def close(self) -> None:
        """End all streams. Idempotent."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, address: str) -> None:
        backoff = Backoff(first_s=0.1, most_s=2.0)
        sources: set[str] = set()
        failure_count = 0
        while True:
            stub: Any = QuotaServiceStub(self._channels.get(address))
            call = stub.WatchSpending(pb.WatchSpendingRequest())
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    self._lost(sources.difference(message.sources))
                    sources = set(message.sources)
                    self._report(message.sources, [spending_from_proto(one) for one in message.spending])
                    backoff.reset()
                    failure_count = 0
            except grpc.aio.AioRpcError as failure:
                failure_count += 1
                # Once for an outage, and not for a peer that is about to leave the registry.
                level = logging.WARNING if failure_count == FAILURES_WARNED else logging.DEBUG
                log.log(
                    level,
                    "%s does not report what tenants use, quotas count without it: %s",
                    address,
                    failure.details(),
                )
            finally:
                call.cancel()
                self._lost(sources)
                sources = set()
            await asyncio.sleep(backoff.next_s())


def spending_to_proto(spending: Spending) -> pb.TenantSpending:
    """The message of a value."""
    message = pb.TenantSpending(
        source=spending.source,
        tenant=spending.tenant,
        requests=spending.requests,
        tokens=spending.tokens,
        open_requests=spending.open_requests,
    )
    if math.isfinite(spending.requests_left):
        message.requests_left = spending.requests_left
    if math.isfinite(spending.tokens_left):
        message.tokens_left = spending.tokens_left
    return message


def spending_from_proto(message: pb.TenantSpending) -> Spending:
    """The inverse of `spending_to_proto`."""
    return Spending(
        source=message.source,
        tenant=message.tenant,
        requests=message.requests,
        tokens=message.tokens,
        open_requests=max(0, message.open_requests),
        requests_left=message.requests_left if message.HasField("requests_left") else math.inf,
        tokens_left=message.tokens_left if message.HasField("tokens_left") else math.inf,
    )
