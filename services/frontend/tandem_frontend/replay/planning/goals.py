"""The goals of a plan, and what contradicts them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.engine.simulated.options import Options
from tandem.engine.simulated.timing import decodes_s
from tandem.errors import ConfigError
from tandem_frontend.replay.fleet_file import WORKERS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """What a fleet must reach, with at most how many workers."""

    ttft_s: float
    itl_s: float
    percentile: float
    """The share of the requests that must be within each of the two, above 0 and below 1."""
    workers_max: int = 64

    def __post_init__(self) -> None:
        """Check each value alone.

        Raises:
            ConfigError: names the option.
        """
        for name, value in (("ttft", self.ttft_s), ("itl", self.itl_s)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(name, f"must be a number of seconds above 0, not {value:g}")
        if not 0 < self.percentile < 1:
            raise ConfigError("percentile", f"must be above 0 and below 1, such as 0.99, not {self.percentile:g}")
        if not 1 <= self.workers_max <= WORKERS_MAX:
            raise ConfigError("workers_max", f"must be 1 to {WORKERS_MAX}, not {self.workers_max}")

    def check_engine(self, options: Options) -> None:
        """Check the goals against the engine: no fleet generates faster than one request alone.

        Raises:
            ConfigError: the ITL is below one decode step; names the option.
        """
        step_s = decodes_s(options, 1, 0) * (1 - options.jitter)
        if self.itl_s < step_s:
            problem = f"must be at least one decode step of the fleet's engine, {step_s * 1e3:.3g} ms"
            raise ConfigError("itl", f"{problem}, not {self.itl_s * 1e3:.3g} ms")

    @property
    def name(self) -> str:
        """The percentile in short: p99, p99.9."""
        return f"p{self.percentile * 100:.10g}"
