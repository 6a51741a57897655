"""A model that this frontend serves: its name, its tokenizer and its defaults. `models` finds it by its name."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.errors import InvalidRequest
from tandem_frontend.preparation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model."""

    name: str
    tokenizer: Tokenizer
    sampling_defaults: dict[str, float]
    parent: str | None = None
    """The model that it adapts, where it is an adapter; None: it is a model."""

    @property
    def engine_name(self) -> str:
        """Name of the model that its workers have."""
        return self.parent or self.name


def check_name_length(name: str) -> None:
    """Reject a name that no model can have.

    Raises:
        InvalidRequest
    """
    if len(name) > MODEL_NAME_CHARS_MAX:
        raise InvalidRequest("model", f"must be at most {MODEL_NAME_CHARS_MAX} characters long")
