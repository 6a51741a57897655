"""Translation of OpenAI parameters to the contract and of field names back; contradictions name a parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest
from tandem_frontend.openai.translation import chat_request, completion_request, for_choice, parameter

from tandem.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
GRAMMAR = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(ChatRequest, json.dumps(body).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def test_every_parameter_is_translated() -> None:
    request = chat_request(
        chat(
            temperature=0,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            seed=-(2**63),
            logit_bias={"5": -100},
            max_completion_tokens=9,
            max_tokens=9,
            min_tokens=2,
            stop=["a", "b"],
            stop_token_ids=[3],
            ignore_eos=True,
            logprobs=True,
            top_logprobs=4,
            priority=-3,
            cache_salt="tenant",
            response_format=GRAMMAR,
        )
    )
    sampling, stopping = request.sampling, request.stopping
    assert sampling.HasField("temperature")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 7, -(2**63))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert sampling.min_p == pytest.approx(0.1)
    assert dict(sampling.logit_bias) == {5: -100}
    assert (stopping.max_tokens, stopping.min_tokens, list(stopping.stop)) == (9, 2, ["a", "b"])
    assert (list(stopping.stop_token_ids), stopping.ignore_eos) == ([3], True)
    assert request.logprobs.top_logprobs == 4
    assert (request.model, request.priority, request.cache_salt) == ("m", -3, "tenant")
    assert json.loads(request.guided.json_schema) == SCHEMA


def test_absent_parameters_stay_absent() -> None:
    request = chat_request(chat())
    assert not request.sampling.ListFields()
    assert not request.stopping.HasField("max_tokens")
    assert not request.HasField("logprobs")
    assert not request.HasField("guided")


def test_completions_default_to_16_tokens() -> None:
    assert completion_request(completion()).stopping.max_tokens == 16
    assert completion_request(completion(max_tokens=3, logprobs=0)).HasField("logprobs")


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        (GRAMMAR, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "object"}),
    ],
)
def test_response_format_becomes_a_grammar(form: Any, schema: Any) -> None:
    assert json.loads(chat_request(chat(response_format=form)).guided.json_schema) == schema
    assert not chat_request(chat(response_format={"type": "text"})).HasField("guided")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": False}, "stream_options"),
        ({"response_format": GRAMMAR, "regex": "a"}, "regex"),
        ({"regex": "a", "ebnf": "b"}, "ebnf"),
        ({"regex": ""}, "regex"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 10: 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 10_000: 1}}, "logit_bias"),
    ],
)
def test_chat_contradictions_name_a_parameter(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat_request(chat(**fields))
    assert refused.value.field == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 0, "stream": True}, "stream"),
    ],
)
def test_completion_contradictions_name_a_parameter(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        completion_request(completion(**fields))
    assert refused.value.field == param


def test_an_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    request = completion_request(completion(echo=True, logprobs=2))
    assert (request.logprobs.prompt, request.logprobs.top_logprobs, request.stopping.max_tokens) == (True, 2, 16)
    assert not completion_request(completion(logprobs=2)).logprobs.prompt
    assert not completion_request(completion(echo=True)).HasField("logprobs")


def test_an_echo_alone_generates_the_one_token_that_an_engine_must() -> None:
    assert completion_request(completion(echo=True, max_tokens=0)).stopping.max_tokens == 1
    assert completion_request(completion(max_tokens=0)).stopping.max_tokens == 0, "refused with the contract"


def test_each_choice_has_its_own_seed() -> None:
    request = chat_request(chat(seed=2**63 - 1))
    seeds = [for_choice(request, [1], number).sampling.seed for number in range(3)]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert not for_choice(chat_request(chat()), [1], 1).sampling.HasField("seed")


@pytest.mark.parametrize(
    ("field", "fields", "param"),
    [
        ("token_ids", {}, "messages"),
        ("sampling.top_p", {}, "top_p"),
        ("stopping.stop", {}, "stop"),
        ("stopping.max_tokens", {}, "max_tokens"),
        ("stopping.max_tokens", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("guided.json_schema", {"response_format": GRAMMAR}, "response_format"),
        ("guided.regex", {"regex": "("}, "regex"),
        ("guided.ebnf", {}, "tools"),
        ("guided.structural_tag", {}, "tools"),
        ("logprobs.top_logprobs", {}, "top_logprobs"),
    ],
)
def test_contract_fields_map_to_chat_parameters(field: str, fields: Any, param: str) -> None:
    assert parameter(field, chat(**fields)) == param


def test_contract_fields_map_to_completion_parameters() -> None:
    assert parameter("token_ids", completion()) == "prompt"
    assert parameter("logprobs.top_logprobs", completion(logprobs=99)) == "logprobs"
    assert parameter("logprobs.prompt", completion(logprobs=1, echo=True)) == "logprobs"
