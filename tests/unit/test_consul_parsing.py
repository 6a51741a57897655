"""Parsing Consul's responses: unchanged instances are not parsed again, and the layout of the JSON does not matter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tandem_registry.backends.consul import parsing, records
from tandem_registry.backends.consul.parsing import NEXT, ResponseReader
from tandem_registry.backends.consul.snapshot import observed_of
from tandem_registry.view import Health

from tandem.domain.worker import WorkerState
from tandem.errors import ServiceError
from tests.unit.support.consul_entries import answer_of, body_of, instance, make_entry, registry_entry
from tests.unit.support.registry_workers import make_worker


def make_answer(count: int = 5) -> list[dict[str, Any]]:
    return [instance(registry_entry("one")), *(instance(make_entry(make_worker(f"w{n}"))) for n in range(count))]


def test_an_unchanged_instance_is_the_same_entry_and_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    honest = records.record_of

    def counted(address: str, port: int, written: Any) -> Any:
        reads.append(written["id"])
        return honest(address, port, written)

    monkeypatch.setattr(parsing, "record_of", counted)
    reader = ResponseReader()
    found = [make_entry(make_worker(name)) for name in "abc"]
    first = reader.entries(answer_of(found))
    assert reads == ["a", "b", "c"]
    found[1] = make_entry(make_worker("b", state=WorkerState.DRAINING))
    second = reader.entries(answer_of(found))
    assert reads == ["a", "b", "c", "b"]
    assert second == found
    assert second[0] is first[0]
    assert second[2] is first[2]
    assert reader.entries(answer_of(found[2:])) == found[2:]
    assert reads == ["a", "b", "c", "b"], (
        "the last of an answer and the first of one have the same text as those between"
    )


def test_an_instance_that_is_gone_is_not_kept() -> None:
    reader = ResponseReader()
    found = [make_entry(make_worker(name)) for name in "ab"]
    (first, _) = reader.entries(answer_of(found))
    assert reader.entries(answer_of(found[1:])) == found[1:]
    (again, _) = reader.entries(answer_of(found))
    assert again == first
    assert again is not first


@pytest.mark.parametrize("layout", [{}, {"indent": 4}, {"separators": (",", ":"), "sort_keys": True}])
def test_the_layout_of_the_json_means_nothing(layout: dict[str, Any]) -> None:
    answer = make_answer()
    reader = ResponseReader()
    expected = reader.entries(body_of(answer))
    assert len(expected) == 6
    assert reader.entries(json.dumps(answer, **layout).encode()) == expected
    assert reader.entries(body_of(answer)) == expected


@pytest.mark.parametrize(
    "text", [NEXT.decode(), '"' + NEXT.decode(), "\\" + NEXT.decode(), '}]},{"Node":{"Node":"n"}}]']
)
def test_no_text_of_an_entry_is_taken_for_the_end_of_it(text: str) -> None:
    """Words of checks and of meta are any service's."""
    answer = make_answer(3)
    answer[2]["Service"]["Meta"]["release"] = text
    for check in answer[1]["Checks"]:
        check["Output"] = text
    expected = [entry for one in answer for entry in ResponseReader().entries(body_of([one]))]
    assert len(expected) == 4
    assert expected[2].record.member.release == text
    assert ResponseReader().entries(body_of(answer)) == expected


def test_an_entry_that_cannot_be_read_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    answer = make_answer(2)
    del answer[1]["Service"]["Meta"]["epoch"]
    reader = ResponseReader()
    for _ in range(3):
        assert len(reader.entries(body_of(answer))) == 2
    assert len(caplog.records) == 1
    assert "epoch" in caplog.text


@pytest.mark.parametrize("body", [b"[]", b"[]\n"])
def test_an_empty_list_has_no_entries(body: bytes) -> None:
    reader = ResponseReader()
    reader.entries(body_of(make_answer()))
    assert reader.entries(body) == []


@pytest.mark.parametrize("body", [b"", b"null", b"[{}]", b"<html>", b'{"Node":1}', body_of(make_answer())[:-9] + b"}]"])
def test_a_body_that_consul_cannot_have_sent_is_a_consul_error(body: bytes) -> None:
    with pytest.raises(ServiceError, match="could not parse"):
        ResponseReader().entries(body)


def test_a_check_that_an_agent_has_not_made_yet_says_nothing() -> None:
    """A restarted agent calls everything critical until it has looked."""
    answer = instance(make_entry(make_worker(), health=Health.CRITICAL))
    (own,) = [check for check in answer["Checks"] if check["ServiceID"]]
    assert _workers(answer) == 0
    own["Output"] = ""
    assert _workers(answer) == 1
    own["Notes"] = "maintenance"
    assert _workers(answer) == 0


def _workers(answer: dict[str, Any]) -> int:
    return len(observed_of(1, ResponseReader().entries(body_of([answer]))).view("g").workers)
