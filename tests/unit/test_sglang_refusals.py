"""SGLang's refusals, reported as ours: the field is the caller's, the words are not SGLang's."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.domain.generation import Bootstrap, EngineRequest, Guided, Sampling, Stopping
from tandem.engine.sglang.responses import Answers
from tandem.errors import ContextExceeded, InvalidRequest, LegFailed, TandemError
from tests.unit.support.simulated_legs import Collected

REGEX = Guided(regex="(red")


def answered(message: str, status_code: int | None, **values: Any) -> TandemError:
    """The error for an abort of SGLang's."""
    request = EngineRequest(
        request_id="r",
        token_ids=(1, 2),
        sampling=Sampling(),
        stopping=Stopping(max_tokens=1),
        bootstrap=Bootstrap(host="127.0.0.1", port=1, room=1),
        **values,
    )
    reason = {"type": "abort", "message": message, "status_code": status_code}
    output = Collected()
    Answers(request, "1-r", output, lambda ended: None).end(reason, None, 0, None)
    assert not output.finishes
    assert len(output.failures) == 1
    return output.failures[0]


@pytest.mark.parametrize(
    ("message", "status_code", "sentence"),
    [
        (
            "Failed to compile regex grammar: [21:05:34] /project/cpp/regex_converter.cc:83: Regex parsing error at "
            "position 4: The parenthesis is not closed.\n",
            400,
            "guided.regex: cannot be used: Regex parsing error at position 4: The parenthesis is not closed.",
        ),
        (
            "Grammar accept_token failed for req x with token 5: Tokens not accepted: 5\nKey string: (red",
            500,
            "guided.regex: allows nothing after what was generated",
        ),
        ("Grammar preprocessing timed out: req.grammar_key=('regex', '(red')", 400, "guided.regex: takes too long"),
    ],
)
def test_a_grammar_error_names_the_field_of_the_grammar(message: str, status_code: int, sentence: str) -> None:
    problem = answered(message, status_code, guided=REGEX)
    assert isinstance(problem, InvalidRequest)
    assert str(problem).startswith(sentence)
    assert problem.field == "guided.regex"


def test_a_context_refusal_has_our_own_words() -> None:
    problem = answered("Input length (2047 tokens) exceeds the maximum allowed length (2042 tokens). Use a ...", 400)
    assert isinstance(problem, ContextExceeded)
    assert "2042" not in str(problem)


def test_other_refusals_and_failures() -> None:
    problem = answered("min_p must be in [0, 1], got 3.", 400)
    assert isinstance(problem, InvalidRequest)
    assert problem.field == "sampling.min_p"
    failed = answered("Decode transfer failed", 500, guided=REGEX)
    assert isinstance(failed, LegFailed)
    assert "cause" not in failed.metadata
    notified = answered("Prefill transfer failed: Aborted by decode-side abort notification.", 500, guided=REGEX)
    assert notified.metadata["cause"] == LegFailed.PEER_ABORTED
