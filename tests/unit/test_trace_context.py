"""W3C trace context: parsing, forwarding and sampling."""

from __future__ import annotations

import random

import pytest

from tandem.observability.trace_context import TraceContext, TraceIds, parsed

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_header_comes_back_as_it_came() -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1,other=2"}
    context = parsed(headers)
    assert context is not None
    assert (context.trace_hex, context.is_sampled) == (TRACE, True)
    assert dict(context.headers()) == headers


def test_flags_beyond_sampled_are_not_invented() -> None:
    context = parsed({"traceparent": f"00-{TRACE}-{SPAN}-02"})
    assert context is not None
    assert not context.is_sampled
    assert context.headers() == (("traceparent", f"00-{TRACE}-{SPAN}-00"),)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
    ],
)
def test_an_unreadable_traceparent_is_no_context(header: str) -> None:
    assert parsed({"traceparent": header}) is None


def test_a_later_version_may_say_more() -> None:
    assert parsed({"traceparent": f"01-{TRACE}-{SPAN}-01-more"}) is not None


@pytest.mark.parametrize("state", ["a=" + "b" * 600, "\u00e9=1", "a=1\n", "a\x00"])
def test_a_state_that_cannot_be_sent_on_is_dropped_and_the_context_kept(state: str) -> None:
    context = parsed({"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": state})
    assert context is not None
    assert context.state == ""


def test_binary_metadata_is_no_context() -> None:
    assert parsed({"traceparent": b"00"}) is None


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_ratio_decides_about_new_traces(ratio: float) -> None:
    ids = TraceIds(ratio, random.Random(3))
    sampled = sum(ids.child(None).is_sampled for _ in range(4000))
    assert abs(sampled / 4000 - ratio) < 0.03


@pytest.mark.parametrize("is_sampled", [False, True])
def test_a_callers_decision_holds(is_sampled: bool) -> None:
    parent = TraceContext(7, 8, is_sampled, "v=1")
    child = TraceIds(0.0 if is_sampled else 1.0, random.Random(3)).child(parent)
    assert (child.trace_id, child.is_sampled, child.state) == (7, is_sampled, "v=1")
    assert child.span_id not in (0, 8)
