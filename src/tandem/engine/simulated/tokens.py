"""Chooses the next token by a hash of the whole sequence, which stands in for KV and for the model.

`SequenceState` is 16 bytes that depend on every token in order. A prefill engine computes it from the prompt and sends
it; a decode engine starts from the bytes it received. So a lost, repeated, mixed-up or faked transfer is visible in the
tokens, and a continuation from `prompt + tokens so far` yields exactly the tokens of an undisturbed run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tandem.domain.adapter import Adapter
from tandem.domain.checkpoint import Checkpoint
from tandem.domain.generation import TokenLogprob

SequenceState = bytes
STATE_BYTES = 16
NO_STATE: SequenceState = bytes(STATE_BYTES)
"""State of a decode engine to which no KV was transferred."""

_START: SequenceState = blake2b(b"tandem simulated engine", digest_size=STATE_BYTES).digest()


def advance(state: SequenceState, token_id: int) -> SequenceState:
    """The state after one more token."""
    return blake2b(state + token_id.to_bytes(8, "little"), digest_size=STATE_BYTES).digest()


def drawn(state: SequenceState, seed: int) -> SequenceState:
    """The state mixed with a sampling seed: the same seed after the same tokens samples the same token."""
    return blake2b(state + seed.to_bytes(9, "little", signed=True), digest_size=STATE_BYTES, person=b"draw").digest()


def digest(token_ids: Iterable[int], adapter: Adapter | None = None) -> SequenceState:
    """The state after a whole sequence, which stands for its KV: another one under each adapter."""
    state = _START
    if adapter is not None:
        state = blake2b(state + adapter.engine_id.encode(), digest_size=STATE_BYTES, person=b"adapter").digest()
    for token_id in token_ids:
        state = advance(state, token_id)
    return state


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that the simulated model may emit."""

    ordinary: Sequence[int]
    """Ascending; neither special tokens nor ends of sequence."""
    eos_token_id: int | None
    eos_chance: float = 0.0

    def next_token(self, state: SequenceState, *, refuse: Callable[[int], bool] | None = None) -> int:
        """The next token.

        Args:
            state: state after all tokens so far.
            refuse: tokens that are not allowed now (stop tokens before `min_tokens`); the next candidate is chosen.
        """
        if self._is_end(state) and self.eos_token_id is not None and not (refuse and refuse(self.eos_token_id)):
            return self.eos_token_id
        index = self._first_index(state)
        for offset in range(len(self.ordinary)):
            candidate = self.ordinary[(index + offset) % len(self.ordinary)]
            if refuse is None or not refuse(candidate):
                return candidate
        return self.ordinary[index]

    def logprob(self, state: SequenceState, token_id: int, top_count: int) -> TokenLogprob:
        """Plausible log probabilities: the chosen token has 0.5 to 1, each other one half of the remaining mass."""
        share = int.from_bytes(blake2b(state, digest_size=4, person=b"logprob").digest(), "little") / 2**32
        chosen = 0.5 + share / 2
        top = [(token_id, math.log(chosen))]
        index = self._first_index(state)
        rest = 1 - chosen
        for offset in range(len(self.ordinary)):
            if len(top) >= top_count:
                break
            rival = self.ordinary[(index + offset) % len(self.ordinary)]
            if rival != token_id:
                rest /= 2
                top.append((rival, math.log(max(rest, 1e-300))))
        return TokenLogprob(token_id=token_id, logprob=math.log(chosen), top=tuple(top[:top_count]))

    def prompt_logprobs(self, prompt: Sequence[int], top_count: int) -> tuple[TokenLogprob, ...]:
        """Those of the prompt's tokens after the first, as plausible as the others."""
        state, found = advance(_START, prompt[0]), []
        for token_id in prompt[1:]:
            found.append(self.logprob(state, token_id, top_count))
            state = advance(state, token_id)
        return tuple(found)

    def _first_index(self, state: SequenceState) -> int:
        return int.from_bytes(blake2b(state, digest_size=8, person=b"token").digest(), "little") % len(self.ordinary)

    def _is_end(self, state: SequenceState) -> bool:
        if self.eos_chance <= 0:
            return False
        return int.from_bytes(blake2b(state, digest_size=4, person=b"eos").digest(), "little") < self.eos_chance * 2**32


def read_vocabulary(checkpoint: Checkpoint, eos_chance: float = 0.0) -> Vocabulary:
    """Ordinary tokens of a model: in its tokenizer, not added as special, below the model's vocabulary size."""
    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_bytes())
    pieces = tokenizer.get("model", {}).get("vocab")
    # Unigram tokenizers list their pieces in id order; the others map each piece to its id.
    ids: Iterable[int] = pieces.values() if isinstance(pieces, dict) else range(len(pieces or ()))
    special = {added["id"] for added in tokenizer.get("added_tokens") or () if added.get("special")}
    excluded = special.union(checkpoint.eos_token_ids)
    ordinary = sorted(i for i in ids if i < checkpoint.vocabulary_size and i not in excluded)
    if not ordinary:
        ordinary = [i for i in range(checkpoint.vocabulary_size) if i not in excluded]
    eos = checkpoint.eos_token_ids[0] if checkpoint.eos_token_ids else None
    return Vocabulary(ordinary, eos, eos_chance)


def expected_tokens(
    vocabulary: Vocabulary, prompt: Sequence[int], count: int, adapter: Adapter | None = None
) -> list[int]:
    """The tokens of an undisturbed run after a prompt, for tests of the layers above the engine."""
    state = digest(prompt, adapter)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(vocabulary.next_token(state))
        state = advance(state, tokens[-1])
    return tokens
