"""Settings of the controller: goals, limits, and how they reach the rule.

Owns names, ranges and defaults.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tandem.config import RpcServiceConfig
from tandem.controller.needs import NeedSettings
from tandem.controller.rule import RuleSettings
from tandem.discovery.addresses import REGISTRY_TEXT, Addresses
from tandem.errors import ConfigError

WINDOW_S, INTERVAL_S = 10.0, 1.0
PREFILL_SHARE, DECODE_SHARE, ACT_ABOVE, GAIN_MIN = 0.8, 0.9, 0.95, 0.1
CONFIRM_S, SETTLE_S, REVERSAL_S = 2.0, 3.0, 120.0


class ControllerConfig(RpcServiceConfig):
    """A controller, which changes the roles of workers so that they follow the load. One of several acts at a time."""

    registry: Addresses = Field(description=REGISTRY_TEXT)
    model: str | None = Field(None, description="model whose workers it controls; default: the only one")
    ttft_s: float = Field(0.0, ge=0, le=3600, description="goal: seconds from arrival to the first token; required")
    itl_s: float = Field(0.0, ge=0, le=60, description="goal: mean seconds between two tokens of a request; required")
    dry_run: bool = Field(False, description="log each decision, and change nothing")
    interval_s: float = Field(INTERVAL_S, ge=0.1, le=60, description="seconds between two decisions")
    window_s: float = Field(WINDOW_S, ge=1, le=600, description="seconds over which arrivals and speeds are measured")
    prefill_share: float = Field(
        PREFILL_SHARE, gt=0, le=1, description="share of its time that a prefill worker may compute"
    )
    decode_share: float = Field(
        DECODE_SHARE,
        gt=0,
        le=1,
        description="share of its places, memory and streams within the ITL that decode may use",
    )
    act_above: float = Field(
        ACT_ABOVE, gt=0, le=10, description="need for each worker of a role, from which on a change is considered"
    )
    gain_min: float = Field(
        GAIN_MIN, gt=0, lt=1, description="share by which a change must lower the larger need for each worker"
    )
    confirm_s: float = Field(CONFIRM_S, ge=0, le=3600, description="seconds for which a change must be wanted")
    settle_s: float = Field(SETTLE_S, ge=0, le=3600, description="seconds after a change, before the next one")
    reversal_s: float = Field(
        REVERSAL_S,
        ge=0,
        le=86_400,
        description="seconds after a change, before one in the other direction; doubles with each reversal",
    )
    role_drain_timeout_s: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="seconds for open requests of a worker that changes its role; default: the worker's setting",
    )

    @model_validator(mode="after")
    def _goals_are_given(self) -> Self:
        """Checked at start: a controller without goals would follow none."""
        for key, value in (("ttft_s", self.ttft_s), ("itl_s", self.itl_s)):
            if value <= 0:
                raise ConfigError(key, "is required: a number of seconds above 0")
        if self.itl_s > self.ttft_s:
            raise ConfigError("itl_s", f"must be at most ttft_s ({self.ttft_s:g}), not {self.itl_s:g}")
        return self

    def rule(self) -> RuleSettings:
        """The part that the rule reads."""
        return RuleSettings(
            needs=NeedSettings(
                ttft_s=self.ttft_s,
                itl_s=self.itl_s,
                window_s=self.window_s,
                prefill_share=self.prefill_share,
                decode_share=self.decode_share,
            ),
            act_above=self.act_above,
            gain_min=self.gain_min,
            confirm_s=self.confirm_s,
            settle_s=self.settle_s,
            reversal_s=self.reversal_s,
        )


def rule_settings(*, ttft_s: float, itl_s: float) -> RuleSettings:
    """The defaults, for a replay.

    Raises:
        ConfigError: names the goal.
    """
    return ControllerConfig(registry=("127.0.0.1:1",), ttft_s=ttft_s, itl_s=itl_s).rule()
