"""The loop over SGLang's rows, on scripted rows: one that cannot be read ends its own request."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tandem.domain.generation import Bootstrap, EngineRequest, KvCheck, Sampling, Stopping, TokenLogprob
from tandem.engine.sglang.responses import Answers
from tandem.errors import EngineFailed, KvCorrupt
from tests.unit.support.simulated_legs import Collected

NAME = "tandem.engine.sglang.front_half"
RIDS = ("r0", "r1", "r2")


class Manager:
    """What the front half takes over of SGLang's TokenizerManager."""

    def __init__(self) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.released: list[Any] = []

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    def _release_lora_once(self, state: Any) -> None:
        self.released.append(state)


class Batch(SimpleNamespace):
    """A BatchTokenIDOutput."""


class Embedded(SimpleNamespace):
    """A BatchEmbeddingOutput."""


@pytest.fixture
def front_half(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    messages: Any = ModuleType("io_struct")
    messages.BatchTokenIDOutput, messages.GenerateReqInput, messages.unwrap_from_pickle = Batch, object, lambda it: it
    messages.BatchEmbeddingOutput, messages.EmbeddingReqInput = Embedded, object
    manager: Any = ModuleType("tokenizer_manager")
    manager.TokenizerManager = Manager
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", messages)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.tokenizer_manager", manager)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).FrontHalf()
    # The next one to import it gets the real one.
    sys.modules.pop(NAME, None)


def admit(front_half: Any, bootstrap: Bootstrap | None = None) -> list[Collected]:
    outputs = []
    times = SimpleNamespace(
        first_token_time=1.0, trace_ctx=SimpleNamespace(tracing_enable=False), set_finished_time=lambda **_: None
    )
    for rid in RIDS:
        request = EngineRequest(
            request_id=rid,
            token_ids=(1, 2),
            sampling=Sampling(),
            stopping=Stopping(max_tokens=9),
            top_logprobs=1,
            bootstrap=bootstrap,
        )
        outputs.append(Collected())
        answers = Answers(request, rid, outputs[-1], lambda ended: None)
        front_half.rid_to_state[rid] = SimpleNamespace(answers=answers, time_stats=times)
    return outputs


def batch(**columns: Any) -> Batch:
    """A step with a token for each request; the second one's row is made wrong."""
    whole: dict[str, Any] = {
        "rids": list(RIDS),
        "customized_info": None,
        "output_ids": [[5], [6], [7]],
        "finished_reasons": [None, None, None],
        "output_token_logprobs_val": [[-1.0]] * 3,
        "output_token_logprobs_idx": [[5], [6], [7]],
        "output_top_logprobs_val": [[[-1.0]]] * 3,
        "output_top_logprobs_idx": [[[5]]] * 3,
        **{name: [5] * 3 for name in ("prompt_tokens", "completion_tokens", "cached_tokens")},
    }
    for name, wrong in columns.items():
        whole[name] = [whole[name][0], wrong, whole[name][2]]
    return Batch(**whole)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"output_top_logprobs_val": [[-1.0, -2.0]], "output_top_logprobs_idx": []}, "is malformed: ValueError"),
        ({"output_top_logprobs_val": [[-1.0, -2.0]]}, "is malformed: ValueError"),
        ({"output_token_logprobs_val": None}, "is malformed: TypeError"),
        ({"output_token_logprobs_val": [], "output_token_logprobs_idx": []}, "sent 0 log probabilities with 1 tokens"),
        ({"output_ids": None}, "is malformed: TypeError"),
    ],
    ids=["rivals", "rivals of one token", "nothing", "none", "no tokens"],
)
async def test_a_row_that_cannot_be_read_ends_its_own_request(
    front_half: Any, wrong: dict[str, Any], sentence: str
) -> None:
    outputs = admit(front_half)
    await front_half._handle_batch_output(batch(**wrong))
    await front_half._handle_batch_output(batch())
    assert [output.token_ids for output in outputs] == [[5, 5], [], [7, 7]]
    assert [len(output.failures) for output in outputs] == [0, 1, 0]
    (problem,) = outputs[1].failures
    assert isinstance(problem, EngineFailed)
    assert str(problem).endswith(sentence)
    assert front_half.aborted == ["r1"], "the scheduler does not go on with it"


