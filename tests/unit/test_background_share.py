"""What requests of low priority may have beside live ones, on a clock of the test's own."""

from __future__ import annotations

from tandem_frontend.admission.background import CREDIT_MAX_S, OTHERS_WINDOW_S, QUIET_S, BackgroundShare

from tandem.clock import ManualClock

STEP_S = 0.1


class Load:
    """The workers, with what other frontends have on them."""

    def __init__(self, requests_max: int = 100) -> None:
        self.requests_max = requests_max
        self.reported = 0

    def others(self, held_requests: int, held_tokens: int) -> tuple[int, int]:
        return max(0, self.reported - held_requests), 0

    def fits_beside(self, requests: int, tokens: int) -> bool:
        return requests <= self.requests_max


def quiet_share(most: int = 8, per_live: float = 0.1) -> tuple[BackgroundShare, ManualClock]:
    """A share whose frontend has never had a live request."""
    clock = ManualClock(1_000.0)
    return BackgroundShare(most, per_live, clock), clock


def mean_rows(live: int, per_live: float, row_s: float, total_s: float) -> float:
    """Rows that run in the mean beside a constant number of live requests, where each row takes `row_s`."""
    share, clock = quiet_share(64, per_live)
    share.note_live(live)
    ends_s: list[float] = []
    row_seconds = 0.0
    for _ in range(int(total_s / STEP_S)):
        ends_s = [end_s for end_s in ends_s if end_s > clock()]
        share.note_rows(len(ends_s))
        while share.room > 0:
            ends_s.append(clock() + row_s)
            share.note_rows(len(ends_s))
        row_seconds += len(ends_s) * STEP_S
        clock.advance(STEP_S)
    return row_seconds / total_s


def test_rows_get_all_places_once_there_was_no_live_request_for_a_while() -> None:
    share, clock = quiet_share()
    assert share.room == 8
    share.note_live(1)
    share.note_live(0)
    clock.advance(QUIET_S / 2)
    assert share.room == 0
    clock.advance(QUIET_S)
    assert share.room == 8


def test_rows_beside_live_requests_stay_at_their_fraction_in_the_mean() -> None:
    for live, per_live, row_s in ((1, 0.1, 5.0), (5, 0.1, 0.5), (20, 0.1, 3.0), (7, 0.5, 1.0), (100, 0.1, 2.0)):
        mean = mean_rows(live, per_live, row_s, 1_000)
        # One row may run beyond the budget at the end of the time, and the saved credit at its beginning.
        assert mean <= live * per_live + (row_s + CREDIT_MAX_S) / 1_000, (live, per_live, row_s, mean)


def test_rows_beside_live_requests_never_starve() -> None:
    for live, row_s in ((1, 5.0), (3, 60.0), (20, 3.0)):
        assert mean_rows(live, 0.1, row_s, 2_000) >= 0.8 * live * 0.1, (live, row_s)


def test_a_live_request_stops_all_rows_but_one() -> None:
    share, _ = quiet_share()
    excesses: list[int] = []
    share.on_excess = lambda: excesses.append(share.excess)
    share.note_rows(8)
    share.note_live(1)
    assert excesses == [7]
    share.note_rows(1)
    share.note_live(2)
    assert excesses == [7]


def test_many_live_requests_keep_their_fraction_of_rows() -> None:
    share, _ = quiet_share(most=64)
    share.note_rows(64)
    share.note_live(50)
    assert share.excess == 64 - 5


def test_the_generations_of_one_row_are_all_paid_for() -> None:
    share, clock = quiet_share()
    share.note_live(10)
    clock.advance(10)
    share.note_rows(1)
    for _ in range(4):
        share.begin()
    clock.advance(5)
    for _ in range(4):
        share.end()
    share.note_rows(0)
    # 10 request-seconds were saved; four ran for five seconds, in which five more were earned.
    assert share.room == 0
    clock.advance(5.5)
    assert share.room == 1


def test_other_frontends_count_only_with_what_was_there_all_the_time() -> None:
    clock, load = ManualClock(1_000.0), Load()
    share = BackgroundShare(8, 0.1, clock)
    others = share.add(load)
    # A report of rows of this frontend that have ended meanwhile.
    load.reported = 6
    others.look(6, 0)
    clock.advance(1)
    others.look(0, 0)
    assert share.live == 0
    clock.advance(OTHERS_WINDOW_S)
    others.look(2, 0)
    assert share.live == 4
    clock.advance(0.1)
    load.reported = 1
    others.look(1, 0)
    assert share.live == 0


def test_capacity_of_the_workers_is_shared_with_other_frontends() -> None:
    clock, load = ManualClock(1_000.0), Load(requests_max=10)
    share = BackgroundShare(8, 0.1, clock)
    others = share.add(load)
    load.reported = 7
    others.look(2, 0)
    assert others.fits_beside(5, 0)
    assert not others.fits_beside(6, 0)
