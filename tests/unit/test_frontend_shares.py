"""Shares of tenants: no tenant starves another, whatever the others send, and idle shares are not wasted for long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.open_requests import CANCELLED_HOLD_S
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.admission.shares import OTHERS_RECENT_S, TenantRates, TenantShares
from tandem_frontend.call_context import caller_of

from tandem.clock import ManualClock, monotonic
from tandem.domain.quota import Quota
from tandem.errors import InvalidRequest, Overloaded
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.admission import admission_of
from tests.unit.support.examples import examples

SHARE = 0.75


class Fixed:
    """Free capacity for a fixed number of requests."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        return held_requests < self.requests_max


def admission(open_max: int = 256, requests_max: int = 1_000, **options: Any) -> Admission:
    return admission_of(open_max, Fixed(requests_max), monotonic, tenant_share=SHARE, **options)


def opened(controller: Admission, stack: contextlib.ExitStack, tenant: str, wanted: int) -> int:
    """How many of so many requests are admitted; they stay open."""
    for count in range(wanted):
        try:
            stack.enter_context(controller.admit(tenant))
        except Overloaded:
            return count
    return wanted


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(64, 300), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 128)), max_size=30))
def test_a_new_tenant_is_admitted_whatever_three_others_have_open(open_max: int, calls: list[tuple[str, int]]) -> None:
    async def live() -> None:
        controller = admission(open_max)
        with contextlib.ExitStack() as stack:
            for tenant, count in calls:
                with contextlib.suppress(Overloaded):
                    controller.charge(tenant, count)
                    assert opened(controller, stack, tenant, count) == count
            with controller.admit("new"):
                assert controller.open_count <= open_max

    asyncio.run(live())


async def test_a_tenant_alone_gets_its_share_and_several_get_equal_ones() -> None:
    controller = admission()
    with contextlib.ExitStack() as stack:
        assert opened(controller, stack, "a", 300) == 192 == controller.tenant_requests_max
        assert opened(controller, stack, "b", 300) == 48, "what is free has to do for others too"
    with contextlib.ExitStack() as stack:
        turns = [opened(controller, stack, tenant, 1) for _ in range(300) for tenant in "ab"]
        assert (sum(turns[::2]), sum(turns[1::2])) == (110, 109)
        with controller.admit("c"):
            pass


async def test_the_refusal_names_the_limit_and_a_delay() -> None:
    controller = admission(16)
    with contextlib.ExitStack() as stack:
        opened(controller, stack, "a", 16)
        with pytest.raises(Overloaded, match=r"12 open requests.*tenant_share") as refused, controller.admit("a"):
            pass
        assert refused.value.metadata["limit"] == "tenant_share"
        assert refused.value.retry_delay_s is not None
        with pytest.raises(Overloaded, match="5 choices") as refused:
            controller.charge("b", 5)
        assert refused.value.metadata["limit"] == "open_requests_max"


async def test_choices_of_one_call_are_admitted_together_or_not_at_all() -> None:
    controller = admission(256)
    with contextlib.ExitStack() as stack:
        controller.charge("a", 128)
        opened(controller, stack, "a", 128)
        with pytest.raises(Overloaded, match="128 more choices"):
            controller.charge("a", 128)
        assert controller.open_count == 128


def test_a_cancelled_request_counts_for_its_tenant_a_while_longer() -> None:
    async def live() -> None:
        controller = admission_of(16, Fixed(16), asyncio.get_running_loop().time, tenant_share=SHARE)
        for _ in range(12):
            with pytest.raises(asyncio.CancelledError), controller.admit("a"):
                raise asyncio.CancelledError
        assert controller.open_count == 0
        with pytest.raises(Overloaded, match="tenant_share"), controller.admit("a"):
            pass
        with controller.admit("b"):
            await asyncio.sleep(CANCELLED_HOLD_S + 0.1)
            with controller.admit("a"):
                assert controller.open_count == 2

    run_virtually(live())


def test_requests_cancelled_on_workers_count_for_the_share_of_these() -> None:
    async def live() -> None:
        controller, started = admission(requests_max=4), list[str]()

        async def one(tenant: str) -> None:
            with controller.admit(tenant):
                async with controller.slot(QueuedRequest(tokens=10, tenant=tenant)):
                    started.append(tenant)
                    await asyncio.sleep(1_000)

        with controller.admit("other"):
            for _ in range(50):
                task = asyncio.create_task(one("resetting"))
                await asyncio.sleep(0.01)
                task.cancel()
            within = len(started)
            await asyncio.sleep(CANCELLED_HOLD_S + 0.1)
            task = asyncio.create_task(one("resetting"))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        # Nine leave one of the four slots to others, and one more: a tenant may have three times what it leaves.
        assert within == 10
        assert len(started) == 11

    run_virtually(live())


async def test_unread_responses_count_for_their_tenant_only() -> None:
    unread = {"a": 12}
    controller = admission(16, unread=lambda: unread)
    with pytest.raises(Overloaded), controller.admit("a"):
        pass
    with controller.admit("b"):
        assert controller.requests.open_count == 13


@pytest.mark.parametrize(("open_max", "share", "most"), [(1, 0.75, 1), (2, 0.75, 1), (4, 0.75, 3), (256, 1.0, 256)])
async def test_a_small_limit_admits_at_least_one(open_max: int, share: float, most: int) -> None:
    controller = admission_of(open_max, Fixed(1), monotonic, tenant_share=share)
    with contextlib.ExitStack() as stack:
        assert opened(controller, stack, "a", 300) == most == controller.tenant_requests_max


