"""Quotas of tenants: what is refused and when it is allowed again, and what several processes admit together."""

from __future__ import annotations

import contextlib
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.admission import quotas as module
from tandem_frontend.admission.quotas import Quotas, spelt

from tandem.clock import ManualClock
from tandem.domain.quota import NO_QUOTA, Quota, QuotaError, Spending, client_header, read_client_header
from tandem.errors import InvalidRequest, QuotaExceeded
from tests.unit.support.examples import examples

TEN = Quota(requests_per_minute=10)
QUOTAS = st.builds(
    Quota,
    requests_per_minute=st.none() | st.integers(1, 10**9),
    tokens_per_minute=st.none() | st.integers(1, 10**9),
    open_requests=st.none() | st.integers(1, 100_000),
)


def send(quotas: Quotas, quota: Quota, count: int = 1, tenant: str = "a") -> None:
    """One request that ends at once."""
    quotas.check(tenant, quota, count)
    with quotas.taken(tenant, quota, count):
        pass


def refusal(quotas: Quotas, quota: Quota, count: int = 1, tenant: str = "a") -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as refused:
        send(quotas, quota, count, tenant)
    return refused.value


@given(st.text("abc.-_", min_size=1), QUOTAS)
def test_a_quota_travels_with_the_client(client_id: str, quota: Quota) -> None:
    assert read_client_header(client_header(client_id, quota)) == (client_id, quota)


def test_a_field_of_a_newer_edge_is_ignored_and_a_wrong_number_is_not() -> None:
    assert read_client_header("a;open_requests=2;images_per_day=9") == ("a", Quota(open_requests=2))
    with pytest.raises(QuotaError, match="open_requests"):
        read_client_header("a;open_requests=many")


def test_requests_of_a_minute_are_refused_until_one_is_refilled() -> None:
    clock = ManualClock()
    quotas = Quotas(clock)
    for _ in range(10):
        send(quotas, TEN)
    refused = refusal(quotas, TEN)
    assert refused.retry_delay_s == pytest.approx(6)
    assert refused.metadata == {"limit": "requests_per_minute"}
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    clock.advance(refused.retry_delay_s or 0)
    send(quotas, TEN)
    refusal(quotas, TEN)


def test_a_refused_request_costs_nothing() -> None:
    quotas = Quotas(ManualClock())
    refusal_count = 100
    send(quotas, TEN, 10)
    delays = [refusal(quotas, TEN).retry_delay_s for _ in range(refusal_count)]
    assert set(delays) == {delays[0]}


def test_choices_count_and_more_than_a_minute_has_are_owed() -> None:
    clock = ManualClock()
    quotas = Quotas(clock)
    send(quotas, TEN, 25)
    assert refusal(quotas, TEN).retry_delay_s == pytest.approx((15 + 1) * 6)
    clock.advance(24 * 6)
    refusal(quotas, TEN, 21)
    clock.advance(6)
    send(quotas, TEN, 21)


def test_tokens_are_charged_afterwards_and_the_debt_is_waited_for() -> None:
    clock = ManualClock()
    quotas, quota = Quotas(clock), Quota(tokens_per_minute=600)
    send(quotas, quota)
    quotas.spend("a", quota, 700)
    refused = refusal(quotas, quota)
    assert refused.metadata["limit"] == "tokens_per_minute"
    assert refused.retry_delay_s == pytest.approx(10.1), "100 are owed and one is needed, of ten in a second"
    clock.advance(10.1)
    send(quotas, quota)


def test_open_requests_are_limited_until_one_ends() -> None:
    quotas, quota = Quotas(ManualClock()), Quota(open_requests=3)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quotas.taken("a", quota, 2))
        assert refusal(quotas, quota, 2).metadata["limit"] == "open_requests"
        quotas.check("a", quota, 1)
        quotas.check("b", quota, 3)
    send(quotas, quota, 3)
    with pytest.raises(InvalidRequest) as impossible:
        quotas.check("a", quota, 4)
    assert impossible.value.field == "n", "no wait would help"


