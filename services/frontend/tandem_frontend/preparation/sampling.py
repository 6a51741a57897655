"""The ranges of sampling values, for requests and for what a model's makers recommend alike.

Ranges are those the contract's comments state; a test holds the two together. Settles no default.
"""

from __future__ import annotations

import math

from tandem.api.types.v1 import sampling_pb2
from tandem.errors import InvalidRequest

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
    """Refuse values outside their ranges; whether the tokens of `logit_bias` exist is another question.

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
