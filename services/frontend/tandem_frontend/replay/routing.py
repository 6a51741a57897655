"""The policies that a replay can run, and what each needs to know: the frontend's own, and an oracle.

Owns the way from the engines' caches and loads to a policy. The oracle alone sees the engines themselves.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from tandem.domain.worker import Start, Worker, WorkerRole
from tandem.errors import ConfigError
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.routing.policies import make_policy
from tandem_frontend.routing.policy import Choice, Job, Policy, PolicyName, RoutingRequest
from tandem_frontend.routing.pool import Live
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks
from tandem_frontend.routing.worker_costs import WorkerCosts

ORACLE = "oracle"
POLICIES = (*(name.value for name in PolicyName), ORACLE)
BLOCKS_MAX = 2**40
"""Of an index. A replay asks what routing does, not what its memory holds."""


class TracedBlocks(PromptBlocks):
    """The blocks of a traced prompt, whose hashes are known without its tokens."""

    def __init__(self, prompt_tokens: int, hashes: Sequence[int]) -> None:
        """`hashes` are those of its full blocks, all of the trace's block size."""
        super().__init__(())
        self._prompt_tokens = prompt_tokens
        self.whole = list(hashes)

    @property
    def prompt_tokens(self) -> int:
        """See `PromptBlocks`."""
        return self._prompt_tokens

    def hashes(self, block_size_tokens: int, count: int) -> list[int]:
        """See `PromptBlocks`."""
        return self.whole


class KnownCaches:
    """The real index, as the policies ask it."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        """All workers that have a prefix cache are followed, from an empty one on."""
        self.index = PrefixIndex(BLOCKS_MAX)
        for worker in workers:
            self.add(worker)

    def add(self, worker: Worker) -> None:
        """Follow a worker's cache, which is empty."""
        if worker.role is not WorkerRole.DECODE:
            self.index.reset(worker.start, worker.capabilities.page_size_tokens)
            self.index.complete(worker.start)

    @property
    def is_live(self) -> bool:
        """Whether any cache is known."""
        return self.index.trusted_count > 0

    def match(self, prompt: PromptBlocks) -> Mapping[Start, int]:
        """Leading cached tokens of a prompt on each worker."""
        return self.index.match(prompt)


class OraclePolicy:
    """Picks the worker that will have computed the prompt first, from the engines' own queues and caches, now.

    The best that any policy can know, without the future: a bound for what knowledge alone can reach, not an optimum.
    """

    name = ORACLE

    def __init__(self, engines: Mapping[Start, AccountedEngine]) -> None:
        self._engines = engines
        self._choices = itertools.count(1)
        self._chosen: dict[Start, int] = {}
        """The last choice of each worker. Of equals, the one that was chosen the longest ago goes next."""

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        costs = {worker.start: self._cost(worker, request) for worker in workers}
        worker = min(workers, key=lambda worker: (costs[worker.start], self._chosen.get(worker.start, 0)))
        self._chosen[worker.start] = next(self._choices)
        return Choice(worker, self.name)

    def _cost(self, worker: Worker, request: RoutingRequest) -> float:
        engine, blocks = self._engines[worker.start], request.prompt
        assert isinstance(blocks, TracedBlocks), "a replay describes each prompt by its blocks"
        if worker.role is WorkerRole.DECODE:
            return float(engine.memory.used_tokens + engine.memory.asked_tokens)
        return engine.backlog_s(tuple(blocks.whole), request.prompt_tokens)


def check_policies(names: tuple[str, ...]) -> None:
    """Check names of policies.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = next((name for name in names if name not in POLICIES), None)
    if unknown is not None:
        raise ConfigError("policy", f"must be some of {', '.join(POLICIES)}, not {unknown!r}")


def replayed_policy(
    name: str,
    costs: WorkerCosts,
    caches: KnownCaches,
    engines: Mapping[Start, AccountedEngine],
    rng: random.Random,
) -> Policy:
    """The policy of one frontend: its own, or the oracle."""
    return OraclePolicy(engines) if name == ORACLE else make_policy(PolicyName(name), costs, caches, rng)