def test_a_tenant_without_a_quota_is_neither_limited_nor_known() -> None:
    quotas = Quotas(ManualClock())
    for _ in range(1_000):
        send(quotas, NO_QUOTA)
        quotas.spend("a", NO_QUOTA, 10**9)
    assert quotas.headers("a", NO_QUOTA) == [] == quotas.known_keys()


def test_the_headers_say_what_is_left_and_when_all_of_it_is_there_again() -> None:
    clock = ManualClock()
    quotas, quota = Quotas(clock), Quota(60, 6_000, 4)
    with quotas.taken("a", quota, 3):
        quotas.spend("a", quota, 6_150)
        assert dict(quotas.headers("a", quota)) == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "57",
            "x-ratelimit-reset-requests": "3s",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "1m1.5s",
            "x-ratelimit-limit-open-requests": "4",
            "x-ratelimit-remaining-open-requests": "1",
        }
    clock.advance(61.5)
    headers = dict(quotas.headers("a", quota))
    assert headers["x-ratelimit-remaining-tokens"] == "6000"
    assert headers["x-ratelimit-reset-tokens"] == "0ms"
    assert headers["x-ratelimit-remaining-open-requests"] == "4"


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(-1, "0ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (90.5, "1m30.5s"), (7_200, "120m0s")],
)
def test_times_are_spelt_as_openai_does(duration_s: float, text: str) -> None:
    assert spelt(duration_s) == text


def test_a_changed_quota_counts_at_once() -> None:
    clock = ManualClock()
    quotas = Quotas(clock)
    send(quotas, TEN, 10)
    more = Quota(requests_per_minute=600)
    assert refusal(quotas, more).retry_delay_s == pytest.approx(0.1)
    clock.advance(60)
    send(quotas, more, 600)
    refusal(quotas, TEN)


def test_known_tenants_are_bounded_and_those_with_open_requests_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TENANTS_MAX", 3)
    quotas = Quotas(ManualClock())
    with quotas.taken("open", TEN):
        for number in range(20):
            send(quotas, TEN, tenant=str(number))
        assert len(quotas.known_keys()) == 3
        assert quotas.own("open") is not None


class Cluster:
    """Processes that exchange what they spend, each report a while on its way."""

    def __init__(self, count: int, delay_s: float) -> None:
        self.clock = ManualClock()
        self.delay_s = delay_s
        self.processes = [Quotas(self.clock, str(number)) for number in range(count)]
        self.on_the_way: list[tuple[float, int, Spending]] = []
        for process in self.processes:
            process.met(other.source for other in self.processes)

    def report(self, number: int, tenant: str = "a") -> None:
        spending = self.processes[number].own(tenant)
        assert spending is not None
        at_s = self.clock() + self.delay_s
        self.on_the_way += [(at_s, other, spending) for other in range(len(self.processes)) if other != number]

    def deliver(self) -> None:
        due = [one for one in self.on_the_way if one[0] <= self.clock()]
        self.on_the_way = [one for one in self.on_the_way if one[0] > self.clock()]
        for _, other, spending in due:
            self.processes[other].note(spending)

    def try_send(self, number: int, quota: Quota) -> bool:
        try:
            send(self.processes[number], quota)
        except QuotaExceeded:
            return False
        self.report(number)
        return True


@settings(max_examples=examples(60))
@given(st.integers(1, 6), st.integers(1, 400), st.sampled_from([0.05, 0.2, 2.0]), st.integers(0, 2**32))
def test_a_quota_holds_over_all_processes_and_is_never_cut(
    count: int, per_minute: int, delay_s: float, seed: int
) -> None:
    """A tenant that sends as fast as it can, at processes in any order, for ten minutes.

    At most: a minute's worth at once, what is refilled, and once what the others can admit before they know of it. At
    least: what one bucket would admit, wherever the requests go.
    """
    quota, rng = Quota(requests_per_minute=per_minute), random.Random(seed)
    cluster = Cluster(count, delay_s)
    step_s, duration_s = 0.5, 600.0
    sticky, admitted = rng.random() < 0.3, 0
    while cluster.clock() < duration_s:
        cluster.deliver()
        for _ in range(5):
            number = 0 if sticky else rng.randrange(count)
            while cluster.try_send(number, quota):
                admitted += 1
        cluster.clock.advance(step_s)
    gained = per_minute * duration_s / 60
    in_flight = 0 if sticky else (count - 1) * (per_minute + per_minute / 60 * (delay_s + step_s) + 1)
    assert admitted <= per_minute + gained + in_flight
    assert admitted >= math.floor(per_minute + gained - per_minute / 60 * (delay_s + 2 * step_s)) - 1


