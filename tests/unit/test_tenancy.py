"""The order around a call: what a refused call costs, what its response's headers say, what is recorded of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tandem_frontend.admission.quotas import Quotas
from tandem_frontend.call_context import Caller
from tandem_frontend.call_usage import UsageEntry
from tandem_frontend.tenancy import Tenancy

from tandem.clock import ManualClock
from tandem.domain.quota import Quota
from tandem.errors import Draining, InvalidRequest, QuotaExceeded
from tandem.observability.request_trace import FINISHED, RequestTrace

TEN = Quota(requests_per_minute=10)


class Call:
    """A client's call whose headers can be asked for."""

    writable = True

    def __init__(self) -> None:
        self.head: Callable[[], Sequence[tuple[str, str]]] = lambda: ()

    def set_initial_metadata(self, head: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self.head = head

    def on_writable(self, callback: Any) -> None:
        """Never called."""

    def send(self, message: Any) -> None:
        """Not used."""

    @property
    def left(self) -> str | None:
        return dict(self.head()).get("x-ratelimit-remaining-requests")


class World:
    def __init__(self, *sinks: Callable[[UsageEntry], None]) -> None:
        self.entries: list[UsageEntry] = []
        self.refused: list[tuple[str, str]] = []
        self.quota_calls = 0
        self.call = Call()
        self.tenancy = Tenancy(
            quotas=Quotas(ManualClock()),
            sinks=[*sinks, self.entries.append],
            on_quota=self._count,
            on_refused=lambda tenant, limit: self.refused.append((tenant, limit)),
        )

    def _count(self) -> None:
        self.quota_calls += 1

    def run(self, caller: Caller, count: int = 1, ending: BaseException | None = None, charge: Any = None) -> None:
        with self.tenancy.charged(caller, self.call, count, "m", charge or (lambda tenant, count: None)):
            if ending is not None:
                raise ending


def test_a_call_that_admission_refuses_costs_the_quota_nothing_and_has_no_line() -> None:
    world = World()

    def refuse(tenant: str, count: int) -> None:
        raise Draining("draining")

    with pytest.raises(Draining):
        world.run(Caller(tenant="a", quota=TEN), 5, charge=refuse)
    assert world.call.left == "10"
    assert world.entries == []
    world.run(Caller(tenant="a", quota=TEN), 5)
    assert world.call.left == "5"
    assert [(entry.tenant, entry.choices) for entry in world.entries] == [("a", 5)]


def test_a_call_beyond_its_quota_has_headers_and_is_counted_and_reaches_nothing() -> None:
    world, charged = World(), []
    world.run(Caller(tenant="a", quota=TEN), 10)
    with pytest.raises(QuotaExceeded):
        world.run(Caller(tenant="a", quota=TEN), charge=lambda tenant, count: charged.append(tenant))
    assert (world.call.left, charged, world.refused) == ("0", [], [("a", "requests_per_minute")])
    assert (len(world.entries), world.quota_calls) == (1, 2)


def test_a_call_without_a_quota_has_no_headers() -> None:
    world = World()
    world.run(Caller(tenant="a"))
    assert (world.call.head(), world.quota_calls) == ((), 0)


@pytest.mark.parametrize(
    ("ending", "outcome", "reason"),
    [
        (InvalidRequest("prompt", "is empty"), "refused", "INVALID_REQUEST"),
        (asyncio.CancelledError(), "cancelled", "client_left"),
        (ValueError("a defect"), "failed", "INTERNAL"),
    ],
)
def test_a_call_that_ends_before_its_first_generation_has_a_line(
    ending: BaseException, outcome: str, reason: str
) -> None:
    world = World()
    with pytest.raises(type(ending)):
        world.run(Caller(tenant="a", call_id="x"), ending=ending)
    (entry,) = world.entries
    assert (entry.sums.outcome, entry.sums.reason, entry.call_id) == (outcome, reason, "x")
    assert (entry.sums.prompt_tokens, entry.sums.completion_tokens) == (0, 0)


def test_the_line_of_a_generation_says_how_it_ended_and_not_how_the_call_did() -> None:
    world, caller = World(), Caller(tenant="a")
    trace = RequestTrace(request_id="r", prompt_tokens=3)
    caller.usage.add(trace)
    trace.fail("LEG_FAILED", "a leg failed")
    with pytest.raises(InvalidRequest):
        world.run(caller, ending=InvalidRequest("prompt", "is empty"))
    assert (world.entries[0].sums.request_id, world.entries[0].sums.reason) == ("r", "LEG_FAILED")


def test_an_observer_that_fails_changes_nothing_for_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    def fail(entry: UsageEntry) -> None:
        raise RuntimeError("broken")

    world = World(fail)
    with caplog.at_level(logging.ERROR):
        world.run(Caller(tenant="a"))
    assert "observer failed" in caplog.text
    assert len(world.entries) == 1


def test_a_response_that_cannot_be_made_of_a_finished_generation_is_billed_as_failed() -> None:
    world, caller = World(), Caller(tenant="a")
    caller.usage.add(RequestTrace(request_id="r", outcome=FINISHED))
    with pytest.raises(ValueError, match="a defect"):
        world.run(caller, ending=ValueError("a defect"))
    sums = world.entries[0].sums
    assert (sums.outcome, sums.reason) == ("failed", "INTERNAL")
