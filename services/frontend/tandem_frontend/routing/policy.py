"""The interface of a routing policy: it picks one worker among those that are equally preferred for a request.

Owns the interface only. `pools` knows which workers are possible, `router` which of them are preferred,
`worker_costs` what each of them has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from tandem.domain.worker import Start, Worker
from tandem_frontend.routing.pool import Live


class PolicyName(Enum):
    """The values of the setting `routing_policy`."""

    AUTO = "auto"
    RANDOM = "random"
    POWER_OF_TWO = "power_of_two"
    LEAST_WORK = "least_work"
    PREFIX = "prefix"
    SESSION = "session"


class Job(Enum):
    """What a worker is picked for."""

    COMPUTE = "compute"
    """To compute the prompt: a prefill worker, or an aggregated one where no pairs are possible."""
    STREAM = "stream"
    """To generate: a decode worker. Where both are possible, a decode or an aggregated worker."""


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy sees of a request."""

    prompt_tokens: int
    prompt: Any = None
    """The prompt's blocks, for `CachedPrefixes.match`; None: not hashed."""
    session: str = ""
    """Value of the session header; empty: none."""
    tenant: str = ""
    model_digest: str = ""
    """Weights that must compute it; empty: any of the model's workers may."""


class CachedPrefixes(Protocol):
    """Which workers have which prompts in their prefix caches."""

    @property
    def is_live(self) -> bool:
        """Whether the cache of any worker is known now. Read for each choice."""
        ...

    def match(self, prompt: Any) -> Mapping[Start, int]:
        """Leading tokens of a prompt that each worker has cached, never more; workers without any may be absent."""
        ...


class Choice(NamedTuple):
    """A picked worker."""

    worker: Worker
    policy: str
    """Name of the policy that decided."""
    expected_cached_tokens: int | None = None
    """Prompt tokens that should be in the worker's prefix cache; None: unknown."""


class Policy(Protocol):
    """Picks workers. For a pair it is called twice: for the decode worker, then for a compatible prefill worker."""

    @property
    def name(self) -> str:
        """Its setting."""
        ...

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """Pick one of `workers`, which is never empty, and must not be kept after the call.

        Indexing and `flat` take constant time in any fleet; iterating over all workers does not.
        """
        ...