def test_what_all_admitted_too_much_at_once_is_owed_and_not_admitted_again() -> None:
    """The bound of the error: once, and not once a minute."""
    cluster = Cluster(4, 0.1)
    for number in range(4):
        while cluster.try_send(number, TEN):
            pass
    cluster.clock.advance(0.1)
    cluster.deliver()
    assert refusal(cluster.processes[0], TEN).retry_delay_s == pytest.approx(3 * 60 + 6, abs=0.2)
    cluster.clock.advance(4 * 60)
    admitted = 0
    for number in range(4):
        while cluster.try_send(number, TEN):
            admitted += 1
            cluster.clock.advance(0.1)
            cluster.deliver()
    assert admitted in (10, 11)


def test_open_requests_count_over_all_processes_and_those_of_a_lost_one_do_not() -> None:
    cluster, quota = Cluster(2, 0.0), Quota(open_requests=3)
    with cluster.processes[0].taken("a", quota, 2):
        cluster.report(0)
        cluster.deliver()
        refusal(cluster.processes[1], quota, 2)
        cluster.processes[1].check("a", quota, 1)
        cluster.processes[1].lost(["0"])
        cluster.processes[1].check("a", quota, 3)


def test_a_process_that_starts_again_begins_with_what_the_others_know() -> None:
    cluster = Cluster(1, 0.0)
    while cluster.try_send(0, TEN):
        pass
    spending = cluster.processes[0].own("a")
    assert spending is not None
    before_its_first_request, after_it = Quotas(cluster.clock, "new"), Quotas(cluster.clock, "newer")
    send(after_it, TEN)
    for fresh in (before_its_first_request, after_it):
        fresh.note(spending)
        refusal(fresh, TEN)
    late = Quotas(cluster.clock, "late")
    late.note(spending)
    cluster.clock.advance(30)
    send(late, TEN, 5)
    refusal(late, TEN)


def test_a_report_that_came_late_takes_back_nothing() -> None:
    clock = ManualClock()
    quotas = Quotas(clock, "here")
    quotas.met(["there"])
    send(quotas, TEN)
    for requests in (3, 1, 3, 4):
        quotas.note(Spending("there", "a", requests, 0, 0, 9.0 - requests, math.inf))
    assert dict(quotas.headers("a", TEN))["x-ratelimit-remaining-requests"] == str(10 - 1 - 4)


def test_a_tenant_that_was_forgotten_is_not_charged_for_all_that_others_ever_admitted() -> None:
    quotas = Quotas(ManualClock(), "here")
    quotas.met(["there"])
    send(quotas, TEN)
    quotas.note(Spending("there", "a", 1_000, 0, 0, 7.0, math.inf))
    assert dict(quotas.headers("a", TEN))["x-ratelimit-remaining-requests"] == str(10 - 1 - 3)


def test_changes_are_reported_once_each_with_its_source() -> None:
    quotas = Quotas(ManualClock(), "here")
    changes: list[tuple[str, str]] = []
    quotas.on_change = lambda source, tenant: changes.append((source, tenant))
    with quotas.taken("a", TEN):
        assert changes == [("here", "a")]
        quotas.spend("a", TEN, 5)
    quotas.note(Spending("there", "b", 1, 0, 1, 9.0, math.inf))
    quotas.lost(["there", "elsewhere"])
    assert changes == [("here", "a"), ("here", "a"), ("here", "a"), ("there", "b"), ("there", "b")]
    assert quotas.known("there", "b") == Spending("there", "b", 1, 0, 0, 9.0, math.inf)
