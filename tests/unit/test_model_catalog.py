"""The catalog of models: when a model is loaded, refused and ended, and which one a name means. Opening is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.adapter_fleets import AdapterFleets
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.models.adapters import AdapterPipelines
from tandem_frontend.models.catalog import LOADING_WAIT_S, RETRY_S, START_WAIT_S, ModelCatalog
from tandem_frontend.models.listing import listed_as
from tandem_frontend.models.model_pipeline import ModelPipeline
from tandem_frontend.models.naming_rules import NamingRules
from tandem_frontend.models.opening import OpenedModel
from tandem_frontend.preparation.served_model import ServedModel

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest, ModelNotFound, NotSupported, NoWorkers, ServiceError, StartError, TandemError
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.frontend_workers import decode, prefill

LINGER_S = 60.0
LOAD_S = 1.0


class Unlimited:
    """Room for every request."""

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        return prompt_tokens + answer_tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        return True


class Unrouted:
    """The execution of an adapter's requests, on workers that are not there."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.routes = self

    def follow(self, workers: tuple[Worker, ...]) -> None:
        pass

    def problem(self) -> TandemError:
        return NoWorkers("no worker", role="any")


def of(model: str, *workers: Worker, tokenizer: str = "t") -> tuple[Worker, ...]:
    """A pair of workers of a model, or these workers as its own."""
    given = workers or (prefill(f"{model}-p"), decode(f"{model}-d"))
    return tuple(
        replace(one, capabilities=replace(one.capabilities, model=model, tokenizer_digest=tokenizer)) for one in given
    )


@dataclass
class Stage:
    """A catalog, and what it has opened."""

    rules: NamingRules = field(default_factory=NamingRules)
    fails: dict[str, Exception] = field(default_factory=dict)
    """By model."""
    load_s: float = LOAD_S
    opened: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    reported: list[bool] = field(default_factory=list)
    unknown_count: int = 0
    fleets: list[AdapterFleets] = field(default_factory=list)

    def forget_adapters(self) -> None:
        for fleets in self.fleets:
            fleets.follow(())

    def __post_init__(self) -> None:
        self.requests = OpenRequests(100, asyncio.get_running_loop().time)
        self.catalog = ModelCatalog(
            self._open, self.requests, self.rules, LINGER_S, self.reported.append, self._note_unknown
        )  # fmt: skip

    def _note_unknown(self) -> None:
        self.unknown_count += 1

    @asynccontextmanager
    async def _open(self, name: str, workers: Sequence[Worker]) -> AsyncIterator[OpenedModel]:
        self.opened.append(name)
        await asyncio.sleep(self.load_s)
        if name in self.fails:
            raise self.fails[name]
        digest = workers[0].capabilities.tokenizer_digest if workers else "t"
        tokenizer = SimpleNamespace(digest=digest, chat_template=None, context_tokens_max=64)
        admission = Admission(self.requests, Unlimited(), asyncio.get_running_loop().time, model=name)
        pipeline = ModelPipeline(
            ServedModel(name, cast("Any", tokenizer), {}), cast("Any", self), lambda: (), None, cast("Any", self)
        )
        try:
            fleets = AdapterFleets(lambda view: cast("Any", Unrouted()))
            fleets.follow(tuple(workers))
            self.fleets.append(fleets)
            yield OpenedModel(pipeline, admission, cast("Any", None), AdapterPipelines(pipeline, fleets))
        finally:
            self.closed.append(name)

    async def found(self, name: str | None) -> str:
        return (await self.catalog.find(name)).model.name

    def with_routes(self, model: ServedModel, attempts: object) -> Any:
        """As of a pipeline."""
        return None

    def states(self) -> dict[str, int]:
        return {model.name: model.state for model in self.catalog.listed()}


def staged(live: Callable[[Stage], Awaitable[None]], **more: Any) -> None:
    """Run a test on virtual time, with a stage that is closed at its end."""

    async def run() -> None:
        stage = Stage(**more)
        try:
            await live(stage)
        finally:
            await stage.catalog.close()

    run_virtually(run())


def view(*models: Iterable[Worker]) -> tuple[Worker, ...]:
    return tuple(worker for workers in models for worker in workers)


def test_a_model_is_loaded_when_its_first_worker_appears_and_requests_wait_for_it() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        assert stage.states() == {"a": pb.MODEL_STATE_LOADING}
        begin_s = asyncio.get_running_loop().time()
        assert await stage.found("a") == await stage.found(None) == "a"
        assert asyncio.get_running_loop().time() - begin_s == pytest.approx(LOAD_S)
        stage.catalog.follow(view(of("a"), of("b")))
        assert await stage.found("b") == "b"
        assert stage.states() == dict.fromkeys("ab", pb.MODEL_STATE_SERVING)
        assert stage.opened == ["a", "b"], "a model is loaded once"

    staged(live)


