"""docs/reference/errors.md: each reason of the contract has one row, with the statuses that the code gives it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def rows() -> list[tuple[str, str, str]]:
    return ROW.findall(PAGE.read_text())


def test_each_reason_has_one_row_and_no_other_has() -> None:
    assert sorted(reason for reason, _, _ in rows()) == sorted(REASONS)


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason != UNSENT])
def test_a_row_has_the_statuses_of_the_code(reason: str) -> None:
    [(_, code, http)] = [row for row in rows() if row[0] == reason]
    assert code == ERROR_BY_REASON[reason].code
    assert http == HTTP_BY_REASON.get(reason, HTTP_BY_CODE[code])