@pytest.mark.parametrize(
    "wrong",
    [{"finished_reasons": {}}, {"finished_reasons": {"type": "stop"}, "output_token_logprobs_val": None}],
    ids=["reason", "row"],
)
async def test_a_last_row_that_cannot_be_read_leaves_nothing_behind(front_half: Any, wrong: dict[str, Any]) -> None:
    outputs = admit(front_half)
    await front_half._handle_batch_output(batch(**wrong))
    assert [len(output.failures) for output in outputs] == [0, 1, 0]
    assert list(front_half.rid_to_state) == ["r0", "r2"]
    assert front_half.aborted == []
    assert front_half.released


async def test_whole_rows_are_passed_on_and_finished(front_half: Any) -> None:
    outputs = admit(front_half)
    step = batch()
    step.finished_reasons = [{"type": "stop"}] * 3
    await front_half._handle_batch_output(step)
    assert [output.token_ids for output in outputs] == [[5], [6], [7]]
    assert [len(output.finishes) for output in outputs] == [1, 1, 1]
    assert not front_half.rid_to_state


def rated(values: Any, token_ids: Any, tops: Any) -> Collected:
    """The output of a request for log probabilities of its prompt, whose one step has these of it."""
    output = Collected()
    request = EngineRequest(
        request_id="r",
        token_ids=(1, 2, 3),
        sampling=Sampling(),
        stopping=Stopping(max_tokens=1),
        top_logprobs=1,
        prompt_logprobs=True,
    )
    step = batch()
    step.input_token_logprobs_val, step.input_token_logprobs_idx = [values], [token_ids]
    step.input_top_logprobs_val, step.input_top_logprobs_idx = [tops], [[[9]] * len(tops)]
    answers = Answers(request, "r", output, lambda ended: None)
    answers.tokens([5], step, 0)
    answers.end({"type": "length"}, step, 0, None)
    return output


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    (finish,) = rated([None, -1.0, -2.0], [1, 2, 3], [[-0.5], [-0.5], [-0.5]]).finishes
    assert finish.prompt_logprobs == (
        TokenLogprob(token_id=2, logprob=-1.0, top=((9, -0.5),)),
        TokenLogprob(token_id=3, logprob=-2.0, top=((9, -0.5),)),
    )


@pytest.mark.parametrize("token_ids", [[1, 2], [1, 2, 4], [1, 2, 3, 4]])
def test_log_probabilities_of_another_prompt_are_refused(token_ids: list[int]) -> None:
    with pytest.raises(EngineFailed, match="of another prompt"):
        rated([None] + [-1.0] * (len(token_ids) - 1), token_ids, [[-0.5]] * len(token_ids))


async def test_front_half_embeddings_of_a_step_each_end_their_request_and_a_broken_one_only_its_own(
    front_half: Any,
) -> None:
    outputs = admit(front_half)
    rows = [[0.6, 0.8], [float("nan"), 1.0], [1.0, 0.0]]
    ended = {"type": "length", "length": 0}
    step = Embedded(
        rids=list(RIDS), finished_reasons=[ended] * 3, embeddings=rows, prompt_tokens=[2] * 3, cached_tokens=[0] * 3
    )
    await front_half._handle_batch_output(step)
    assert [output.finishes[0].embedding for output in (outputs[0], outputs[2])] == [(0.6, 0.8), (1.0, 0.0)]
    assert not outputs[1].finishes
    assert isinstance(outputs[1].failures[0], EngineFailed)
    assert not front_half.rid_to_state


@pytest.mark.parametrize("message", ["KV checksum mismatch", "Metadata corruption detected - bootstrap_room mismatch"])
async def test_corrupt_kv_ends_its_request_without_the_token_that_came_with_it(front_half: Any, message: str) -> None:
    outputs = admit(front_half, Bootstrap(host="h", port=1, room=77))
    aborted = {"type": "abort", "message": message, "status_code": 500}
    await front_half._handle_batch_output(batch(finished_reasons=aborted))
    assert [output.token_ids for output in outputs] == [[5], [], [7]]
    (problem,) = outputs[1].failures
    assert isinstance(problem, KvCorrupt)
    assert (problem.metadata["room"], problem.metadata["phase"]) == ("77", "transferring")


