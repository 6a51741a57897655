"""What two models of one frontend share, and what they must not: open requests, workers, routes and settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.config import CONTEXT_TOKENS, EVERY_MODEL, FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.model_fleet import ModelFleet
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.policy import RoutingRequest
from typer.testing import CliRunner

from tandem import config
from tandem.cli import checks
from tandem.cli.app import app
from tandem.cli.checks import named_models
from tandem.cli.state import DEMO_MODEL
from tandem.clock import monotonic
from tandem.domain.worker import EngineLoad, WorkerState
from tandem.errors import ConfigError, NoWorkers, Overloaded
from tests.unit.test_model_catalog import Unlimited, of, view

MODELS = ("a", "b")


def admissions(open_max: int, *models: str) -> dict[str, Admission]:
    requests = OpenRequests(open_max, monotonic)
    for _ in models:
        requests.add_model()
    return {name: Admission(requests, Unlimited(), monotonic, model=name) for name in models}


def opened(admission: Admission, stack: contextlib.ExitStack, wanted: int) -> int:
    """How many of so many requests are admitted; they stay open."""
    for count in range(wanted):
        try:
            stack.enter_context(admission.admit())
        except Overloaded:
            return count
    return wanted


async def test_one_of_two_models_does_not_fill_the_frontend() -> None:
    first, second = admissions(100, *MODELS).values()
    with contextlib.ExitStack() as stack:
        assert opened(first, stack, 200) == 75
        with pytest.raises(Overloaded, match="75 requests of model a are open") as refused, first.admit():
            pass
        assert refused.value.retry_delay_s is not None
        assert refused.value.metadata["limit"] == "model_share"
        assert opened(second, stack, 200) == 18, "and what is free has to do for a third one too"
        assert (first.open_count, second.open_count, first.requests.open_count) == (75, 18, 93)


async def test_a_model_alone_may_fill_the_frontend() -> None:
    (only,) = admissions(100, "a").values()
    with contextlib.ExitStack() as stack:
        assert opened(only, stack, 200) == 100


async def test_a_model_that_has_ended_leaves_all_to_the_other() -> None:
    first, second = admissions(100, *MODELS).values()
    first.requests.remove_model()
    with contextlib.ExitStack() as stack:
        assert opened(second, stack, 200) == 100
    assert first.open_count == 0


class Scene:
    """A fleet with two models."""

    def __init__(self, **settings: Any) -> None:
        chosen = FrontendConfig(registry=("127.0.0.1:1",), **settings)
        self.fleet = Fleet(chosen, "frontend-0")
        self.changes = dict.fromkeys(MODELS, 0)
        self.capacities = {name: Capacity(name) for name in MODELS}
        self.models = {name: self._model(name, chosen) for name in MODELS}

    def _model(self, name: str, chosen: FrontendConfig) -> ModelFleet:
        def note_change() -> None:
            self.changes[name] += 1

        model = ServedModel(name, cast("Any", SimpleNamespace(digest="t")), {})
        backlog = PrefillBacklog(name, math.inf)
        return ModelFleet(chosen, model, self.fleet.access, (self.capacities[name],), backlog, note_change)

    @contextlib.asynccontextmanager
    async def live(self) -> Any:
        async with self.fleet.connected(), contextlib.AsyncExitStack() as stack:
            for model in self.models.values():
                await stack.enter_async_context(self.fleet.following(model))
            yield

    def route(self, name: str) -> set[str]:
        return {worker.worker_id for worker in self.models[name].routes.first(RoutingRequest(8)).workers}


async def test_each_model_routes_to_its_own_workers_and_sees_no_change_of_the_other() -> None:
    scene = Scene()
    async with scene.live():
        a, b = of("a"), of("b")
        scene.fleet.follow(view(a, b))
        assert [scene.route(name) for name in MODELS] == [{"a-p", "a-d"}, {"b-p", "b-d"}]
        seen, before = scene.models["b"].workers(), dict(scene.changes)
        scene.fleet.follow(view([replace(worker, state=WorkerState.DRAINING) for worker in a], b))
        assert scene.models["b"].workers() is seen
        assert scene.changes == {"a": before["a"] + 1, "b": before["b"]}
        with pytest.raises(NoWorkers, match="no worker serves model a now"):
            scene.route("a")
        assert scene.route("b") == {"b-p", "b-d"}


async def test_a_load_report_reaches_the_model_of_its_worker_only() -> None:
    scene = Scene()
    async with scene.live():
        a, b = of("a"), of("b")
        scene.fleet.follow(view(a, b))
        before = dict(scene.changes)
        scene.fleet.note_load(a[1].start, EngineLoad(running_requests=10, kv_used_tokens=10**9))
        assert scene.changes == {"a": before["a"] + 1, "b": before["b"]}
        assert [scene.capacities[name].fits(6, 0, 1) for name in MODELS] == [False, True]
        scene.fleet.follow(b)
        scene.fleet.note_load(a[1].start, None)
        assert scene.capacities["b"].fits(6, 0, 1)


async def test_the_room_for_cached_blocks_is_divided_among_models() -> None:
    scene = Scene(prefix_blocks_max=1_000)
    first, second = (model.prefixes for model in scene.models.values())
    assert first is not None
    assert second is not None
    async with scene.fleet.connected(), scene.fleet.following(scene.models["a"]):
        assert first.blocks_max == 1_000
        async with scene.fleet.following(scene.models["b"]):
            assert (first.blocks_max, second.blocks_max) == (500, 500)
        assert first.blocks_max == 1_000


async def test_a_model_that_is_added_has_the_workers_of_the_present_view(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, workers = Scene(), of("a")
    async with scene.fleet.connected():
        monkeypatch.setattr(scene.fleet.watch, "workers", lambda: workers)
        async with scene.fleet.following(scene.models["a"]):
            assert scene.route("a") == {"a-p", "a-d"}
        assert scene.fleet.models == []


def loaded(*flags: str) -> FrontendConfig:
    return config.load(FrontendConfig, "tandem-frontend", ["--registry", "a:1", *flags], {})


def test_aliases_and_parsers_are_read_by_model() -> None:
    own = loaded("--model", "models/tandem-demo", "--tool-parser", "qwen25", "--model-aliases", "x=a, y=b/c")
    assert own.naming_rules.aliases == {"x": "a", "y": "b/c"}
    assert [own.parser_of("tool_parser", name) for name in ("tandem-demo", "a")] == ["qwen25", None]
    assert (own.registered_name, own.naming_rules.default) == ("tandem-demo", None)
    without = loaded("--tool-parser", "qwen25", "--reasoning-parser", "a=qwen3,b=glm45")
    assert [without.parser_of("tool_parser", name) for name in MODELS] == ["qwen25", "qwen25"]
    assert [without.parser_of("reasoning_parser", name) for name in ("a", "b", "c")] == ["qwen3", "glm45", None]
    assert (without.registered_name, without.served_name) == (EVERY_MODEL, None)
    assert without.request_bytes() == 2**20 + 16 * CONTEXT_TOKENS


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--model-aliases", "x"), "model_aliases"),
        (("--model-aliases", "x="), "model_aliases"),
        (("--model-aliases", "x=a,x=b"), "model_aliases"),
        (("--model-aliases", f"x={'a' * 129}"), "model_aliases"),
        (("--tool-parser", "a=,b=c"), "tool_parser"),
        (("--model-name", "a"), "model_name"),
        (("--models-max", "0"), "models_max"),
        (("--model-linger-s", "-1"), "model_linger_s"),
    ],
)
def test_a_malformed_setting_of_models_is_named(flags: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        loaded(*flags)
    assert wrong.value.key == key


def test_the_models_of_up_have_a_name_each() -> None:
    assert named_models(["models/tandem-demo"], None)["model_name"] == "tandem-demo"
    assert named_models(["d/x=y"], "other") == {"model": Path("d/x=y"), "model_name": "other"}
    two = named_models(["a=d/one", "d/two"], None)
    assert two == {"model": Path("d/one"), "model_name": "a", "more_models": {"two": Path("d/two")}}
    both = named_models(["a=d/one"], None, ["d/two"])
    assert both == {
        "model": Path("d/one"),
        "model_name": "a",
        "more_models": {},
        "embedding_models": {"two": Path("d/two")},
    }
    with pytest.raises(ConfigError, match="'one' is given twice") as twice:
        named_models(["d/one"], None, ["e/one"])
    assert twice.value.key == "embedding_model"
    for given, model_name, key in (
        (["d/one", "e/one"], None, "model"),
        (["=d"], None, "model"),
        (["a="], None, "model"),
        (["a=d", "b=e"], "c", "model_name"),
    ):
        with pytest.raises(ConfigError) as wrong:
            named_models(given, model_name)
        assert wrong.value.key == key


@pytest.mark.parametrize(
    ("line", "models"),
    [
        ('model = "models/x"', ["models/x"]),
        ('model = ["a=models/x", "b=models/y"]', ["a=models/x", "b=models/y"]),
        ("", [str(DEMO_MODEL)]),
    ],
)
def test_a_file_of_up_has_one_model_or_a_list(
    line: str, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []

    def stop(given: Sequence[str], model_name: str | None, embedding: Sequence[str]) -> dict[str, Any]:
        seen.append(given)
        raise ConfigError("model", "is seen")

    monkeypatch.setattr(checks, "named_models", stop)
    (tmp_path / "up.toml").write_text(line)
    shown = CliRunner().invoke(app, ["up", "--config", str(tmp_path / "up.toml")])
    assert (seen, shown.exit_code) == ([models], ConfigError.exit_status), shown.output


@pytest.mark.parametrize("line", ["model = []", "model = [1, true]", "model = [[1]]"])
def test_a_file_of_up_with_no_model_is_refused_by_name(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "up.toml").write_text(line)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["up", "--config", "up.toml"])
    assert shown.exit_code == ConfigError.exit_status
    assert "line 1: model must be texts" in shown.output
