"""Adapters: the check of their files, what a registry keeps of them, and how routes of one see the fleet."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.adapter_fleets import AdapterFleets
from tandem_frontend.routing.adapter_view import AdapterView, without_adapters
from tandem_frontend.routing.pools import Pools
from tandem_registry.adapter_changes import AdapterChanges
from tandem_registry.backends.consul.records import Record, check_fits, host_and_port, meta, record_of
from tandem_registry.leases import Membership
from tandem_registry.validation import checked_worker
from tandem_registry.view import Change

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.clock import ManualClock
from tandem.domain.adapter import ADAPTERS_MAX, Adapter, is_name, read_adapter
from tandem.domain.checkpoint import shown
from tandem.domain.worker import EMBED, Worker, WorkerRole
from tandem.errors import AdapterRefused, ConfigError, IncompatibleWorkers, InvalidRequest, NoWorkers, StartError
from tandem.rpc.convert import worker_from_proto, worker_to_proto
from tandem.testing.adapters import MODULES, write_adapter
from tandem.worker.config import WorkerConfig
from tests.unit.support.frontend_workers import aggregated, decode, prefill
from tests.unit.support.registry_workers import make_worker

DEMO_MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
ONE, TWO = Adapter("story", "1" * 64), Adapter("story", "2" * 64)


def read(path: Path) -> Adapter:
    return read_adapter("story", path, DEMO_MODEL, 16, MODULES)


def having(worker: Worker, *adapters: Adapter) -> Worker:
    return replace(worker, adapters=adapters)


# --- Files


def test_a_directory_and_files_that_are_links_within_it_are_read(tmp_path: Path) -> None:
    one = read(write_adapter(tmp_path / "one", DEMO_MODEL, 1))
    weights = tmp_path / "one" / WEIGHTS
    (tmp_path / "one" / "blobs").mkdir()
    weights.symlink_to(weights.rename(tmp_path / "one" / "blobs" / "x"))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert read(tmp_path / "link") == one


def test_a_value_that_has_no_text_can_be_shown() -> None:
    assert shown(nested(100_000), repr) == shown(10**5000) == "a value that is too long or too deep"


def test_weights_in_many_files_are_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "story", DEMO_MODEL, 1)
    for number in range(8):
        (path / f"{number}.safetensors").touch()
    with pytest.raises(StartError, match="in more than 8 files"):
        read(path)


def test_the_digest_is_of_configuration_and_weights(tmp_path: Path) -> None:
    one = read(write_adapter(tmp_path / "one", DEMO_MODEL, 1))
    assert read(write_adapter(tmp_path / "same", DEMO_MODEL, 1)) == one
    assert read(write_adapter(tmp_path / "two", DEMO_MODEL, 2)) != one
    config = tmp_path / "same" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert read(tmp_path / "same") != one, "the scale is a part of it"
    assert len(one.engine_id) == 32, "SGLang finds an adapter's name by the last 32 characters of a key"
    assert one.engine_id != Adapter("other", one.digest).engine_id


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def as_pickle(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def cut(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A file of the adapter is another thing, which `make` makes."""

    def replace_file(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return replace_file


def with_header(text: str | bytes) -> Callable[[Path], None]:
    """Weights with this header."""
    header = text.encode() if isinstance(text, str) else text
    return replaced(WEIGHTS, lambda file: file.write_bytes(len(header).to_bytes(8, "little") + header))


def with_tensor(name: str, shape: str = "[8, 8]") -> Callable[[Path], None]:
    return with_header(f'{{"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}')


def linked_out(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.symlink_to(file.rename(path.parent / "elsewhere"))


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (replaced(CONFIG, os.mkfifo), "adapter_config.json is no regular file"),
        (replaced(CONFIG, Path.mkdir), "adapter_config.json is no regular file"),
        (
            replaced(CONFIG, lambda file: file.symlink_to("/dev/zero")),
            "adapter_config.json is a link to a file outside",
        ),
        (replaced(CONFIG, lambda file: file.symlink_to(file)), "adapter_config.json cannot be read: Too many levels"),
        (replaced(CONFIG, lambda file: file.write_bytes(b" " * (2**20 + 1))), "config.json is larger than 1048576"),
        (replaced(WEIGHTS, os.mkfifo), "adapter_model.safetensors is no regular file"),
        (replaced("b.safetensors", os.mkfifo), "b.safetensors is no regular file"),
        (replaced("added_tokens.json", os.mkfifo), "added_tokens.json is no regular file"),
        (replaced("model.safetensors.index.json", os.mkfifo), "index.json is no regular file"),
        (with_header(b" " * (2 * 2**20 + 1)), "model.safetensors has a header of 2097153 bytes, at most 2097152 are"),
        (with_header("[" * 100_000), "adapter_model.safetensors is damaged: its header cannot be parsed"),
        (with_tensor("x", "[1e400]"), "adapter_model.safetensors is damaged: its header cannot be parsed"),
        (with_tensor("x" * 10_000), r"its tensor x{97}\.\.\. is no part of a LoRA adapter"),
        (with_tensor(r"\ud800"), r"its tensor \\ud800 is no part of a LoRA adapter"),
        (with_tensor("a" * 200 + ".q_proj.lora_A.weight"), r"its layer a{97}\.\.\. is none of this model"),
        (with_tensor(LAYER, str([8] * 100)), r"has the shape \[(8, ){32}\.\.\., this model needs"),
        (edited(r="9" * 1000), r"not '9{96}\.\.\.$"),
        (edited(r=nested(100)), r"not \[{97}\.\.\.$"),
        (edited(target_modules=["x" * 1000]), r"target_modules has x{97}\.\.\.; this"),
        (linked_out, "adapter_model.safetensors is a link to a file outside of the adapter's directory"),
        (lambda path: (path / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (edited(peft_type="IA3"), "peft_type must be LORA"),
        (edited(use_dora=True), "use_dora is not supported"),
        (edited(use_rslora=True), "use_rslora is not supported"),
        (edited(fan_in_fan_out=True), "fan_in_fan_out is not supported"),
        (edited(alora_invocation_tokens=[1]), "alora_invocation_tokens is not supported"),
        (edited(alpha_pattern={"q_proj": 64}), "alpha_pattern is not supported: .* the same lora_alpha"),
        (edited(rank_pattern={"q_proj": 4}), "rank_pattern is not supported: .* the same r"),
        (edited(rank_pattern=["q_proj"]), "rank_pattern is not supported"),
        (edited(r=17), r"r, the rank, must be 1 to 16 \(adapter_rank_max\), not 17"),
        (edited(r=4), r"its tensor .* has the shape \[8, \d+\], this model needs \[4, \d+\]"),
        (edited(target_modules="all"), "target_modules must be a list of names"),
        (edited(target_modules=["model.lm_head"]), "target_modules has lm_head; this worker adapts q_proj, v_proj"),
        (as_pickle, "it has no weights in story/.*safetensors; other formats are not read"),
        (cut, "adapter_model.safetensors is truncated or damaged"),
    ],
)
def test_files_that_an_engine_could_not_use_are_refused(
    damage: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "story", DEMO_MODEL, 1)
    damage(path)
    with pytest.raises(StartError, match=text) as refused:
        read(path)
    assert str(tmp_path) not in str(refused.value), "a caller learns no path of the machine"


MLP = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (("v_proj",), r"layers\.0\.self_attn\.v_proj needs q_proj beside it"),
        (("k_proj", "v_proj"), "[kv]_proj needs q_proj beside it"),
        (("q_proj", "k_proj"), "q_proj needs v_proj beside it"),
        (("up_proj", "down_proj"), "up_proj needs gate_proj beside it"),
        (("q_proj", "v_proj"), None),
        (("gate_proj", "o_proj"), None),
        (ALL_MODULES, None),
    ],
)
def test_modules_that_sglang_cannot_join_are_refused(modules: Sequence[str], text: str | None, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "story", DEMO_MODEL, 1, modules=modules)
    if text is None:
        assert read_adapter("story", path, DEMO_MODEL, 16, ALL_MODULES).name == "story"
        return
    with pytest.raises(StartError, match=text):
        read_adapter("story", path, DEMO_MODEL, 16, ALL_MODULES)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("model.layers.0.self_attn.x_proj", "x_proj cannot be adapted; this worker adapts q_proj, v_proj"),
        ("model.layers.0.mlp.experts.3.q_proj", r"experts\.3\.q_proj cannot be adapted"),
        ("model.layers.0.other.q_proj", r"other\.q_proj is none of this model"),
        ("model.layers.99.self_attn.q_proj", r"99\.self_attn\.q_proj is none of this model"),
        ("visual.q_proj", r"visual\.q_proj is none of this model"),
    ],
)
def test_a_layer_without_a_place_in_sglang_is_refused(layer: str, text: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "story", DEMO_MODEL, 1)
    _rename_layer(path / "adapter_model.safetensors", "model.layers.0.self_attn.q_proj", layer)
    with pytest.raises(StartError, match=text):
        read(path)


