"""The plot of a replay: the distribution of TTFT and ITL, and how busy each worker was, for each policy.

Needs matplotlib, the extra `replay`; imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError
from tandem_frontend.replay.frontend import FINISHED
from tandem_frontend.replay.simulation import Replay
from tandem_frontend.replay.summary import Summary

FORMATS = (".png", ".svg")


def check_plot(file: Path) -> None:
    """Check that a plot can be made, before a replay runs for it.

    Raises:
        ConfigError: its format is unknown, or matplotlib is missing.
    """
    if file.suffix not in FORMATS:
        raise ConfigError("plot", f"must be a file that ends in {' or '.join(FORMATS)}, not {file}")
    try:
        import matplotlib  # noqa: F401 -- only whether it is there
    except ImportError:
        raise ConfigError("plot", "needs matplotlib: install the extra `replay` of tandem-serving") from None


def write_plot(file: Path, replays: Sequence[Replay], summaries: Sequence[Summary]) -> None:
    """Write the plot, the same bytes for the same replay.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # No date and no random ids, so that equal replays give equal files.
    mpl.rcParams["svg.hashsalt"] = "tandem"
    figure = Figure(figsize=(12, 4), layout="constrained")
    ttft, itl, busy = figure.subplots(1, 3)
    for one in replays:
        finished = [served for served in one.served if served.outcome == FINISHED]
        _distribution(ttft, one.policy, [served.ttft_s for served in finished])
        _distribution(itl, one.policy, [served.itl_s * 1_000 for served in finished if served.answer_tokens > 1])
    _busy(busy, summaries)
    ttft.set(title="Time to first token", xlabel="seconds", ylabel="share of requests", xscale="log")
    itl.set(title="Inter-token latency", xlabel="milliseconds", ylabel="share of requests")
    ttft.legend()
    metadata: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(file, metadata=metadata)
    except OSError as problem:
        raise ConfigError("plot", f"{file} cannot be written: {problem.strerror}") from None


def _distribution(axes: Any, label: str, values: list[float]) -> None:
    ordered = sorted(values)
    axes.plot(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], label=label)


def _busy(axes: Any, summaries: Sequence[Summary]) -> None:
    names = [one.worker for one in summaries[0].workers]
    width = 0.8 / len(summaries)
    for index, summary in enumerate(summaries):
        places = [place + index * width for place in range(len(names))]
        axes.bar(places, [one.utilisation for one in summary.workers], width, label=summary.policy)
    axes.set(title="Busy workers", ylabel="share of time", ylim=(0, 1))
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, rotation=90, fontsize=7)