def test_workers_keep_room_for_a_tenant_that_is_expected_back() -> None:
    async def live() -> None:
        clock, started = asyncio.get_running_loop().time, list[str]()
        controller = admission_of(256, Fixed(20), clock, tenant_share=SHARE)

        async def one(tenant: str, hold_s: float) -> None:
            with controller.admit(tenant):
                async with controller.slot(QueuedRequest(tokens=10, tenant=tenant)):
                    started.append(tenant)
                    await asyncio.sleep(hold_s)

        await one("small", 0.1)
        flood = [asyncio.create_task(one("large", 1_000)) for _ in range(40)]
        await asyncio.sleep(1)
        assert started.count("large") == 15
        await asyncio.wait_for(one("small", 0.1), 0.2)
        await asyncio.sleep(2 * OTHERS_RECENT_S)
        flood.append(asyncio.create_task(one("large", 1)))
        await asyncio.sleep(1)
        assert started.count("large") == 20, "no other tenant is expected any more"
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)

    run_virtually(live())


def test_a_tenant_over_its_share_does_not_hold_up_the_queue() -> None:
    async def live() -> None:
        controller, started = admission(requests_max=4), list[str]()

        async def one(tenant: str, hold_s: float) -> None:
            with controller.admit(tenant):
                async with controller.slot(QueuedRequest(tokens=10, tenant=tenant)):
                    started.append(tenant)
                    await asyncio.sleep(hold_s)

        with controller.admit("small"):
            flood = [asyncio.create_task(one("large", 1_000)) for _ in range(10)]
            await asyncio.sleep(1)
        assert started == ["large"] * 3
        await asyncio.gather(*(one("small", 1) for _ in range(3)))
        assert started == ["large"] * 3 + ["small"] * 3
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert controller.waiting_count == controller.open_count == 0

    run_virtually(live())


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=100))
def test_shares_hold_what_was_added_and_not_removed(steps: list[tuple[str, bool]]) -> None:
    shares, held = TenantShares(SHARE, ManualClock()), dict.fromkeys("abcd", 0)
    for tenant, adds in steps:
        if adds:
            shares.add(tenant)
            held[tenant] += 1
        elif held[tenant]:
            shares.remove(tenant)
            held[tenant] -= 1
    assert {tenant: shares.held(tenant) for tenant in "abcd"} == held


def test_a_rate_counts_choices_and_recovers() -> None:
    clock = ManualClock()
    controller = admission_of(256, Fixed(1), clock, rates=TenantRates(2, 4, clock))
    controller.charge("a", 8)
    with pytest.raises(Overloaded, match="tenant_requests_per_second") as refused:
        controller.charge("a")
    assert refused.value.retry_delay_s == pytest.approx(2.5), "4 are owed, and the next one is needed"
    assert refused.value.metadata["limit"] == "tenant_requests_per_second"
    controller.charge("b")
    clock.advance(2.5)
    controller.charge("a")
    with pytest.raises(Overloaded):
        controller.charge("a")


class Context:
    def __init__(self, peer: str, **metadata: str) -> None:
        self._peer, self._metadata = peer, {key.replace("_", "-"): value for key, value in metadata.items()}
        self.account = ""

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._metadata.items())

    def peer(self) -> str:
        return self._peer

    def count_unread_for(self, account: str) -> None:
        self.account = account


@pytest.mark.parametrize(
    ("peer", "metadata", "expected"),
    [
        ("ipv4:10.0.0.9:4711", {"x_client_id": "alice", "x_client_address": "192.0.2.1"}, "alice"),
        ("ipv4:10.0.0.9:4711", {"x_client_address": "192.0.2.1"}, "address:192.0.2.1"),
        ("ipv4:10.0.0.9:4711", {}, "address:10.0.0.9"),
        ("ipv6:[2001:db8:1:2:3::4]:4711", {}, "address:2001:db8:1:2::/64"),
        ("ipv6:[::ffff:10.0.0.9]:4711", {}, "address:10.0.0.9"),
        ("ipv4:10.0.0.9:4711", {"x_client_address": "no address"}, ""),
        ("unix:", {}, ""),
    ],
)
def test_a_caller_counts_as_its_key_or_its_address(peer: str, metadata: dict[str, str], expected: str) -> None:
    context = Context(peer, **metadata)
    caller = caller_of(cast("Any", context))
    assert caller.fairness_id == context.account == expected
    assert caller.tenant == metadata.get("x_client_id", "")
    assert not caller.quota


def test_a_caller_with_a_quota_is_the_same_tenant_as_without() -> None:
    caller = caller_of(cast("Any", Context("unix:", x_client_id="alice;open_requests=3;tokens_per_minute=9")))
    assert (caller.tenant, caller.fairness_id, caller.quota) == ("alice", "alice", Quota(None, 9, 3))


@pytest.mark.parametrize("header", ["a" * 129, "a;open_requests=0", "a;open_requests=1;open_requests=1"])
def test_a_tenant_that_no_edge_names_so_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        caller_of(cast("Any", Context("unix:", x_client_id=header)))
    assert refused.value.field == "x-client-id"


@pytest.mark.parametrize(
    ("value", "age_s"),
    [("t={}", 2.0), ("{}", 2.0), ("t={}", -2.0), ("t={}", 7_200.0), ("t=nan{}", None), ("t=inf", None), ("soon", None)],
)
def test_a_caller_has_the_edges_time_only_where_it_can_be_of_this_call(value: str, age_s: float | None) -> None:
    begin_s = time.time() - (age_s or 0.0)
    caller = caller_of(cast("Any", Context("unix:", x_request_start=value.format(begin_s))))
    expected = begin_s if age_s is not None and abs(age_s) < 3_600 else None
    assert caller.edge_begin_s == pytest.approx(expected)
