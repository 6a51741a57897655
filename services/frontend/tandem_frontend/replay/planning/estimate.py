"""The first guess of a search: workers for the busiest stretch of a load, from the engine's speeds alone.

Pure arithmetic, without queues, caches and routing. A search begins with it and trusts it in nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tandem.engine.simulated.options import Options
from tandem.engine.simulated.timing import decodes_s
from tandem_frontend.replay.fleet_file import FleetFile
from tandem_frontend.replay.job import Job
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.prompt_queue import whole_s
from tandem_frontend.replay.trace import TracedRequest

WINDOW_S_MIN = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Workers that the busiest stretch would keep busy all the time; fractions of one included."""

    prefill: float
    """For the prompts, without a cache."""
    decode: float
    """For the answers, in batches as large as the ITL allows."""

    @property
    def aggregated(self) -> float:
        """For both."""
        return self.prefill + self.decode


def estimate(fleet: FleetFile, options: Options, trace: Sequence[TracedRequest], goals: Goals) -> Estimate:
    """Guess from the engine's speeds.

    Args:
        fleet: memory and places of a worker of each role.
        options: of the engines.
        trace: the load, in the order of arrival.
        goals: a stretch is served within its own length and the TTFT.
    """
    window_s = max(WINDOW_S_MIN, 2 * goals.ttft_s)
    prompts_s = _busiest(trace, window_s, lambda one: whole_s(options, 0, Job(one.prompt_tokens, 0, ())))
    answers = _busiest(trace, window_s, lambda one: one.answer_tokens)
    batch = _batch(fleet, options, trace, goals)
    step_s = decodes_s(options, batch, batch * _context_tokens(trace))
    return Estimate(prefill=prompts_s / (window_s + goals.ttft_s), decode=answers * step_s / batch / window_s)


def _busiest(trace: Sequence[TracedRequest], window_s: float, work: Callable[[TracedRequest], float]) -> float:
    """The most work that arrives within a window."""
    total, most, begin = 0.0, 0.0, 0
    sizes = [work(one) for one in trace]
    for end, one in enumerate(trace):
        total += sizes[end]
        while trace[begin].arrival_s < one.arrival_s - window_s:
            total -= sizes[begin]
            begin += 1
        most = max(most, total)
    return most


def _context_tokens(trace: Sequence[TracedRequest]) -> float:
    """Mean context of a request while it generates: half of its answer is there."""
    return fmean(one.prompt_tokens + one.answer_tokens / 2 for one in trace)


def _batch(fleet: FleetFile, options: Options, trace: Sequence[TracedRequest], goals: Goals) -> int:
    """Requests that one worker can generate for at a time: by places, memory, and the time of a step."""
    whole_tokens = fmean(one.prompt_tokens + one.answer_tokens for one in trace)
    in_memory = fleet.decode.kv_capacity_tokens / whole_tokens
    each_s = options.decode_request_s + options.decode_context_token_s * _context_tokens(trace)
    in_time = (goals.itl_s - options.decode_step_s) / each_s if each_s else math.inf
    return max(1, math.floor(min(fleet.decode.running_requests_max, in_memory, in_time)))
