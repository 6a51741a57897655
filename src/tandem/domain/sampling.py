"""The table of sampling parameters: name, range, neutral value and the engine's name, for every module that needs one.

The frontend checks ranges, the worker translates fields, the engine renames them: all of them iterate over this table.
A test holds it against the contract (sampling.proto), the command line and the OpenAI schemas, which are declared by
hand.
"""

from __future__ import annotations

from dataclasses import dataclass

LOGIT_BIAS_MAX = 100
"""Largest absolute value for one token."""
LOGIT_BIASES_MAX = 1_024
"""Entries of one request."""
TOP_K_ALL = -1
"""Draw among all tokens."""


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values of a parameter."""

    lowest: float
    highest: float
    includes_lowest: bool = True

    def __contains__(self, value: float) -> bool:
        """Whether the value is allowed; NaN never is, because it compares false with everything."""
        return self.lowest < value <= self.highest or (self.includes_lowest and value == self.lowest)

    def __str__(self) -> str:
        """The range in an error message."""
        if self.includes_lowest:
            return f"{self.lowest:g} to {self.highest:g}"
        return f"above {self.lowest:g}, at most {self.highest:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameter:
    """One scalar parameter."""

    name: str
    """In `Sampling`, in sampling.proto, on the command line and in OpenAI's API (or what other servers add to it)."""
    engine_name: str = ""
    """In SGLang's sampling parameters; empty: the same."""
    range: Range | None = None
    """None: not an interval; the frontend has a rule of its own."""
    neutral: float | None = None
    """The value without effect; None: there is none."""
    is_penalty: bool = False
    """Depends on the tokens generated so far, which engines count themselves: no continuation on another worker."""
    is_recommended: bool = False
    """Read from the model's generation_config.json where the request does not set it."""


PARAMETERS = (
    SamplingParameter(name="temperature", range=Range(0, 2), neutral=1.0, is_recommended=True),
    SamplingParameter(name="top_p", range=Range(0, 1, includes_lowest=False), neutral=1.0, is_recommended=True),
    SamplingParameter(name="top_k", neutral=TOP_K_ALL, is_recommended=True),
    SamplingParameter(name="min_p", range=Range(0, 1), neutral=0.0, is_recommended=True),
    SamplingParameter(name="presence_penalty", range=Range(-2, 2), neutral=0.0, is_penalty=True),
    SamplingParameter(name="frequency_penalty", range=Range(-2, 2), neutral=0.0, is_penalty=True),
    SamplingParameter(
        name="repetition_penalty",
        range=Range(0, 2, includes_lowest=False),
        neutral=1.0,
        is_penalty=True,
        is_recommended=True,
    ),
    SamplingParameter(name="seed", engine_name="sampling_seed"),
)
SCALARS = tuple(parameter.name for parameter in PARAMETERS)
RANGES = {parameter.name: parameter.range for parameter in PARAMETERS if parameter.range is not None}
PENALTIES = {parameter.name: parameter.neutral for parameter in PARAMETERS if parameter.is_penalty}
"""Name -> the value that penalises nothing."""
RECOMMENDED = tuple(parameter.name for parameter in PARAMETERS if parameter.is_recommended)
ENGINE_NAMES = {parameter.name: parameter.engine_name or parameter.name for parameter in PARAMETERS}
