"""`tandem top` on a terminal: two tables and a line of totals, redrawn at each interval.

Owns key bindings, sorting and selection; `cells.py` formats the cells. Textual is imported only here, so that the other
commands do not load it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, Literal

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from tandem.cli.top.cells import FRONTEND_COLUMNS, WORKER_COLUMNS, Column, R, cell, fitting, ordered, shortened, totals
from tandem.observability.fleet_sample import DRAINING, GONE, UNREACHABLE, FrontendSample, Sample, WorkerSample

STYLES = {UNREACHABLE: "bold red", GONE: "dim", DRAINING: "yellow"}
TEXT_COLUMNS = ("WORKER", "FRONTEND", "ROLE", "STATE", "HEALTH")
"""Left-aligned columns; numbers are right-aligned."""


class FleetTable(DataTable[Text], Generic[R]):
    """A table of processes, sorted by one of its columns."""

    def __init__(self, columns: Sequence[Column[R]], table_id: str) -> None:
        super().__init__(id=table_id, cursor_type="row", zebra_stripes=True)
        self._fleet_columns: Sequence[Column[R]] = columns
        self._sorted_by = 0
        self._descending = False
        self._fleet_rows: Sequence[R] = ()
        self.hidden: tuple[str, ...] = ()
        """Heads of the columns for which the terminal is too narrow."""

    def on_mount(self) -> None:
        """Show the header from the first frame on."""
        self.show_rows(self._fleet_rows)

    def on_resize(self) -> None:
        """Show as many columns as fit now."""
        self.show_rows(self._fleet_rows)

    def sort_next(self, step: int) -> None:
        """Move the sort column by `step`: 1 or -1."""
        self._sorted_by = (self._sorted_by + step) % len(self._fleet_columns)
        self.show_rows(self._fleet_rows)

    def reverse(self) -> None:
        """Reverse the sort order."""
        self._descending = not self._descending
        self.show_rows(self._fleet_rows)

    def show_rows(self, rows: Sequence[R]) -> None:
        """Replace the rows; the cursor stays on its process."""
        self._fleet_rows = rows
        selected = self._selected()
        now_s = time.time()
        self.clear(columns=True)
        shown = ordered(rows, self._fleet_columns[self._sorted_by], now_s, descending=self._descending)
        texts = [[cell(column, row, now_s) for column in self._fleet_columns] for row in shown]
        columns, name_length = self._head(texts)
        for row, cells in zip(shown, texts, strict=True):
            cells[0] = shortened(cells[0], name_length)
            style = STYLES.get(row.state, "")
            styled = (Text(cells[at], style=style, justify=_side(self._fleet_columns[at])) for at in columns)
            self.add_row(*styled, key=row.name)
        names = [row.name for row in shown]
        if selected in names:
            self.move_cursor(row=names.index(selected), animate=False)

    def _selected(self) -> str | None:
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    def _head(self, texts: Sequence[Sequence[str]]) -> tuple[list[int], int]:
        """Add the columns that fit; returns their indices, and the most characters of a name."""
        arrow = " ↓" if self._descending else " ↑"
        heads = [column.head for column in self._fleet_columns]
        heads[self._sorted_by] += arrow
        widths = [max(map(len, column)) + 2 * self.cell_padding for column in zip(heads, *texts, strict=True)]
        ranks = [column.rank for column in self._fleet_columns]
        # The column that the rows are sorted by says why they stand where they do.
        ranks[self._sorted_by] = 0
        room = self.size.width - self.scrollbar_size_vertical
        shown, name_width = fitting(widths, ranks, room if self.size.width else sum(widths))
        for at in shown:
            self.add_column(Text(heads[at], justify=_side(self._fleet_columns[at])), key=self._fleet_columns[at].head)
        self.hidden = tuple(column.head for at, column in enumerate(self._fleet_columns) if at not in shown)
        return shown, name_width - 2 * self.cell_padding


class TopScreen(App[None]):
    """The application: totals, registry problem, workers, frontends."""

    TITLE = "tandem top"
    CSS = """
    #totals { padding: 0 1; height: auto; }
    #problem { padding: 0 1; height: auto; color: $error; }
    #workers { height: 2fr; }
    #frontends { height: 1fr; min-height: 4; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort(1)", "Sort by next"),
        Binding("S", "sort(-1)", "by previous"),
        Binding("r", "reverse", "Reverse"),
        Binding("t", "switch", "Other table"),
        Binding("p", "pause", "Pause"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, sample: Callable[[], Sample], interval_s: float) -> None:
        """`sample` is called at each redraw."""
        super().__init__()
        self._sample = sample
        self._interval_s = interval_s
        self._is_paused = False
        self.worker_table: FleetTable[WorkerSample] = FleetTable(WORKER_COLUMNS, "workers")
        self.frontend_table: FleetTable[FrontendSample] = FleetTable(FRONTEND_COLUMNS, "frontends")

    def compose(self) -> ComposeResult:
        """The widgets from top to bottom."""
        yield Static(id="totals", markup=False)
        yield Static(id="problem", markup=False)
        yield self.worker_table
        yield self.frontend_table
        yield Footer()

    def on_mount(self) -> None:
        """Draw now and at each interval."""
        self.draw()
        self.set_interval(self._interval_s, self._draw_unless_paused)
        self.worker_table.focus()

    def draw(self) -> None:
        """Redraw from a new sample."""
        sample = self._sample()
        at = time.strftime("%H:%M:%S", time.localtime(sample.time_s))
        problem = self.query_one("#problem", Static)
        problem.display = sample.registry_problem is not None
        problem.update(f"no registry reachable, showing the last known members: {sample.registry_problem}")
        self.worker_table.show_rows(sample.workers)
        self.frontend_table.show_rows(sample.frontends)
        hidden = len(self.worker_table.hidden) + len(self.frontend_table.hidden)
        parts = (at, "paused" if self._is_paused else "", totals(sample), f"{hidden} columns hidden" if hidden else "")
        self.query_one("#totals", Static).update(" · ".join(filter(None, parts)))

    def action_sort(self, step: int) -> None:
        """Change the sort column of the focused table."""
        self._table().sort_next(step)

    def action_reverse(self) -> None:
        """Reverse the order of the focused table."""
        self._table().reverse()

    def action_switch(self) -> None:
        """Move the focus to the other table."""
        (self.worker_table if self.frontend_table.has_focus else self.frontend_table).focus()

    def action_pause(self) -> None:
        """Pause or resume redrawing."""
        self._is_paused = not self._is_paused
        self.draw()

    def _table(self) -> FleetTable[WorkerSample] | FleetTable[FrontendSample]:
        return self.frontend_table if self.frontend_table.has_focus else self.worker_table

    def _draw_unless_paused(self) -> None:
        if not self._is_paused:
            self.draw()


def _side(column: Column[R]) -> Literal["left", "right"]:
    return "left" if column.head in TEXT_COLUMNS else "right"