def test_a_request_waits_for_a_model_that_loads_for_ever_only_so_long() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        begin_s = asyncio.get_running_loop().time()
        await stage.catalog.wait_settled()
        assert asyncio.get_running_loop().time() - begin_s == pytest.approx(START_WAIT_S)
        with pytest.raises(NoWorkers, match="still loads model a"):
            await stage.found("a")
        assert asyncio.get_running_loop().time() - begin_s == pytest.approx(START_WAIT_S + LOADING_WAIT_S)

    staged(live, load_s=1e6)


def test_a_model_without_workers_ends_after_the_linger_and_is_not_found_then() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(of("a"), of("b")))
        await stage.found("a")
        stage.catalog.follow(of("b"))
        await asyncio.sleep(LINGER_S - 1)
        assert await stage.found("a") == "a", "its workers may all be restarted: routing refuses as retryable"
        assert "a" not in stage.states()
        await asyncio.sleep(2)
        with pytest.raises(ModelNotFound, match=r"'a' not found; this frontend serves 'b'") as refused:
            await stage.found("a")
        assert refused.value.metadata["model"] == "a"
        assert (stage.closed, stage.unknown_count) == (["a"], 1)
        stage.catalog.follow(view(of("a"), of("b")))
        assert await stage.found("a") == "a"

    staged(live)


def test_a_model_whose_workers_are_restarted_in_time_is_not_loaded_again() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await stage.found("a")
        for _ in range(3):
            stage.catalog.follow(())
            await asyncio.sleep(LINGER_S / 2)
            stage.catalog.follow(of("a"))
            await asyncio.sleep(LINGER_S / 2 + 1)
        assert (stage.opened, stage.closed) == (["a"], [])

    staged(live)


def test_open_requests_of_a_model_end_before_its_tokenizer_goes() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await stage.found("a")
        with stage.catalog.opened[0].admission.admit():
            stage.catalog.follow(())
            await asyncio.sleep(2 * LINGER_S)
            with pytest.raises(ModelNotFound, match="'a' is not served by this frontend: its workers have left"):
                await stage.found("a")
            assert stage.closed == []
            stage.catalog.follow(of("a"))
            with pytest.raises(NoWorkers, match="loads model a again"):
                await stage.found("a")
        await asyncio.sleep(2 * LOAD_S)
        assert (stage.closed, await stage.found("a"), stage.opened) == (["a"], "a", ["a", "a"])

    staged(live)


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason_until_other_workers_come() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(of("bad"), of("good")))
        await stage.catalog.wait_settled()
        assert stage.states() == {"bad": pb.MODEL_STATE_REFUSED, "good": pb.MODEL_STATE_SERVING}
        assert listed_as(stage.catalog.listed(), "bad").problem == "tokenizer.json is damaged"
        with pytest.raises(ModelNotFound, match="'bad' is not served"):
            await stage.found("bad")
        assert await stage.found(None) == "good", "one that is refused is no choice"
        stage.catalog.follow(view(of("bad"), of("good")))
        await asyncio.sleep(10 * RETRY_S)
        assert stage.opened.count("bad") == 1, "the same workers have the same files"
        stage.fails.clear()
        stage.catalog.follow(view(of("bad"), of("bad", prefill("another")), of("good")))
        assert await stage.found("bad") == "bad"
        assert stage.closed == []

    staged(live, fails={"bad": StartError("tokenizer.json is damaged")})


def test_a_model_whose_workers_cannot_be_asked_is_loaded_again_later() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await stage.catalog.wait_settled()
        assert stage.states() == {"a": pb.MODEL_STATE_REFUSED}
        stage.fails.clear()
        await asyncio.sleep(RETRY_S + 2 * LOAD_S)
        assert stage.states() == {"a": pb.MODEL_STATE_SERVING}
        assert stage.reported[-1] is True

    staged(live, fails={"a": ServiceError("no answer")})


def test_one_model_too_many_is_refused_until_another_has_ended() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(of("a"), of("b"), of("c")))
        await stage.catalog.wait_settled()
        assert stage.states() == {"a": 2, "b": 2, "c": pb.MODEL_STATE_REFUSED}
        assert "models_max" in listed_as(stage.catalog.listed(), "c").problem
        assert stage.opened == ["a", "b"], "its tokenizer is not in memory"
        stage.catalog.follow(view(of("b"), of("c")))
        await asyncio.sleep(LINGER_S + 2 * LOAD_S)
        assert stage.states() == {"b": 2, "c": 2}

    staged(live, rules=NamingRules(models_max=2))


