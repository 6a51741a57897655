"""Which names in requests mean which model, and how many models a frontend serves: settings of the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NamingRules:
    """Which names mean which model, and how many models there may be."""

    models_max: int = 16
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Model by alias. A model that has the alias as its name comes first."""
    default: str | None = None
    """Name of the model for requests without one; None: the only one."""
