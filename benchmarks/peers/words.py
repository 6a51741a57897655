"""Prompts and answers made of words that are one token each, of a real model's vocabulary.

Owns the words, the fresh prompts and the serial number that each prompt ends with, by which a worker's own record of a
request finds the client's. Tokenises nothing: a word's token is known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WORD = re.compile("\u0120([a-z]{2,})")
"""A token that begins with a space, as byte-level vocabularies spell it."""
SERIAL_WORDS = 3


@dataclass(frozen=True)
class Words:
    """Words and their tokens; `texts[i]`, with a space before it, is the token `ids[i]`."""

    texts: list[str]
    ids: list[int]
    digit_by_id: dict[int, int] = field(init=False, compare=False)
    digit_by_text: dict[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Index both."""
        object.__setattr__(self, "digit_by_id", {token_id: digit for digit, token_id in enumerate(self.ids)})
        object.__setattr__(self, "digit_by_text", {text: digit for digit, text in enumerate(self.texts)})

    @classmethod
    def of_model(cls, model: Path) -> Words:
        """Those of a model directory's tokenizer."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        found = []
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            word = WORD.fullmatch(token)
            if word and tokenizer.encode(f" {word[1]}", add_special_tokens=False).ids == [token_id]:
                found.append((word[1], token_id))
        return cls([text for text, _ in found], [token_id for _, token_id in found])

    def serial(self, digits: Sequence[int]) -> int:
        """The number that words at these places spell."""
        number = 0
        for digit in digits:
            number = number * len(self.ids) + digit
        return number

    def spell(self, number: int) -> list[str]:
        """The words of a serial number, which ends a prompt."""
        digits = []
        for _ in range(SERIAL_WORDS):
            number, digit = divmod(number, len(self.texts))
            digits.append(self.texts[digit])
        return digits[::-1]

    def serial_of_ids(self, token_ids: Sequence[int]) -> int | None:
        """The serial number of a tokenised prompt; what a chat template writes behind it is passed over."""
        end = len(token_ids)
        while end and token_ids[end - 1] not in self.digit_by_id:
            end -= 1
        if end < SERIAL_WORDS:
            return None
        digits = [self.digit_by_id.get(token_id) for token_id in token_ids[end - SERIAL_WORDS : end]]
        return None if None in digits else self.serial([digit for digit in digits if digit is not None])

    def serial_of_text(self, prompt: str) -> int | None:
        """The serial number of a prompt as text."""
        digits = [self.digit_by_text.get(word) for word in prompt.split()[-SERIAL_WORDS:]]
        complete = len(digits) == SERIAL_WORDS and None not in digits
        return self.serial([digit for digit in digits if digit is not None]) if complete else None

    def prompts(self, count: int, rng: random.Random) -> Iterator[tuple[int, str]]:
        """Fresh prompts for ever, of so many words each, with their serial numbers from 0."""
        number = 0
        while True:
            yield number, " ".join([*rng.choices(self.texts, k=max(0, count - SERIAL_WORDS)), *self.spell(number)])
            number += 1
