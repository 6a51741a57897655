"""The fleet file: TOML and JSON, errors that name the field, and the workers that it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.replay.fleet_file import FleetFile, faster, parse_fleet, read_fleet

from tandem.domain.worker import WorkerRole, incompatible_field
from tandem.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAIRS: dict[str, Any] = {"prefill": {"count": 2, "cache_blocks": 30}, "decode": {"count": 1}}


def test_a_fleet_is_read_as_toml_and_as_json(tmp_path: Path) -> None:
    toml, jsonl = tmp_path / "fleet.toml", tmp_path / "fleet.json"
    toml.write_text("[prefill]\ncount = 2\ncache_blocks = 30\n[decode]\ncount = 1\n")
    jsonl.write_text(json.dumps(PAIRS))
    assert read_fleet(toml) == read_fleet(jsonl) == parse_fleet(PAIRS)


def test_its_workers_can_form_pairs_and_have_its_memory() -> None:
    workers = parse_fleet({**PAIRS, "aggregated": {"count": 1}, "block_tokens": 16}).workers()
    assert [worker.worker_id for worker in workers] == ["prefill-0", "prefill-1", "decode-0", "aggregated-0"]
    assert workers[0].capabilities.kv_capacity_tokens == 480
    assert workers[3].capabilities.kv_capacity_tokens > 2**40
    assert incompatible_field(workers[0].capabilities, workers[2].capabilities) is None
    assert [worker.role for worker in workers].count(WorkerRole.PREFILL) == 2


@pytest.mark.parametrize(
    ("change", "key", "problem"),
    [
        ({"prefil": {}}, "fleet.prefil", "is no field; fields are block_tokens, "),
        ({"prefill": {"count": 2, "caches": 1}}, "fleet.prefill.caches", "is no field; fields are count, cache_blocks"),
        ({"prefill": {"count": -1}}, "fleet.prefill.count", "must be 0 to 1024, not -1"),
        ({"prefill": {"count": "two"}}, "fleet.prefill.count", "must be a whole number, 0 to 1024, not 'two'"),
        ({"prefill": 2}, "fleet.prefill", "must be a table of fields"),
        ({"prefill": {"count": 0}}, "fleet.prefill.count", "must be at least 1: prefill and decode workers serve in"),
        ({"decode": {"count": 0}}, "fleet.decode.count", "must be at least 1: prefill and decode workers serve in"),
        ({"prefill": {}, "decode": {}}, "fleet.prefill.count", "must be at least 1, or aggregated.count"),
        ({"frontend": {"load_interval_s": 0}}, "fleet.frontend.load_interval_s", "must be above 0, at most 60, not 0"),
        ({"engine": {"speed": 1}}, "fleet.engine.speed", "is not an option of the simulated engine"),
        ({"engine": {"jitter": 2}}, "fleet.engine.jitter", "must be a number, 0 to 1"),
        ({"engine": {"profile": "none"}}, "fleet.engine.profile", "must be one of tandem-demo-cpu"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(change: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_fleet({**PAIRS, **change})
    assert refused.value.key == key
    assert problem in str(refused.value)


def test_a_file_that_is_no_fleet_is_named(tmp_path: Path) -> None:
    for name, text, problem in (
        ("a.toml", "count = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("b.json", "[1]", "must be an object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_fleet(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_fleet(tmp_path / "absent.toml")


def test_a_profile_gives_the_engines_their_times() -> None:
    options = parse_fleet({**PAIRS, "engine": {"profile": "tandem-demo-cpu"}}).options()
    assert options.prefill_tokens_per_s == 20060.0
    twice = faster(options, 2.0)
    assert (twice.prefill_tokens_per_s, twice.prefill_step_s) == (40120.0, options.prefill_step_s / 2)
    assert twice.decode_step_s == options.decode_step_s


def test_the_shipped_fleet_is_one() -> None:
    assert read_fleet(ROOT / "benchmarks/replay/eight_prefill_workers.toml").prefill.count == 8


def test_the_guide_lists_every_field() -> None:
    guide = (ROOT / "docs/guide/replay.md").read_text()
    for name, field in FleetFile.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for dotted in [f"{name}.{leaf}" for leaf in inner] if inner else [name]:
            assert f"| `{dotted}` |" in guide, dotted
