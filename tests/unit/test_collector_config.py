"""deploy/observability/otel/collector.yml, judged without a collector: pipelines name what is there, and all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "deploy" / "observability" / "otel" / "collector.yml"
COMPOSE = Path(__file__).parents[2] / "deploy" / "compose" / "collector.yml"
KINDS = ("receivers", "processors", "exporters")


def test_pipelines_use_what_is_defined_and_all_of_it() -> None:
    config = yaml.safe_load(FILE.read_text())
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"metrics", "traces"}
    for kind in KINDS:
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == set(config[kind]), kind
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    for name, pipeline in pipelines.items():
        assert pipeline["receivers"] == ["otlp"], name
        assert pipeline["processors"][0] == "memory_limiter", "a burst is refused before it is held"


def test_the_collector_listens_for_the_protocols_of_our_processes() -> None:
    protocols = yaml.safe_load(FILE.read_text())["receivers"]["otlp"]["protocols"]
    assert protocols == {"grpc": {"endpoint": "127.0.0.1:4317"}}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As the collector merges a second --config: maps key by key, everything else replaced."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}


def test_the_collectors_compose_overrides_use_defined_parts() -> None:
    whole = merged(yaml.safe_load(FILE.read_text()), yaml.safe_load(COMPOSE.read_text()))
    pipelines = whole["service"]["pipelines"]
    for kind in KINDS:
        assert {name for pipeline in pipelines.values() for name in pipeline[kind]} <= set(whole[kind])
    assert pipelines["traces"]["exporters"] == ["otlp/traces"]
    assert whole["exporters"]["otlp/traces"] == {"endpoint": "jaeger:4317", "tls": {"insecure": True}}
