"""Requests that the SGLang adapter rejects, because they would crash or block SGLang's scheduler."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem.domain.generation import Bootstrap, EngineRequest, Guided, Sampling, Stopping
from tandem.domain.worker import WorkerRole
from tandem.engine.sglang import requests
from tandem.errors import ContextExceeded, InvalidRequest, NotSupported

VOCABULARY_SIZE = 100
CONTEXT_TOKENS = 50
ROOM = Bootstrap(host="127.0.0.1", port=1, room=1)


def request(**values: Any) -> EngineRequest:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "token_ids": (1, 2),
        "sampling": Sampling(),
        "stopping": Stopping(max_tokens=1),
    }
    return EngineRequest(**defaults | values)


def check(role: WorkerRole = WorkerRole.AGGREGATED, **values: Any) -> None:
    requests.check(request(**values), role, VOCABULARY_SIZE, CONTEXT_TOKENS)


def nested(depth: int) -> str:
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("token_ids", {"token_ids": (1, VOCABULARY_SIZE)}),
        ("stopping.stop_token_ids", {"stopping": Stopping(max_tokens=1, stop_token_ids=(10**9,))}),
        ("stopping.max_tokens", {"stopping": Stopping(max_tokens=0)}),
        ("sampling.logit_bias", {"sampling": Sampling(logit_bias={10**6: 1.0})}),
        ("sampling.logit_bias", {"sampling": Sampling(logit_bias={5: float("nan")})}),
        ("sampling.logit_bias", {"sampling": Sampling(logit_bias={5: float("-inf")})}),
        ("logprobs.top_logprobs", {"top_logprobs": 2000}),
        ("logprobs.top_logprobs", {"top_logprobs": -5}),
        ("guided.json_schema", {"guided": Guided(json_schema=nested(900))}),
        ("guided.json_schema", {"guided": Guided(json_schema=nested(65))}),
        ("guided.json_schema", {"guided": Guided(json_schema="[" * 100_000)}),
        ("guided.json_schema", {"guided": Guided(json_schema=json.dumps({"enum": list(range(2_000))}))}),
        ("guided.json_schema", {"guided": Guided(json_schema=json.dumps({"pattern": "a*" * 101}))}),
        ("guided.regex", {"guided": Guided(regex="(a|b){3,}" * 101)}),
        ("guided.ebnf", {"guided": Guided(ebnf="root ::= " + '"a"* ' * 101)}),
    ],
)
def test_refuses_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"top_logprobs": 20},
        {"guided": Guided(json_schema=nested(64))},
        {"guided": Guided(regex=r"\*" * 300 + "[*+]" * 300 + "(a{1,1000}){1,1000}")},
        {"guided": Guided(ebnf='root ::= "' + "*" * 300 + '" [+*]+')},
        {"token_ids": (1,) * (CONTEXT_TOKENS - 1)},
    ],
)
def test_takes(values: dict[str, Any]) -> None:
    check(**values)


def test_context() -> None:
    with pytest.raises(ContextExceeded) as caught:
        check(token_ids=(1,) * CONTEXT_TOKENS)
    assert caught.value.metadata == {"field": "token_ids", "limit": str(CONTEXT_TOKENS)}


@pytest.mark.parametrize("host", ["", "a" * 300, "\x00", "a b", "x/y", "@", "é"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(WorkerRole.DECODE, bootstrap=Bootstrap(host=host, port=1, room=1))
    assert caught.value.field == "bootstrap.host"
    for good in ("127.0.0.1", "::1", "[fe80::1%eth0]", "prefill-0.cluster_a.local"):
        check(WorkerRole.DECODE, bootstrap=Bootstrap(host=good, port=1, room=1))


def test_a_seed_is_refused_where_it_would_not_count() -> None:
    seeded = request(sampling=Sampling(seed=1))
    requests.check_seed(seeded, {})
    requests.check_seed(request(), {"speculative_algorithm": "EAGLE"})
    with pytest.raises(NotSupported) as caught:
        requests.check_seed(seeded, {"speculative_algorithm": "EAGLE"})
    assert caught.value.metadata["field"] == "sampling.seed"
    with pytest.raises(NotSupported) as caught:
        requests.check_seed(request(sampling=Sampling(seed=1, min_p=0.1)), {"enable_deterministic_inference": True})
    assert caught.value.metadata["field"] == "sampling.min_p"
