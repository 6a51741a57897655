"""The ranges of sampling values, for requests and for a model's recommended defaults.

The ranges are those stated in the contract's comments; a test compares the two. Sets no default.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tandem.api.types.v1 import sampling_pb2
from tandem.errors import InvalidRequest, StartError

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_defaults(model: Path) -> dict[str, float]:
    """The recommended values by their field name in Sampling; empty when the model recommends nothing.

    Raises:
        StartError: the file exists and is unreadable, or a value is not allowed in a request; names file and key.
    """
    file = model / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config: Any = json.loads(file.read_bytes())
        given = {name: config[name] for name in NAMES if config.get(name) is not None}
    except (OSError, ValueError, AttributeError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    # "All tokens" is 0 in these files, and -1 on the wire.
    if given.get("top_k") == 0:
        given["top_k"] = -1
    for name, value in given.items():
        _check(file, name, value)
    return given


def _check(file: Path, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StartError(f"{file}: {name} is {value!r}, not a number", path=str(file))
    sampling = sampling_pb2.Sampling()
    try:
        setattr(sampling, name, value)
        check_ranges(sampling)
    except InvalidRequest as problem:
        said = problem.message.removeprefix(f"{problem.field}: ")
        raise StartError(f"{file}: {name} {said}", path=str(file)) from None
    except (TypeError, ValueError):
        raise StartError(f"{file}: {name} is {value!r}, not a whole number of 32 bits", path=str(file)) from None


def with_defaults(sampling: sampling_pb2.Sampling, defaults: dict[str, float]) -> sampling_pb2.Sampling:
    """The request's values, and the model's defaults where it has none."""
    whole = sampling_pb2.Sampling(**{name: value for name, value in defaults.items() if not sampling.HasField(name)})  # type: ignore[arg-type]
    whole.MergeFrom(sampling)
    return whole


LOGIT_BIASES_MAX = 1_024

RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "repetition_penalty": (0, 2, False),
}
"""Field of Sampling -> lowest, highest, whether the lowest itself is allowed."""


def check_ranges(sampling: sampling_pb2.Sampling) -> None:
    """Reject values outside their ranges. Does not check whether the tokens of `logit_bias` exist.

    Raises:
        InvalidRequest: names the field.
    """
    for name, (lowest, highest, with_lowest) in RANGES.items():
        if not sampling.HasField(name):  # type: ignore[arg-type]
            continue
        value = getattr(sampling, name)
        # NaN compares false with everything.
        inside = lowest < value <= highest or (with_lowest and value == lowest)
        if not inside:
            wanted = f"from {lowest:g} to {highest:g}" if with_lowest else f"over {lowest:g} and at most {highest:g}"
            raise InvalidRequest(f"sampling.{name}", f"must be {wanted}, not {value:g}")
    if sampling.HasField("top_k") and sampling.top_k != -1 and sampling.top_k < 1:
        raise InvalidRequest("sampling.top_k", f"must be 1 or more, or -1 for all, not {sampling.top_k}")
    if len(sampling.logit_bias) > LOGIT_BIASES_MAX:
        raise InvalidRequest("sampling.logit_bias", f"{len(sampling.logit_bias)} are more than {LOGIT_BIASES_MAX}")
    for token_id, bias in sampling.logit_bias.items():
        if math.isnan(bias) or abs(bias) > 100:
            raise InvalidRequest("sampling.logit_bias", f"of token {token_id} must be -100 to 100, not {bias:g}")
