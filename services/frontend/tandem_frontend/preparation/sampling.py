"""Range checks of sampling parameters, for requests and for the defaults in a model's generation_config.json.

The ranges themselves are in `tandem.domain.sampling`; a test compares them with the contract's comments.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tandem.api.types.v1 import sampling_pb2
from tandem.domain.sampling import LOGIT_BIAS_MAX, LOGIT_BIASES_MAX, RANGES, RECOMMENDED, TOP_K_ALL
from tandem.errors import InvalidRequest, StartError


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
        given = {name: config[name] for name in RECOMMENDED if config.get(name) is not None}
    except (OSError, ValueError, AttributeError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    # "All tokens" is 0 in these files, and -1 on the wire.
    if given.get("top_k") == 0:
        given["top_k"] = TOP_K_ALL
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


def check_ranges(sampling: sampling_pb2.Sampling) -> None:
    """Reject values outside their ranges. Does not check whether the tokens of `logit_bias` exist.

    Raises:
        InvalidRequest: names the field.
    """
    for name, allowed in RANGES.items():
        if not sampling.HasField(name):  # type: ignore[arg-type]
            continue
        value = getattr(sampling, name)
        if value not in allowed:
            raise InvalidRequest(f"sampling.{name}", f"must be {allowed}, not {value:g}")
    if sampling.HasField("top_k") and sampling.top_k != TOP_K_ALL and sampling.top_k < 1:
        raise InvalidRequest("sampling.top_k", f"must be at least 1, or -1 for all, not {sampling.top_k}")
    if len(sampling.logit_bias) > LOGIT_BIASES_MAX:
        raise InvalidRequest("sampling.logit_bias", f"{len(sampling.logit_bias)} are more than {LOGIT_BIASES_MAX}")
    for token_id, bias in sampling.logit_bias.items():
        if math.isnan(bias) or abs(bias) > LOGIT_BIAS_MAX:
            raise InvalidRequest(
                "sampling.logit_bias",
                f"of token {token_id} must be -{LOGIT_BIAS_MAX} to {LOGIT_BIAS_MAX}, not {bias:g}",
            )