@pytest.mark.parametrize(("checked", "kv_check"), [(True, KvCheck.MATCHED), (False, KvCheck.UNCHECKED), (None, None)])
async def test_a_finish_says_whether_the_kv_was_compared(front_half: Any, checked: Any, kv_check: Any) -> None:
    outputs = admit(front_half)
    step = batch(finished_reasons={"type": "stop"})
    step.customized_info = {"tandem": [[], [{"kv_checked": checked}], []]}
    await front_half._handle_batch_output(step)
    assert outputs[1].finishes[0].kv_check is kv_check


class LoraScheduler:
    """SGLang's scheduler and registry of adapters, as the front half calls them: it dies of an id that it has."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.asked: list[str] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.refusals: list[str] = []
        """Kinds of message whose next one fails, after it has had its effect."""

    async def __call__(self, message: Any) -> list[Any]:
        self.asked.append(message.kind)
        if message.kind == "load":
            assert message.lora_id not in self.held, "the scheduler has died"
            self.held.add(message.lora_id)
        elif message.kind not in self.refusals:
            self.held.discard(message.lora_id)
        await self.answers.wait()
        if message.kind in self.refusals:
            self.refusals.remove(message.kind)
            return [SimpleNamespace(success=False, error_message=f"no {message.kind}")]
        return [SimpleNamespace(success=True)]


@pytest.fixture
def scheduler(front_half: Any, monkeypatch: pytest.MonkeyPatch) -> LoraScheduler:
    scheduler, registered = LoraScheduler(), dict[str, Any]()

    async def register(reference: Any) -> None:
        registered[reference.lora_name] = reference

    messages = sys.modules["sglang.srt.managers.io_struct"]
    for kind in ("Load", "Unload"):
        make = partial(SimpleNamespace, kind=kind.lower())
        monkeypatch.setattr(messages, f"{kind}LoRAAdapterReqInput", make, raising=False)
    lora_registry: Any = ModuleType("lora_registry")
    lora_registry.LoRARef = SimpleNamespace
    monkeypatch.setitem(sys.modules, "sglang.srt.lora", ModuleType("sglang.srt.lora"))
    monkeypatch.setitem(sys.modules, "sglang.srt.lora.lora_registry", lora_registry)
    front_half.lora_update_lock, front_half.pending_lora_unloads, front_half.lora_ref_cache = asyncio.Lock(), {}, {}
    front_half.lora_registry = SimpleNamespace(get_all_adapters=lambda: registered, register=register)
    front_half.update_lora_adapter_communicator = scheduler
    return scheduler


async def test_front_half_load_after_one_that_was_cancelled_releases_the_id_first(
    front_half: Any, scheduler: LoraScheduler
) -> None:
    scheduler.answers.clear()
    loading = asyncio.create_task(front_half.load_adapter("a", "/a"))
    await asyncio.sleep(0)
    loading.cancel()
    await asyncio.wait({loading})
    scheduler.answers.set()
    for _ in range(2):
        await front_half.load_adapter("a", "/a")
    assert scheduler.asked == ["load", "unload", "load"]
    assert [*front_half.lora_ref_cache] == ["a"]


async def test_front_half_load_that_could_not_be_undone_is_undone_before_the_next_one(
    front_half: Any, scheduler: LoraScheduler
) -> None:
    scheduler.refusals = ["load", "unload"]
    with pytest.raises(ValueError, match="no load"):
        await front_half.load_adapter("a", "/a")
    scheduler.refusals = ["unload"]
    with pytest.raises(ValueError, match="a part of it is left of a load that failed"):
        await front_half.load_adapter("a", "/a")
    await front_half.load_adapter("a", "/a")
    assert scheduler.asked == ["load", "unload", "unload", "unload", "load"]
