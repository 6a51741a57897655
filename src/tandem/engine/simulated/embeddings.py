"""Embeddings of the simulated engine: numbers made of a hash of the tokens, so that tests can predict them.

A request for one runs as a generation of a single token, with the time and the memory that its prompt takes; the token
is dropped, and the finish carries the embedding.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace

from tandem.domain.generation import EngineFinish, EngineRequest, FinishReason, Stopping, TokenLogprob
from tandem.engine.port import Output
from tandem.errors import TandemError


def embedding_of(token_ids: Sequence[int], size: int, model_digest: str) -> tuple[float, ...]:
    """A vector of length 1: different for other tokens and other weights, and a shorter one is a prefix, normalised."""
    seed = hashlib.sha256(model_digest.encode() + array("i", token_ids).tobytes()).digest()
    data = hashlib.shake_256(seed).digest(4 * size)
    values = [number / 2**31 - 1 for number in struct.unpack(f"<{size}I", data)]
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return tuple(value / length for value in values)


def as_generation(request: EngineRequest) -> EngineRequest:
    """The request that takes as long as an embedding does."""
    return replace(request, stopping=Stopping(max_tokens=1, ignore_eos=True))


class EmbeddingOutput:
    """An `Output` that drops the token, and puts the embedding into the finish."""

    def __init__(self, output: Output, embedding: tuple[float, ...]) -> None:
        self._output = output
        self._embedding = embedding

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """See the port."""

    def finish(self, finish: EngineFinish) -> None:
        """See the port."""
        if finish.reason is FinishReason.ABORTED:
            self._output.finish(replace(finish, completion_tokens=0))
            return
        ended = replace(finish, reason=FinishReason.STOP, matched_token_id=None, completion_tokens=0)
        self._output.finish(replace(ended, embedding=self._embedding))

    def fail(self, problem: TandemError) -> None:
        """See the port."""
        self._output.fail(problem)