def test_a_model_with_another_tokenizer_is_loaded_again() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await stage.found("a")
        stage.catalog.follow(view(of("a"), of("a", prefill("new"), tokenizer="u")))
        await asyncio.sleep(2 * LOAD_S)
        assert stage.opened == ["a"], "workers of both are there while they are replaced"
        stage.catalog.follow(of("a", prefill("new"), tokenizer="u"))
        await asyncio.sleep(2 * LOAD_S)
        assert (await stage.catalog.find("a")).model.tokenizer.digest == "u"
        assert stage.closed == ["a"]

    staged(live)


def test_names_aliases_and_the_default() -> None:
    async def live(stage: Stage) -> None:
        assert [await _refusal(stage, name) for name in (None, "x")] == [NoWorkers, ModelNotFound]
        stage.catalog.follow(view(of("a"), of("b"), of("shadow")))
        assert [await stage.found(name) for name in ("a", "alias", "shadow")] == ["a", "a", "shadow"]
        assert [*listed_as(stage.catalog.listed(), "alias").aliases] == ["alias"]
        assert [*listed_as(stage.catalog.listed(), "b").aliases] == [], "a model of that name comes first"
        with pytest.raises(InvalidRequest, match="model: must be given: this frontend serves 'a', 'b', 'shadow'"):
            await stage.found(None)
        assert await _refusal(stage, "dangling") is ModelNotFound
        assert await _refusal(stage, "x" * 129) is InvalidRequest
        with pytest.raises(ModelNotFound):
            listed_as(stage.catalog.listed(), "dangling")

    staged(live, rules=NamingRules(aliases={"alias": "a", "shadow": "b", "dangling": "none"}))

    async def by_default(stage: Stage) -> None:
        stage.catalog.follow(view(of("a"), of("b")))
        assert (await stage.found(None), await stage.found("b")) == ("a", "b")

    staged(by_default, rules=NamingRules(aliases={"usual": "a"}, default="usual"))


async def _refusal(stage: Stage, name: str | None) -> type[Exception] | None:
    try:
        await stage.found(name)
    except TandemError as problem:
        return type(problem)
    return None


def test_a_model_of_the_frontends_own_stays_without_a_worker() -> None:
    async def live(stage: Stage) -> None:
        await stage.catalog.keep("own")
        assert stage.reported[-1] is False
        stage.catalog.follow(of("own"))
        assert stage.reported[-1] is True
        stage.catalog.follow(())
        await asyncio.sleep(10 * LINGER_S)
        assert (await stage.found("own"), await stage.found(None), stage.closed) == ("own", "own", [])
        stage.catalog.follow(of("other"))
        await stage.catalog.wait_settled()
        assert await stage.found(None) == "other", "the only one that has workers"

    staged(live)


def test_an_own_model_that_cannot_be_served_ends_the_start() -> None:
    async def live(stage: Stage) -> None:
        with pytest.raises(StartError, match="no such parser"):
            await stage.catalog.keep("own")

    staged(live, fails={"own": StartError("no such parser")})


def test_many_models_beyond_the_room_are_refused_once_and_served_when_there_is_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def live(stage: Stage) -> None:
        names = [f"m{number:03}" for number in range(300)]
        stage.catalog.follow(view(*map(of, names)))
        await asyncio.sleep(2 * LOAD_S)
        served = [name for name, state in stage.states().items() if state == pb.MODEL_STATE_SERVING]
        assert served == stage.opened == names[:2]
        for gone in range(0, 40, 2):
            stage.catalog.follow(view(*map(of, names[gone + 2 :])))
            await asyncio.sleep(LINGER_S + 2 * LOAD_S)
        assert len(stage.opened) == 42, "each place was given once"

    staged(live, rules=NamingRules(models_max=2))
    assert len([record for record in caplog.records if "not served" in record.getMessage()]) == 1


