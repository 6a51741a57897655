"""The models of a fleet as its frontends serve them: a table of `tandem status`, and the same for its JSON.

Owns how the lists of several frontends become one: a model that any of them refuses says where and why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.types.v1.worker_pb2 import MODEL_TASK_EMBED
from tandem.client import calls
from tandem.errors import TandemError
from tandem.tls.paths import Tls

COLUMNS = ("MODEL", "CONTEXT", "PREFILL", "DECODE", "AGGREGATED", "ALIASES", "STATE")

Lists = Mapping[str, Sequence[pb.Model]]
"""By frontend, without those that do not answer."""


async def model_lists(frontends: Sequence[worker_pb2.Frontend], tls: Tls | None) -> Lists:
    """The models of each frontend that answers."""

    async def ask(frontend: worker_pb2.Frontend) -> Sequence[pb.Model] | None:
        try:
            return await calls.list_models(frontend.address, tls=tls)
        except TandemError:
            return None

    answers = await asyncio.gather(*map(ask, frontends))
    return {
        frontend.frontend_id: models for frontend, models in zip(frontends, answers, strict=True) if models is not None
    }


def rows(lists: Lists) -> list[tuple[str, ...]]:
    """A row for each model, ordered by name."""
    by_name: dict[str, dict[str, pb.Model]] = {}
    for frontend_id, models in lists.items():
        for model in models:
            by_name.setdefault(model.name, {})[frontend_id] = model
    return [_row(name, by_name[name]) for name in sorted(by_name)]


def as_json(lists: Lists) -> list[dict[str, Any]]:
    """One entry for each model of each frontend."""
    return [
        {"frontend_id": frontend_id, **MessageToDict(model, preserving_proto_field_name=True)}
        for frontend_id, models in lists.items()
        for model in models
    ]


def _row(name: str, of: Mapping[str, pb.Model]) -> tuple[str, ...]:
    worst = max(of, key=lambda frontend_id: (of[frontend_id].state == pb.MODEL_STATE_REFUSED, of[frontend_id].problem))
    model, states = of[worst], {each.state for each in of.values()}
    state = _state(model.state) + (f", adapter of {model.parent}" if model.parent else "")
    if model.problem:
        where = f" by {worst}" if len(states) > 1 else ""
        state = f"{state}{where}: {model.problem}"
    elif pb.MODEL_STATE_LOADING in states:
        state = "loading"
    if model.task == MODEL_TASK_EMBED:
        state = f"{state}, embeds"
    counts = (model.context_tokens_max, model.prefill_workers, model.decode_workers, model.aggregated_workers)
    return name, *map(str, counts), " ".join(model.aliases) or "-", state


def _state(number: int) -> str:
    # A frontend of a release before this field serves what it lists.
    return pb.ModelState.Name(number or pb.MODEL_STATE_SERVING).removeprefix("MODEL_STATE_").lower()  # type: ignore[arg-type]
