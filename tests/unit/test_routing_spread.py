"""Several frontends that know each other only from load reports, on virtual time, with the real routing code."""

from __future__ import annotations

import pytest
from tandem_frontend.routing.policy import PolicyName

from benchmarks.routing_spread import Simulation, single_turn
from tandem.domain.worker import WorkerRole


@pytest.mark.parametrize("frontends", [1, 4])
@pytest.mark.parametrize("policy", [PolicyName.LEAST_WORK, PolicyName.PREFIX, PolicyName.AUTO])
def test_single_turn_load_is_even_over_the_workers(policy: PolicyName, frontends: int) -> None:
    prompts = single_turn(2_000)
    rate = sum(prompt.tokens for prompt in prompts) / prompts[-1].time_s / 8 / 0.7
    simulation = Simulation(policy, frontends=frontends, tokens_per_s=rate, blocks_max=2_000)
    simulation.run(prompts)
    for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
        least, most = simulation.shares(role)
        assert least >= 0.8
        assert most <= 1.1
