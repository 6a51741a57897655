"""Each parameter of the OpenAI door does what docs/reference/openai.md says, on the real engine behind a real Envoy."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tandem.local_cluster.cluster import LocalCluster

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(240),
]

MODEL = "tandem-demo"
TOKENIZER = Tokenizer.from_file("models/tandem-demo/tokenizer.json")
PROMPT = "Once upon a time"
STORY = "Mia hid the red key in the old barn. It was a sunny day. Where did Mia hide the red key?"


@pytest.fixture
def ask(http_pair: LocalCluster) -> Any:
    """Asks for a completion of 24 tokens; returns its first choice."""

    def complete(**fields: Any) -> Any:
        return answer(http_pair, "completions", {"prompt": PROMPT, "max_tokens": 24, **fields})["choices"][0]

    return complete


def answer(cluster: LocalCluster, call: str, body: dict[str, Any]) -> Any:
    assert cluster.edge is not None
    url = f"http://{cluster.edge.address}/v1/{call}"
    said = httpx.post(url, json={"model": MODEL, "temperature": 0, **body}, timeout=60)
    assert said.status_code == 200, said.text
    return said.json()


def tokens(choice: Any) -> list[str]:
    return list(choice["logprobs"]["tokens"])


def test_zero_temperature_is_greedy_and_one_is_not(ask: Any) -> None:
    assert ask()["text"] == ask(seed=1)["text"] == ask(seed=2)["text"]
    assert len({ask(temperature=1.5, seed=seed)["text"] for seed in range(5)}) > 1


def test_a_seed_repeats_what_was_drawn(ask: Any) -> None:
    assert ask(temperature=1, seed=7)["text"] == ask(temperature=1, seed=7)["text"]


def test_choices_of_a_seed_differ_and_repeat(http_pair: LocalCluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.5, "seed": 3, "n": 3}
    first, second = ([choice["text"] for choice in answer(http_pair, "completions", body)["choices"]] for _ in range(2))
    assert len(set(first)) == 3
    assert first == second


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}])
def test_the_narrowest_choice_is_greedy(ask: Any, narrow: Any) -> None:
    assert ask(temperature=2, **narrow)["text"] == ask()["text"]


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}])
def test_penalties_lessen_repetition(ask: Any, penalty: Any) -> None:
    # Without an end the model repeats itself.
    without: dict[str, Any] = {}
    plain, penalised = (tokens(ask(max_tokens=200, ignore_eos=True, logprobs=0, **more)) for more in (without, penalty))
    assert len(set(penalised)) > len(set(plain))


def test_a_bias_forbids_and_forces(ask: Any) -> None:
    first = TOKENIZER.token_to_id(TOKENIZER.encode(ask()["text"], add_special_tokens=False).tokens[0])
    assert TOKENIZER.encode(ask(logit_bias={str(first): -100})["text"], add_special_tokens=False).ids[0] != first
    forced = TOKENIZER.encode("x", add_special_tokens=False).ids[0]
    assert ask(logit_bias={str(forced): 100}, max_tokens=5)["text"] == "xxxxx"


def test_budgets(http_pair: LocalCluster, ask: Any) -> None:
    assert len(tokens(ask(max_tokens=3, logprobs=0))) == 3
    assert ask(max_tokens=3)["finish_reason"] == "length"
    chat = {"messages": [{"role": "user", "content": "Hello there."}], "max_completion_tokens": 2}
    assert answer(http_pair, "chat/completions", chat)["usage"]["completion_tokens"] == 2


def test_an_end_that_is_not_taken_yet(http_pair: LocalCluster) -> None:
    chat = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 120}
    short = answer(http_pair, "chat/completions", chat)
    assert short["choices"][0]["finish_reason"] == "stop"
    count = short["usage"]["completion_tokens"]
    longer = answer(http_pair, "chat/completions", {**chat, "min_tokens": count + 10})
    assert longer["usage"]["completion_tokens"] >= count + 10
    endless = answer(http_pair, "chat/completions", {**chat, "ignore_eos": True})
    assert endless["usage"]["completion_tokens"] == 120


def test_stops(ask: Any) -> None:
    whole = ask()["text"]
    assert ask(stop=whole[5:9])["text"] == whole[: whole.index(whole[5:9])]
    ids = TOKENIZER.encode(whole, add_special_tokens=False).ids
    stopped = ask(stop_token_ids=[ids[6]])
    assert stopped["text"] == TOKENIZER.decode(ids[: ids.index(ids[6])])
    assert stopped["finish_reason"] == "stop"


def test_grammars(http_pair: LocalCluster, ask: Any) -> None:
    assert re.fullmatch("(red|blue) (key|door)", ask(regex="(red|blue) (key|door)")["text"])
    assert ask(ebnf='root ::= "yes" | "no"')["text"] in {"yes", "no"}
    schema = {
        "type": "object",
        "properties": {"found": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
        "required": ["found", "colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "where", "schema": schema, "strict": True}}
    said = json.loads(ask(response_format=form, max_tokens=60)["text"])
    assert set(said) == {"found", "colour"}
    assert said["colour"] in {"red", "blue"}
    begun = ask(response_format={"type": "json_object"}, max_tokens=20)["text"]
    assert begun.lstrip().startswith("{")


def test_logprobs_are_the_models(ask: Any) -> None:
    choice = ask(logprobs=3)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 3
        # Greedy: the token chosen is the likeliest one.
        assert max(top, key=top.__getitem__) == token
        assert top[token] == pytest.approx(logprob, abs=1e-5)


def test_a_salt_keeps_caches_apart(http_pair: LocalCluster) -> None:
    prompt = [6 + number % 1500 for number in range(700, 1000)]

    def cached(salt: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        return int(answer(http_pair, "completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("a") == 0
    assert cached("a") > 250
    assert cached("b") == 0


def test_what_has_no_effect_has_none(http_pair: LocalCluster) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there."}], "max_tokens": 8}
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "priority": 5,
    }
    said = [answer(http_pair, "chat/completions", body)["choices"] for body in (chat, {**chat, **harmless})]
    assert said[0] == said[1]
