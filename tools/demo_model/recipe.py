"""The recipe of the published model: its shape, its phases and its learning rates.

Every number that changes the result is here. Owns no training loop and no text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .corpus import Mix


@dataclass(frozen=True)
class Phase:
    """A stretch of training on rows of one length."""

    row_tokens: int
    row_count: int
    step_count: int
    mix: Mix


@dataclass(frozen=True)
class Recipe:
    """All choices of one training run."""

    seed: int = 7
    hidden_size: int = 192
    layer_count: int = 4
    head_count: int = 4
    kv_head_count: int = 2
    head_size: int = 64
    intermediate_size: int = 512
    matrix_learning_rate: float = 1.5e-3
    vector_learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup_step_count: int = 30
    decay_share: float = 0.4
    phases: tuple[Phase, ...] = (
        Phase(128, 16, 500, Mix(3, 1, recall=0.45, story=0.1, repeat=0.4, chat=0.05)),
        Phase(256, 8, 600, Mix(6, 4, recall=0.7, story=0.15, repeat=0.1, chat=0.05)),
        Phase(512, 4, 800, Mix(14, 12, recall=0.6, story=0.25, repeat=0.05, chat=0.1)),
        Phase(1024, 2, 250, Mix(30, 25, recall=0.5, story=0.35, repeat=0.05, chat=0.1)),
        Phase(2048, 1, 250, Mix(60, 60, recall=0.5, story=0.35, repeat=0.05, chat=0.1)),
    )

    @property
    def step_count(self) -> int:
        """Steps of the whole run."""
        return sum(phase.step_count for phase in self.phases)

    def learning_rate_scale(self, step: int) -> float:
        """Returns the share of the full learning rates at a step: a warm-up, a plateau, a line to nearly zero."""
        warm = min(1.0, (step + 1) / self.warmup_step_count)
        left = (self.step_count - step) / (self.step_count * self.decay_share)
        return min(warm, max(0.02, min(1.0, left)))

    def replace(self, changes: list[str]) -> Recipe:
        """Returns a copy with `name=value` changes; `steps=a,b,...` sets the steps of the phases."""
        recipe = self
        for change in changes:
            name, value = change.split("=")
            if name == "steps":
                pairs = zip(recipe.phases, value.split(","), strict=True)
                phases = tuple(dataclasses.replace(phase, step_count=int(count)) for phase, count in pairs)
                recipe = dataclasses.replace(recipe, phases=phases)
            else:
                kind = type(getattr(recipe, name))
                recipe = dataclasses.replace(recipe, **{name: kind(value)})
        return recipe
