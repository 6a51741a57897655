"""Facts about who put which thing where, the questions about them, and the recall prompts of the evaluation.

A fact is one sentence; a question asks for one part of it. Training documents and held-out prompts are built from the
same pieces but from disjoint (name, object) pairs. Pure functions of a seeded generator; standard library only, so
that the same prompts can be sent to a running cluster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import lexicon
from .stories import filler_sentence

Messages = list[dict[str, str]]
KINDS = ("where", "who", "colour")
_LEADS = (
    "Here are some notes.",
    "Please read these notes.",
    "Listen carefully.",
    "This is what happened today.",
    "Remember these things.",
)


@dataclass(frozen=True)
class Fact:
    """One person, one coloured thing, one place."""

    name: str
    past: str
    colour: str
    thing: str
    place: str

    def sentence(self) -> str:
        """Returns the fact as a sentence, which is also the full answer to a `where` question."""
        return f"{self.name} {self.past} the {self.colour} {self.thing} {self.place}."

    def question(self, kind: str) -> str:
        """Returns the question of the given kind."""
        if kind == "where":
            return f"Where did {self.name} {lexicon.VERBS[self.past]} the {self.colour} {self.thing}?"
        if kind == "who":
            return f"Who {self.past} the {self.colour} {self.thing}?"
        return f"What colour was the {self.thing} that {self.name} {self.past}?"

    def answer(self, kind: str) -> str:
        """Returns the one right answer to `question(kind)`."""
        if kind == "where":
            return self.sentence()
        if kind == "who":
            return f"{self.name} {self.past} the {self.colour} {self.thing}."
        return f"The {self.thing} was {self.colour}."


@dataclass(frozen=True)
class RecallPrompt:
    """One held-out chat whose answer can only be read from the prompt."""

    messages: Messages
    answer: str
    kind: str
    distance_tokens: int


def draw_facts(rng: random.Random, count: int, *, held_out: bool) -> list[Fact]:
    """Draws facts that no question confuses: things are unique by colour, by owner and by place.

    Names and things repeat on purpose (one in four), so that neither alone finds the answer.
    """
    facts: list[Fact] = []
    while len(facts) < count:
        name = rng.choice(facts).name if facts and rng.random() < 0.25 else rng.choice(lexicon.NAMES)
        thing = rng.choice(facts).thing if facts and rng.random() < 0.25 else rng.choice(lexicon.OBJECTS)
        fact = Fact(name, rng.choice(tuple(lexicon.VERBS)), rng.choice(lexicon.COLOURS), thing, lexicon.pick_place(rng))
        if lexicon.is_held_out(name, thing) == held_out and not any(_clash(fact, other) for other in facts):
            facts.append(fact)
    return facts


def _clash(one: Fact, other: Fact) -> bool:
    same_thing = one.thing == other.thing
    return (same_thing and (one.colour == other.colour or one.name == other.name)) or one.place == other.place


def lead(rng: random.Random) -> str:
    """Returns a sentence that opens a list of notes."""
    return rng.choice(_LEADS)


def recall_prompts(
    seed: int,
    count: int,
    min_tokens: int,
    max_tokens: int,
    count_tokens: Callable[[str], int],
    kinds: tuple[str, ...] = ("where",),
) -> Iterator[RecallPrompt]:
    """Yields held-out recall prompts, the same ones for the same seed and tokenizer.

    The asked fact comes first; distractor facts and everyday sentences follow until the distance is in bounds.

    Args:
      seed: Seed of the whole series.
      count: Number of prompts.
      min_tokens: Fewest tokens between the end of the fact and the start of the question.
      max_tokens: Most tokens between them.
      count_tokens: Counts the tokens of a text, without special tokens.
      kinds: Question kinds to draw from.

    Yields:
      The prompt with its exact answer and its measured distance.
    """
    rng = random.Random(f"recall-{seed}")
    for _ in range(count):
        kind = rng.choice(kinds)
        target = rng.randint(min_tokens, max_tokens - 20)
        asked, *others = draw_facts(rng, 4 + target // 40, held_out=True)
        between: list[str] = []
        distance = 0
        while distance < target:
            use_fact = others and (len(between) < 2 or rng.random() < 0.5)
            sentence = others.pop().sentence() if use_fact else filler_sentence(rng)
            between.append(sentence)
            distance = count_tokens(" " + " ".join(between))
        text = " ".join([lead(rng), asked.sentence(), *between, asked.question(kind)])
        yield RecallPrompt([{"role": "user", "content": text}], asked.answer(kind), kind, distance)
