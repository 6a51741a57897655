"""What the processes of a frontend share, and how their responses are merged: limits, metrics, statistics, sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tandem_frontend.admin.stats import FAILURES_MAX
from tandem_frontend.config import FrontendConfig
from tandem_frontend.processes.identity import ProcessIdentity
from tandem_frontend.processes.parent import settings_of, share
from tandem_frontend.processes.sums import buckets, combined, histogram

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.frontend.v1 import sibling_service_pb2 as sibling_pb
from tandem.api.types.v1 import error_pb2
from tandem.clock import ManualClock
from tandem.errors import ConfigError
from tandem.observability.merged_scrape import LABEL, LocalScrapes, merged
from tandem.observability.windows import LatencyWindow, added
from tandem.rpc.convert import timestamp
from tandem.service.prefork.distribution import Distributor, fittest, releases
from tandem.service.prefork.process import State


def config(**settings: Any) -> FrontendConfig:
    return FrontendConfig.model_validate({"registry": "127.0.0.1:1", "model": "m", **settings})


# --- Limits


@given(st.integers(1, 100_000), st.integers(1, 256))
def test_shares_are_even_and_make_up_the_whole(total: int, count: int) -> None:
    shares = [share(total, number, count) for number in range(count)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True), "what remains is for the first ones"


def test_each_process_gets_its_share_and_nothing_that_is_the_parents() -> None:
    whole = config(processes=3, open_requests_max=256, announce_file="/tmp/here.json", port=50051, metrics_port=9400)
    parts = [settings_of(whole, number) for number in range(3)]
    assert [part.open_requests_max for part in parts] == [86, 85, 85]
    assert {(part.processes, part.announce_file) for part in parts} == {(1, None)}
    again = FrontendConfig.model_validate(parts[1].model_dump(mode="json"))
    assert again == parts[1], "they travel as JSON"


def test_a_limit_that_is_less_than_the_processes_names_its_key() -> None:
    with pytest.raises(ConfigError) as refused:
        config(processes=4, open_requests_max=3)
    assert (refused.value.key, refused.value.exit_status) == ("open_requests_max", 2)
    assert config(processes=4, open_requests_max=4).processes == 4


def test_an_identity_travels_and_names_the_others() -> None:
    identity = ProcessIdentity(number=1, count=3, frontend_id="door", address="h:1", directory="/run/x")
    assert ProcessIdentity.parsed(identity.as_dict()) == identity
    assert identity.instance == "door/1"
    assert identity.sibling_paths == {0: Path("/run/x/0.rpc"), 2: Path("/run/x/2.rpc")}


# --- Metrics

ONE = """# HELP requests_total How many.
# TYPE requests_total counter
requests_total 3.0
# HELP lag_seconds How late.
# TYPE lag_seconds histogram
lag_seconds_bucket{le="1.0"} 2.0
lag_seconds_bucket{le="+Inf"} 2.0
lag_seconds_count 2.0
lag_seconds_sum 0.5
"""
OTHER = """# HELP lag_seconds How late.
# TYPE lag_seconds histogram
lag_seconds_bucket{le="1.0"} 5.0
lag_seconds_bucket{le="+Inf"} 6.0
lag_seconds_count 6.0
lag_seconds_sum 7.5
# HELP open How many { are } open.
# TYPE open gauge
open{state="a b} c",kind="x\\\\"} 1.0
open{} 2.0
"""


def families(text: str) -> dict[str, list[tuple[str, dict[str, str], float]]]:
    return {
        family.name: [(sample.name, sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }


def test_merged_texts_say_of_each_sample_whose_it_is() -> None:
    text = merged({"0": ONE, "1": OTHER})
    found = families(text)
    assert found["requests"] == [("requests_total", {LABEL: "0"}, 3.0)]
    assert [(name, labels[LABEL], value) for name, labels, value in found["lag_seconds"] if "le" not in labels] == [
        ("lag_seconds_count", "0", 2.0),
        ("lag_seconds_sum", "0", 0.5),
        ("lag_seconds_count", "1", 6.0),
        ("lag_seconds_sum", "1", 7.5),
    ]
    assert found["open"] == [
        ("open", {LABEL: "1", "state": "a b} c", "kind": "x\\"}, 1.0),
        ("open", {LABEL: "1"}, 2.0),
    ]


def test_lines_of_one_metric_stand_together_under_one_description() -> None:
    lines = merged({"0": ONE, "1": OTHER, "2": ONE}).splitlines()
    assert [line for line in lines if line.startswith("# TYPE")] == [
        "# TYPE requests_total counter",
        "# TYPE lag_seconds histogram",
        "# TYPE open gauge",
    ]
    names = [line.split("{")[0].removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for line in lines]
    order = [name for name in names if not name.startswith("#")]
    assert order == sorted(order, key=["requests_total", "lag_seconds", "open"].index)


def test_the_other_form_ends_once() -> None:
    text = merged({"0": ONE + "# EOF\n", "1": OTHER + "# EOF\n"})
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=5), min_size=1, max_size=4))
def test_sums_over_the_label_are_the_sums_over_the_processes(processes: list[list[tuple[str, int]]]) -> None:
    def text(samples: list[tuple[str, int]]) -> str:
        lines = [f'seen_total{{kind="{kind}",n="{n}"}} {value}.0' for n, (kind, value) in enumerate(samples)]
        return "# TYPE seen_total counter\n" + "".join(f"{line}\n" for line in lines)

    found = families(merged({str(number): text(samples) for number, samples in enumerate(processes)}))
    everything = [sample for samples in found.values() for sample in samples]
    assert sum(value for _, _, value in everything) == sum(value for samples in processes for _, value in samples)
    for number, samples in enumerate(processes):
        own = [value for _, labels, value in everything if labels[LABEL] == str(number)]
        assert own == [float(value) for _, value in samples]


def test_a_process_that_cannot_be_scraped_is_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scrapes = LocalScrapes({"0": tmp_path / "missing"})
    assert scrapes.texts("") == {}
    assert scrapes.texts("") == {}
    assert len(caplog.records) == 1
    assert "process 0" in caplog.text


# --- Stats


def answer(ttft_s: list[float], **counts: Any) -> sibling_pb.GetSiblingFiguresResponse:
    window = LatencyWindow(ManualClock())
    for latency_s in ttft_s:
        window.add(latency_s)
    return sibling_pb.GetSiblingFiguresResponse(
        figures=pb.WatchFiguresResponse(counted_since=timestamp(counts.pop("since_s", 100.0)), **counts),
        time_to_first_token=buckets(window.histogram()),
        inter_token_latency=sibling_pb.LatencyBuckets(),
    )


def test_counts_and_rates_add_up_and_the_earliest_start_counts() -> None:
    total = combined(
        [
            answer([], open_requests=2, completion_tokens_per_s=1.5, finished_requests=1, since_s=200.0),
            answer([], open_requests=3, completion_tokens_per_s=2.0, since_s=150.0),
        ]
    )
    assert (total.open_requests, total.completion_tokens_per_s, total.finished_requests) == (5, 3.5, 1)
    assert total.counted_since == timestamp(150.0)
    assert total.processes == 2
    assert not total.HasField("time_to_first_token")


@given(st.lists(st.lists(st.floats(1e-4, 100), max_size=30), min_size=1, max_size=4))
def test_percentiles_are_those_of_one_process_that_had_seen_it_all(processes: list[list[float]]) -> None:
    whole = combined([answer([latency for part in processes for latency in part])])
    total = combined([answer(part) for part in processes])
    assert total.time_to_first_token == whole.time_to_first_token


def test_a_histogram_travels() -> None:
    window = LatencyWindow(ManualClock())
    for latency_s in (0.01, 0.02, 0.02, 3.0):
        window.add(latency_s)
    assert histogram(buckets(window.histogram())) == window.histogram()
    assert added([]).latencies() is None


def test_leg_failures_add_up_within_their_bound() -> None:
    failures = [
        pb.LegFailures(worker_id=f"w{number}", reason=error_pb2.ERROR_REASON_LEG_FAILED, count=1)
        for number in range(FAILURES_MAX)
    ]
    others = [
        pb.LegFailures(worker_id="w0", reason=error_pb2.ERROR_REASON_LEG_FAILED, count=4),
        pb.LegFailures(worker_id="new", reason=error_pb2.ERROR_REASON_LEG_FAILED, count=7),
    ]
    total = combined([answer([], leg_failures=failures), answer([], leg_failures=others)])
    found = {entry.worker_id: entry.count for entry in total.leg_failures}
    assert (found["w0"], found["w1"]) == (5, 1)
    assert found[""] == 7, "what is beyond the bound is counted without a worker"
    assert len(total.leg_failures) == FAILURES_MAX + 1


# --- Connections


@dataclass
class Child:
    """A child of tests: takes what it is given."""

    state: State = State.SERVING
    connection_count: int = 0
    call_count: int = 0
    given_number: int = 0
    can_take: bool = True
    is_late: bool = False
    given: list[Any] = field(default_factory=list)

    def give(self, connection: Any, number: int) -> None:
        self.given.append(connection)
        self.connection_count += 1
        self.given_number = number


class Listening:
    """A listener of tests, at which clients are scripted."""

    def __init__(self) -> None:
        self.is_paused = False
        self.is_closed = False

    def begin(self, take: Callable[[Any], None]) -> None:
        self.take = take

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("children", "chosen"),
    [
        ([Child(connection_count=2), Child(connection_count=1)], 1),
        ([Child(connection_count=1, call_count=5), Child(connection_count=1, call_count=4)], 1),
        ([Child(given_number=7), Child(given_number=3)], 1),
        ([Child(state=State.OPEN), Child(connection_count=9)], 1),
        ([Child(state=State.DRAINING), Child(state=State.OPEN, connection_count=9)], 1),
        ([Child(is_late=True), Child(connection_count=9)], 1),
        ([Child(can_take=False), Child(state=State.DRAINING)], 1),
        ([Child(can_take=False), Child(can_take=False)], None),
        ([Child(state=State.STARTING), Child(state=State.ENDED)], None),
    ],
)
def test_the_fittest(children: list[Child], chosen: int | None) -> None:
    assert fittest(children) is (None if chosen is None else children[chosen])


@given(st.integers(1, 40), st.integers(1, 6))
def test_connections_that_stay_are_spread_evenly(count: int, children_count: int) -> None:
    children, listening = [Child() for _ in range(children_count)], Listening()
    Distributor(listening, lambda: children).begin()
    for number in range(count):
        listening.take(number)
    counts = [child.connection_count for child in children]
    assert max(counts) - min(counts) <= 1
    assert sorted(given for child in children for given in child.given) == list(range(count))


def test_while_no_process_takes_connections_none_is_accepted() -> None:
    child, listening = Child(can_take=False), Listening()
    distributor = Distributor(listening, lambda: [child])
    distributor.begin()
    listening.take("first")
    listening.take("second")
    assert (listening.is_paused, child.given) == (True, [])
    child.can_take = True
    distributor.reevaluate()
    assert (listening.is_paused, child.given) == (False, ["first", "second"])


def test_a_returned_connection_goes_first() -> None:
    child, listening = Child(can_take=False), Listening()
    distributor = Distributor(listening, lambda: [child])
    distributor.begin()
    listening.take("late")
    early: list[Any] = ["early", "earlier"]
    distributor.give_again(early)
    child.can_take = True
    distributor.reevaluate()
    assert child.given == ["early", "earlier", "late"]


def test_connections_that_wait_at_the_end_are_closed() -> None:
    listening = Listening()
    distributor = Distributor(listening, list)
    distributor.begin()
    ours, theirs = socket.socketpair()
    listening.take(ours)
    distributor.close()
    assert (listening.is_closed, ours.fileno()) == (True, -1)
    theirs.close()


@pytest.mark.parametrize(
    ("counts", "newcomer", "released"),
    [
        ([6, 0], 1, [3, 0]),
        ([6, 4, 0], 2, [3, 0, 0]),
        ([5, 5, 0], 2, [2, 1, 0]),
        ([1, 0], 1, [0, 0]),
        ([0], 0, [0]),
        ([2, 3], 1, [0, 0]),
    ],
)
def test_a_newcomer_gets_its_share(counts: list[int], newcomer: int, released: list[int]) -> None:
    assert releases(counts, newcomer) == released


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8).flatmap(
        lambda c: st.tuples(st.just(c), st.integers(0, len(c) - 1))
    )
)
def test_no_process_is_left_with_fewer_than_the_new_one(drawn: tuple[list[int], int]) -> None:
    counts, newcomer = drawn
    released = releases(counts, newcomer)
    left = [count - gone for count, gone in zip(counts, released, strict=True)]
    assert released[newcomer] == 0
    assert all(gone == 0 or left[n] >= counts[newcomer] + sum(released) - 1 for n, gone in enumerate(released))