def test_layers_of_a_model_whose_weights_have_other_names_must_have_the_rank_and_a_number(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "story", tmp_path, 1)
    assert read_adapter("story", path, tmp_path, 16, MODULES).name == "story"
    edited(r=4)(path)
    with pytest.raises(StartError, match=r"has the shape \[8, 8\], which is not of rank 4"):
        read_adapter("story", path, tmp_path, 16, MODULES)
    edited(r=8)(path)
    _rename_layer(path / "adapter_model.safetensors", "model.layers.0.self_attn.q_proj", "visual.q_proj")
    with pytest.raises(StartError, match=r"visual\.q_proj is none of this model"):
        read_adapter("story", path, tmp_path, 16, MODULES)


def _rename_layer(file: Path, old: str, new: str) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(f".{old}.".encode(), f".{new}.".encode())
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "story", DEMO_MODEL, 1)
    edited(use_rslora=False, fan_in_fan_out=False, alpha_pattern={"q_proj": 16}, rank_pattern={}, use_qalora=None)(path)
    assert read(path).name == "story"


def test_an_adapter_of_another_models_size_is_refused(tmp_path: Path) -> None:
    # A directory without weights gives layers of 8 by 8.
    path = write_adapter(tmp_path / "story", tmp_path, 1)
    with pytest.raises(StartError, match=r"has the shape \[8, 8\], this model needs"):
        read(path)


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "a=b", "a,b", "ä", "a" * 65, "a\n"])
def test_a_name_that_would_break_a_list_or_a_path_is_none(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(InvalidRequest, match=r"worker\.adapters\.name"):
        checked_worker(worker_to_proto(having(make_worker(), Adapter(name, "1" * 64))))


def test_settings_name_each_adapter_and_its_directory() -> None:
    given = {"registry": "127.0.0.1:1", "model": "m"}
    config = WorkerConfig(**given, adapters="a=x,b=y/z")
    assert config.adapters == {"a": Path("x"), "b": Path("y/z")}
    assert config.adapter_places.limits is not None
    assert WorkerConfig(**given).adapter_places.limits is None
    for text in ("a", "a=x,a=y", "a b=x", "=x"):
        with pytest.raises(Exception, match=r"must have each name once|NAME=DIRECTORY"):
            WorkerConfig(**given, adapters=text)


def test_a_worker_that_embeds_has_no_adapters() -> None:
    config = WorkerConfig(registry="127.0.0.1:1", model="m", adapters="a=x", task="embed")
    with pytest.raises(ConfigError, match="adapters: must be empty with task embed"):
        config.engine_settings(WorkerRole.AGGREGATED)


# --- Membership


def test_a_load_for_a_model_that_embeds_is_refused_before_any_worker_is_asked() -> None:
    worker = aggregated("a", task=EMBED)

    async def view() -> Any:
        return SimpleNamespace(workers=[SimpleNamespace(member=worker)])

    backend: Any = SimpleNamespace(origin=SimpleNamespace(is_live=True), view=view)
    changes = AdapterChanges(backend, cast("Any", None))
    with pytest.raises(AdapterRefused, match=f"model {worker.capabilities.model} has task embed") as refused:
        asyncio.run(changes.load(registry_pb.LoadAdapterRequest(name="story", path="story")))
    assert refused.value.metadata["adapter"] == "story"


def test_a_keep_alive_changes_the_adapters_in_the_same_epoch() -> None:
    changes: list[Change] = []
    membership = Membership(
        owner="r", ttl_s=5, clock=ManualClock(100.0), new_lease_id=lambda: "lease", on_change=changes.append
    )
    membership.register(make_worker())
    for adapters in ((ONE,), (ONE,), (TWO,), ()):
        membership.keep_alive("lease", None, adapters)
    seen = [member.adapters for change in changes for member in change.upserted if isinstance(member, Worker)]
    assert seen == [(), (ONE,), (TWO,), ()], "what is unchanged is no change of the view"
    assert {member.epoch for change in changes for member in change.upserted} == {1}


def test_as_many_adapters_as_a_worker_may_have_fit_into_consul_and_come_back() -> None:
    adapters = tuple(Adapter(f"{number:0>64}", f"{number:0>64x}") for number in range(ADAPTERS_MAX))
    worker = having(make_worker("w", 7), *adapters)
    check_fits(worker)
    record = Record(member=worker, lease_id="l", owner="r")
    assert len(meta(record)) <= 64, "Consul's limit"
    assert record_of(*host_and_port(record), meta(record)) == record
    assert worker_from_proto(worker_to_proto(worker)) == worker


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        ((ONE, TWO), "must be of one adapter only"),
        ((Adapter("a", "x"),), "must be 64 hex digits"),
        (tuple(Adapter(f"a{number}", "1" * 64) for number in range(65)), "must be at most 64, not 65"),
    ],
)
def test_a_registration_with_wrong_adapters_is_refused_by_field(adapters: tuple[Adapter, ...], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as refused:
        checked_worker(worker_to_proto(having(make_worker(), *adapters)))
    assert refused.value.field.startswith("worker.adapters")


# --- Routes


class Scene:
    """The pools of one adapter over a view."""

    def __init__(self, *workers: Worker) -> None:
        self.view = AdapterView("story")
        self.pools = Pools("m", "b" * 64, self.view.why_none)
        self.follow(*workers)

    def follow(self, *workers: Worker) -> bool:
        changed = self.view.follow(workers)
        self.pools.follow(self.view.workers)
        return changed

    def pairs(self) -> int:
        return self.pools.selection(8).routes_count


def test_only_workers_with_equal_weights_of_an_adapter_form_a_pair() -> None:
    scene = Scene(having(prefill("p0"), ONE), having(prefill("p1"), TWO), prefill("p2"), having(decode("d0"), ONE))
    assert scene.pairs() == 1
    assert scene.follow(*scene.view._all[:3], having(decode("d0"), TWO), having(decode("d1"), ONE))
    assert scene.pairs() == 2
    digest = scene.view.workers[0].capabilities.model_digest
    assert scene.pools.with_other_weights(digest) == {("p1", 7), ("d0", 7)}, "a stream continues under its weights"


@pytest.mark.parametrize(
    ("workers", "error", "text", "field"),
    [
        ((having(prefill("p"), ONE), decode("d")), IncompatibleWorkers, "is served by p, but by no decode", "adapter"),
        ((prefill("p"), having(decode("d"), ONE)), IncompatibleWorkers, "is served by d, but by no prefill", "adapter"),
        (
            (having(prefill("p"), ONE), having(decode("d"), TWO)),
            IncompatibleWorkers, "story has other weights on p than on d", "adapter",
        ),
        ((having(prefill("p"), ONE),), NoWorkers, "no decode worker serves", None),
        (
            (having(prefill("p", kv_dtype="float16"), ONE), having(decode("d"), ONE)),
            IncompatibleWorkers, "kv_dtype is float16 on p", "kv_dtype",
        ),
    ],
)  # fmt: skip
def test_an_adapter_without_a_route_is_explained(
    workers: tuple[Worker, ...], error: type[Exception], text: str, field: str | None
) -> None:
    scene = Scene(*workers)
    assert scene.pairs() == 0
    problem = scene.pools.why_none()
    assert isinstance(problem, error)
    assert text in str(problem)
    assert problem.metadata.get("field") == field


def test_an_aggregated_worker_needs_no_peer() -> None:
    assert Scene(having(prefill("p"), ONE), decode("d"), having(aggregated("a"), ONE)).pairs() == 1


def test_other_adapters_change_nothing_for_an_adapter_or_the_model() -> None:
    other = Adapter("other", "3" * 64)
    first, second = having(prefill("p"), ONE), having(decode("d"), ONE)
    scene = Scene(first, second)
    former = scene.view.workers
    assert not scene.follow(having(first, ONE, other), second)
    assert scene.view.workers is former
    assert scene.follow(having(first, TWO), having(second, ONE, other))
    assert scene.view.workers[1] is former[1], "pools recognise unchanged workers by identity"
    assert scene.follow(first, second)
    assert without_adapters(first) == without_adapters(having(first, ONE, other)) == prefill("p")
    assert scene.view.adapter == ONE


def test_an_adapter_with_open_requests_hears_of_the_fleet_until_they_end() -> None:
    class Execution:
        def __init__(self) -> None:
            self.open: set[int] = set()
            self.noticed: list[tuple[Worker, ...]] = []
            self.routes = type("Routes", (), {"follow": lambda self, workers: None})()

        def notice(self, workers: tuple[Worker, ...]) -> None:
            self.noticed.append(workers)

    execution: Any = Execution()
    fleets = AdapterFleets(lambda view: execution)
    assert fleets.follow((having(prefill("p"), ONE),))
    assert fleets.find("story") is not None
    execution.open.add(1)
    assert fleets.follow((prefill("p"),))
    assert (fleets.find("story"), fleets.served) == (None, [])
    fleets.act()
    assert execution.noticed == [(prefill("p"),)]
    execution.open.clear()
    assert not fleets.follow((prefill("p"), decode("d")))
    fleets.act()
    assert len(execution.noticed) == 1
