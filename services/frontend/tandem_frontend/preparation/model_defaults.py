"""What the model's makers recommend for sampling: generation_config.json, read once at start.

Applied to what a request leaves out, here and not in the engine, so that both legs get the same values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.api.types.v1 import sampling_pb2
from tandem.errors import InvalidRequest, StartError
from tandem_frontend.preparation.sampling import check_ranges

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_defaults(model: Path) -> dict[str, float]:
    """The recommended values by their field name in Sampling; empty when the model recommends nothing.

    Raises:
        StartError: the file is there and cannot be read, or a value is none that a request could have; names file and
            key.
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
    """The request's values, and the model's where it has none."""
    whole = sampling_pb2.Sampling(**{name: value for name, value in defaults.items() if not sampling.HasField(name)})  # type: ignore[arg-type]
    whole.MergeFrom(sampling)
    return whole
