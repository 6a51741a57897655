"""How `tandem status` merges and prints the responses of several registries."""

from __future__ import annotations

import time

import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as frontend_pb
from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.cli import model_status, status
from tandem.cli.membership import ask_all
from tandem.client import calls
from tandem.errors import StartError, TandemError


def view(replica: str, revision: int, *, live: bool = True, ages: dict[str, float | None]) -> pb.ListResponse:
    listed = pb.ListResponse(registry_id="one", replica_id=replica, revision=revision)
    listed.source = pb.VIEW_SOURCE_LIVE if live else pb.VIEW_SOURCE_LAST_KNOWN
    listed.source_since.FromNanoseconds(time.time_ns() - 17_000_000_000)
    for worker_id, age_s in ages.items():
        entry = listed.workers.add(lease_keeper="b", health=pb.LISTED_HEALTH_PASSING)
        entry.worker.worker_id, entry.worker.epoch = worker_id, 7
        if age_s is not None:
            entry.lease_age.FromMilliseconds(int(age_s * 1e3))
    return listed


@pytest.fixture
def responses(monkeypatch: pytest.MonkeyPatch) -> dict[str, pb.ListResponse | TandemError]:
    found: dict[str, pb.ListResponse | TandemError] = {}

    async def list_members(address: str, *, tls: object) -> pb.ListResponse:
        response = found[address]
        if isinstance(response, TandemError):
            raise response
        return response

    monkeypatch.setattr(calls, "list_members", list_members)
    return found


async def test_a_lease_age_comes_from_the_lease_holder(
    responses: dict[str, pb.ListResponse | TandemError],
) -> None:
    responses["a:1"] = view("a", 9, ages={"w": None, "x": None})
    responses["b:1"] = view("b", 8, ages={"w": 0.4, "gone": 3.0})
    fleet = await ask_all(["a:1", "b:1"], None)
    assert status._leases(fleet) == [("w", "0.4 s", "7", "passing", "b:1"), ("x", "-", "7", "passing", "b:1")]


async def test_a_live_view_is_preferred_to_a_later_last_known_one(
    responses: dict[str, pb.ListResponse | TandemError],
) -> None:
    responses["a:1"] = view("a", 9, live=False, ages={"old": 60.0})
    responses["b:1"] = view("b", 3, ages={"new": 0.1})
    responses["c:1"] = StartError("connection refused")
    fleet = await ask_all(["a:1", "b:1", "c:1"], None)
    assert [entry.worker.worker_id for entry in fleet.workers] == ["new"]
    last_known, live, dead = (status._registry(response) for response in fleet.responses)
    assert live == ("b:1", "3", "live")
    assert dead == ("c:1", "-", "unreachable: connection refused")
    assert last_known[:2] == ("a:1", "9")
    assert last_known[2].startswith("last known since ")
    assert last_known[2].endswith(", 17 s ago")
    as_json = status._as_json(fleet, [None])
    assert [registry.get("source") for registry in as_json["registries"]] == [
        "VIEW_SOURCE_LAST_KNOWN",
        "VIEW_SOURCE_LIVE",
        None,
    ]
    assert as_json["registries"][2] == {"address": "c:1", "problem": "connection refused"}


async def test_the_first_error_is_raised_when_no_registry_responds(
    responses: dict[str, pb.ListResponse | TandemError],
) -> None:
    responses["a:1"] = StartError("connection refused")
    with pytest.raises(StartError, match="connection refused"):
        await ask_all(["a:1"], None)


def test_a_model_that_one_frontend_refuses_says_which_and_why() -> None:
    served = frontend_pb.Model(name="a", context_tokens_max=64, prefill_workers=1, decode_workers=2, aliases=["x"])
    served.state = frontend_pb.MODEL_STATE_SERVING
    refused = frontend_pb.Model(name="b", state=frontend_pb.MODEL_STATE_REFUSED, problem="tokenizer.json is damaged")
    earlier, other = frontend_pb.Model(name="b"), frontend_pb.Model(name="c", state=frontend_pb.MODEL_STATE_LOADING)
    rows = model_status.rows({"frontend-0": [served, earlier, other], "frontend-1": [served, refused]})
    assert [len(row) for row in rows] == [len(model_status.COLUMNS)] * 3
    assert [(row[0], row[-1]) for row in rows] == [
        ("a", "serving"),
        ("b", "refused by frontend-1: tokenizer.json is damaged"),
        ("c", "loading"),
    ]
    assert rows[0][1:-1] == ("64", "1", "2", "0", "x")
    assert model_status.rows({"frontend-1": [refused]})[0][-1] == "refused: tokenizer.json is damaged"
    assert model_status.as_json({"f": [refused]})[0]["frontend_id"] == "f"
