"""What `tandem up` suggests and warns of, before any process is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.up import suggestion, unknown_names
from tandem.local_cluster.cluster import ClusterSpec


def spec(engine: str = "sglang", *, second: bool = False, **frontend: str) -> ClusterSpec:
    more = {"second": Path("/m/second")} if second else {}
    return ClusterSpec(model=Path("/m/demo"), engine=engine, more_models=more, role_flags={"frontend": frontend})


def test_suggestion_on_the_simulated_engine_bounds_the_answer() -> None:
    assert "--max-tokens 40" in suggestion(spec("simulated"))
    assert "--max-tokens" not in suggestion(spec())
    assert suggestion(spec(second=True)).startswith("tandem generate --model demo ")


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({}, []),
        ({"model-aliases": "x=demo,y=second", "default-model": "second"}, []),
        ({"model-aliases": "x=demo,y=nosuch"}, ["--alias y=nosuch"]),
        ({"model-aliases": "x=nosuch", "default-model": "gone"}, ["--alias x=nosuch", "--default-model gone"]),
    ],
)
def test_names_of_no_model_are_warned_of_by_their_option(flags: dict[str, str], warned: list[str]) -> None:
    found = unknown_names(spec(second=True, **flags))
    assert [line.partition(":")[0] for line in found] == warned
    assert all("demo, second" in line for line in found)
