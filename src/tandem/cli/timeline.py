"""A request's timeline as text: one line with a bar for each step, attempt, leg and event, ordered by start time.

Owns the layout; `trace.py` fetches the timeline, `tandem.observability.timeline_lines` says what its lines are.
"""

from __future__ import annotations

from collections.abc import Iterator

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.observability.timeline_lines import Line, ending_of, lines_of, offset_s, stats_of, time_text

BAR_WIDTH_MIN, BAR_WIDTH_MAX = 20, 60
TEXT_WIDTH = 44
"""Usual width of the text of a line, in characters; the bar gets the rest."""
FULL, POINT, OPEN = "█", "╵", "▒"


def render(timeline: pb.RequestTimeline, frontend: str, *, width: int = 100) -> str:
    """The timeline as lines of text.

    Args:
        timeline: as reported by a frontend.
        frontend: name of that frontend.
        width: of the terminal, in characters; long texts wrap, bars do not.
    """
    lines = list(lines_of(timeline))
    shown_s = max([line.begin_s if line.end_s is None else line.end_s for line in lines], default=0.0)
    if timeline.HasField("last_token"):
        shown_s = max(shown_s, offset_s(timeline.last_token))
    bar_width = min(BAR_WIDTH_MAX, max(BAR_WIDTH_MIN, width - TEXT_WIDTH - 22))
    scale = f"0{time_text(shown_s):>{bar_width - 1}}"
    head = [*_head(timeline, frontend), "", f"{'AT':>9}  {'TOOK':>9}  {scale}  WHAT"]
    return "\n".join([*head, *(_shown(line, shown_s, bar_width) for line in lines)])


def _head(timeline: pb.RequestTimeline, frontend: str) -> Iterator[str]:
    yield f"request {timeline.request_id or 'without an id'} · {ending_of(timeline)}"
    received = timeline.begin.time.ToDatetime().isoformat(sep=" ", timespec="milliseconds")
    parts = [f"received {received} UTC by {frontend}", timeline.operation, timeline.model]
    if timeline.tenant:
        parts.append(f"tenant {timeline.tenant}")
    yield " · ".join(part for part in parts if part)
    stats = list(stats_of(timeline))
    if stats:
        yield " · ".join(stats)
    if timeline.error_message:
        yield timeline.error_message
    if timeline.trace_id:
        yield f"trace {timeline.trace_id}"


def _shown(line: Line, shown_s: float, bar_width: int) -> str:
    took = "" if line.is_moment else "open" if line.end_s is None else time_text(line.end_s - line.begin_s)
    return f"{time_text(line.begin_s):>9}  {took:>9}  {_bar(line, shown_s, bar_width)}  {'  ' * line.depth}{line.text}"


def _bar(line: Line, shown_s: float, width: int) -> str:
    """Blank up to the start, then the duration; at least one character wide."""
    if shown_s <= 0:
        return POINT.ljust(width)
    begin = min(width - 1, max(0, int(width * line.begin_s / shown_s)))
    if line.is_moment:
        return (" " * begin + POINT).ljust(width)
    end_s = shown_s if line.end_s is None else line.end_s
    length = min(width - begin, max(1, round(width * (end_s - max(0.0, line.begin_s)) / shown_s)))
    return (" " * begin + (OPEN if line.end_s is None else FULL) * length).ljust(width)