def test_models_that_fail_give_their_places_to_others_and_are_asked_less_and_less() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(of("a"), of("b")))
        await asyncio.sleep(2 * LOAD_S + 0.1)
        assert stage.states() == {"a": pb.MODEL_STATE_REFUSED, "b": pb.MODEL_STATE_SERVING}
        await asyncio.sleep(100 * RETRY_S)
        assert stage.opened == ["a", "b"], "there is no room for it"

    staged(live, rules=NamingRules(models_max=1), fails={"a": ServiceError("no answer")})

    async def alone(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await asyncio.sleep(31 * RETRY_S)
        assert len(stage.opened) == 5

    staged(alone, fails={"a": ServiceError("no answer")})


def test_a_model_whose_files_break_something_unexpected_is_refused_and_forgotten_with_its_workers() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        await asyncio.sleep(2 * LOAD_S)
        assert stage.states() == {"a": pb.MODEL_STATE_REFUSED}
        with pytest.raises(ModelNotFound):
            await stage.found("a")
        stage.catalog.follow(())
        stage.fails.clear()
        stage.catalog.follow(of("a"))
        assert await stage.found("a") == "a"

    staged(live, fails={"a": RecursionError()})


def test_a_refused_model_is_tried_again_when_a_worker_has_left() -> None:
    async def live(stage: Stage) -> None:
        first, second = of("a")
        stage.catalog.follow((first, second))
        await asyncio.sleep(2 * LOAD_S)
        stage.fails.clear()
        stage.catalog.follow((second,))
        assert await stage.found("a") == "a"

    staged(live, fails={"a": StartError("damaged")})


def test_a_model_whose_workers_leave_while_it_fails_to_load_keeps_no_place() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(of("a"))
        stage.catalog.follow(())
        await asyncio.sleep(10 * LINGER_S)
        stage.fails.clear()
        stage.load_s = LOAD_S
        stage.catalog.follow(of("a"))
        assert await stage.found("a") == "a"

    for load_s in (LOAD_S, 2 * LINGER_S):
        staged(live, fails={"a": StartError("damaged")}, load_s=load_s)


def test_a_refused_model_takes_no_alias_away() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(of("good"), of("other")))
        await asyncio.sleep(2 * LOAD_S)
        assert await stage.found("other") == "good"

    staged(live, rules=NamingRules(aliases={"other": "good"}), fails={"other": StartError("damaged")})


STORY = Adapter("story", "1" * 64)


def with_story(model: str) -> tuple[Worker, ...]:
    return tuple(replace(worker, adapters=(STORY,)) for worker in of(model))


def test_an_adapter_is_found_by_its_name_and_its_alias_once_its_model_is_loaded() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(with_story("a"))
        assert await stage.found("story") == await stage.found("nickname") == "story"
        pipeline = await stage.catalog.find("story")
        assert (pipeline.model.parent, pipeline.model.engine_name) == ("a", "a")
        assert await stage.catalog.find("story") is pipeline, "endpoints are kept by it"
        (model, listed) = stage.catalog.listed()
        assert (model.name, listed.name, listed.parent, [*listed.aliases]) == ("a", "story", "a", ["nickname"])
        assert listed.state == pb.MODEL_STATE_REFUSED, "the scripted fleet has no route"
        stage.catalog.follow(of("a"))
        stage.forget_adapters()
        for name in ("story", "nickname"):
            with pytest.raises(ModelNotFound, match=f"{name!r} not found; this frontend serves 'a'"):
                await stage.found(name)
        assert stage.unknown_count == 2

    staged(live, rules=NamingRules(aliases={"nickname": "story"}))


def test_an_adapter_has_not_the_embeddings_of_its_model() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(with_story("a"))
        assert (await stage.catalog.find("a")).embedding() is cast("Any", stage)
        adapter = await stage.catalog.find("story")
        with pytest.raises(NotSupported, match="story is an adapter, and adapters compute no embeddings"):
            adapter.embedding()

    staged(live)


def test_an_alias_comes_before_an_adapter_of_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def live(stage: Stage) -> None:
        for _ in range(2):
            stage.catalog.follow(with_story("a"))
        assert await stage.found("story") == "a"
        (listed,) = stage.catalog.listed()
        assert (listed.name, [*listed.aliases]) == ("a", ["story"])

    staged(live, rules=NamingRules(aliases={"story": "a"}))
    logged = [record.getMessage() for record in caplog.records if "alias" in record.getMessage()]
    assert logged == ["adapter story cannot be requested here: its name is an alias of a"]

    async def of_itself(stage: Stage) -> None:
        stage.catalog.follow(with_story("a"))
        assert await stage.found("story") == "story"

    staged(of_itself, rules=NamingRules(aliases={"story": "story"}))


def test_a_model_comes_before_an_adapter_of_its_name() -> None:
    async def live(stage: Stage) -> None:
        stage.catalog.follow(view(with_story("a"), of("story")))
        assert (await stage.catalog.find("story")).model.parent is None
        assert [model.name for model in stage.catalog.listed()] == ["a", "story"]

    staged(live)
