"""docs/reference/errors.md: each reason of the contract has one row, with the statuses that the code gives it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tandem_frontend.response.sse import event_json

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import error_pb2
from tandem.rpc.status import ERROR_BY_REASON

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
ROW = re.compile(r"^\| `([A-Z_]+)` \| ([A-Z_]*) ?\| (\d*) ?\|", re.MULTILINE)
REASONS = [name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()]  # noqa: SIM118
UNSENT = "UNSPECIFIED"
# Envoy's transcoder maps codes as googleapis does; errors.lua changes two of them.
HTTP_BY_CODE = {
    "INVALID_ARGUMENT": "400",
    "NOT_FOUND": "404",
    "ALREADY_EXISTS": "409",
    "FAILED_PRECONDITION": "503",
    "RESOURCE_EXHAUSTED": "429",
    "CANCELLED": "499",
    "INTERNAL": "500",
    "UNIMPLEMENTED": "501",
    "UNAVAILABLE": "503",
    "DEADLINE_EXCEEDED": "504",
}
HTTP_BY_REASON = {"REQUEST_TOO_LARGE": "413"}


def test_the_examples_of_the_clients_page_are_spaced_as_they_are_sent() -> None:
    """Envoy and OpenAI's bodies have no spaces; events of `generate` have those of protobuf's JSON."""
    lines = (PAGE.parents[1] / "guide" / "clients.md").read_text().splitlines()
    events = [line for line in lines if line.startswith("data: {")]
    assert len(events) == 3
    chunk = pb.GenerateChunk(index=0, text="…", token_ids=[487])
    assert event_json(chunk) == events[1].removeprefix("data: ")
    assert all(re.match(r'data: \{"\w+": \{"\w+": ', event) for event in events)
    bodies = [json.loads(line) and line for line in lines if line.startswith("{") and "…" not in line]
    assert len(bodies) == 3
    assert bodies == [json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")) for body in bodies]


def rows() -> list[tuple[str, str, str]]:
    return ROW.findall(PAGE.read_text())


def test_each_reason_has_one_row_and_no_other_has() -> None:
    assert sorted(reason for reason, _, _ in rows()) == sorted(REASONS)


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason != UNSENT])
def test_a_row_has_the_statuses_of_the_code(reason: str) -> None:
    [(_, code, http)] = [row for row in rows() if row[0] == reason]
    assert code == ERROR_BY_REASON[reason].code
    assert http == HTTP_BY_REASON.get(reason, HTTP_BY_CODE[code])
