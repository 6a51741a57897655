"""Turns documents into rows of token ids with loss weights.

Documents are packed whole, so that no question loses the fact it asks for; only a story may be cut at a row's end.
Rows are numpy-free lists; `train` makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from .corpus import Turn
from .tokenizer import BOS, END, PAD

_OPEN_DOCUMENTS = 24


@dataclass(frozen=True)
class Row:
    """Token ids and the loss weight of each token as a target."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Encodes documents exactly as the chat template renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._bos, self._end, self.pad = tokenizer.convert_tokens_to_ids([BOS, END, PAD])
        self._texts: dict[str, list[int]] = {}

    def encode(self, document: list[Turn]) -> Row:
        """Returns the document's ids and weights, beginning with the start token."""
        ids, weights = [self._bos], [0.0]
        for turn in document:
            if turn.role != "text":
                ids.append(self._tokenizer.convert_tokens_to_ids(f"<|{turn.role}|>"))
                weights.append(0.0)
            body = self._tokenizer.encode(turn.text, add_special_tokens=False)
            ids += body
            weights += [turn.weight] * len(body)
            if turn.ends:
                ids.append(self._end)
                weights.append(turn.weight if turn.role in ("assistant", "text") else 0.0)
        return Row(ids, weights)


def pack(documents: Iterator[list[Turn]], encoder: Encoder, row_tokens: int) -> Iterator[Row]:
    """Yields rows of exactly `row_tokens`, filling each with the longest waiting document that still fits."""
    waiting: list[Row] = []
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < row_tokens:
            while len(waiting) < _OPEN_DOCUMENTS:
                waiting.append(_cut(encoder.encode(next(documents)), row_tokens))
            fitting = [row for row in waiting if len(row.ids) <= row_tokens - len(ids)]
            if not fitting:
                break
            # The first document of a row is the oldest one, so that long ones are never starved.
            best = max(fitting, key=lambda row: len(row.ids)) if ids else waiting[0]
            waiting = [row for row in waiting if row is not best]
            ids += best.ids
            weights += best.weights
        missing = row_tokens - len(ids)
        yield Row(ids + [encoder.pad] * missing, weights + [0.0] * missing)


def _cut(row: Row, row_tokens: int) -> Row:
    return Row(row.ids[:row_tokens], row.weights[:row_tokens])
