"""The training documents: chats and plain texts, drawn from one seeded generator.

A document is a list of turns; each turn carries the weight of its tokens in the loss. Names no tensor and no token:
`packing` turns documents into rows. Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import facts, lexicon, smalltalk, stories

# Answers count most, since they are what the model is for. Prompts count in full: a question repeats words of its fact,
# so predicting it teaches the look-up too. At 100 to 300 tokens, 200 prompts, two runs that differed in nothing else:
# recall of 74.5 % with a weight of 0.5, of 99.5 % with 1.0.
PROMPT_WEIGHT = 1.0
STORY_WEIGHT = 1.0
ANSWER_WEIGHT = 3.0

_ASK_STORY = (
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
)


@dataclass(frozen=True)
class Turn:
    """One message. The role `text` is plain text outside any chat."""

    role: str
    text: str
    weight: float
    ends: bool = True


@dataclass(frozen=True)
class Mix:
    """What one phase of the training draws: the length of its recall documents and the share of each kind."""

    max_facts: int
    max_filler: int
    recall: float
    story: float
    repeat: float
    chat: float


def documents(seed: str, mix: Mix) -> Iterator[list[Turn]]:
    """Yields documents of the mix for ever; the same seed yields the same documents."""
    rng = random.Random(seed)
    shares = [mix.recall, mix.story, mix.repeat, mix.chat]
    while True:
        kind = rng.choices(("recall", "story", "repeat", "chat"), shares)[0]
        if kind == "recall":
            yield _plain_recall(rng, mix) if rng.random() < 0.1 else _chat_recall(rng, mix)
        elif kind == "story":
            yield _plain_story(rng) if rng.random() < 0.25 else _chat_story(rng)
        elif kind == "repeat":
            yield _exchange(smalltalk.repeat_turn(rng, rng.randint(2, 12)))
        else:
            yield _small_talk(rng)


def _system(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.8:
        return []
    return [Turn("system", rng.choice(smalltalk.SYSTEM_PROMPTS), PROMPT_WEIGHT)]


def _exchange(pair: tuple[str, str]) -> list[Turn]:
    return [Turn("user", pair[0], PROMPT_WEIGHT), Turn("assistant", pair[1], ANSWER_WEIGHT)]


def _small_talk(rng: random.Random) -> list[Turn]:
    turns = _system(rng)
    for _ in range(rng.randint(1, 3)):
        turns += _exchange(smalltalk.small_talk(rng))
    return turns


def _notes(rng: random.Random, mix: Mix) -> tuple[list[facts.Fact], str]:
    """Draws facts and the text that has them among everyday sentences."""
    given = facts.draw_facts(rng, rng.randint(1, mix.max_facts), held_out=False)
    sentences = [fact.sentence() for fact in given]
    for _ in range(rng.randint(0, mix.max_filler)):
        sentences.insert(rng.randint(0, len(sentences)), stories.filler_sentence(rng))
    if rng.random() < 0.7:
        sentences.insert(0, facts.lead(rng))
    return given, " ".join(sentences)


def _questions(rng: random.Random, given: list[facts.Fact], count: int) -> list[tuple[str, str]]:
    """Draws questions about different facts, half of them about the place."""
    asked = rng.sample(given, min(count, len(given)))
    kinds = [rng.choice(("where", "where", "where", "where", "who", "colour")) for _ in asked]
    return [(fact.question(kind), fact.answer(kind)) for fact, kind in zip(asked, kinds, strict=True)]


def _chat_recall(rng: random.Random, mix: Mix) -> list[Turn]:
    given, text = _notes(rng, mix)
    (question, answer), *more = _questions(rng, given, rng.randint(1, 6))
    turns = [*_system(rng), *_exchange((f"{text} {question}", answer))]
    for pair in more:
        if rng.random() < 0.1:
            turns += _exchange(smalltalk.small_talk(rng))
        turns += _exchange(pair)
    return turns


def _plain_recall(rng: random.Random, mix: Mix) -> list[Turn]:
    given, text = _notes(rng, mix)
    pairs = _questions(rng, given, rng.randint(1, 4))
    turns = [Turn("text", text, PROMPT_WEIGHT, ends=False)]
    for index, (question, answer) in enumerate(pairs, start=1):
        turns.append(Turn("text", f"\nQuestion: {question}\nAnswer:", PROMPT_WEIGHT, ends=False))
        turns.append(Turn("text", f" {answer}", ANSWER_WEIGHT, ends=index == len(pairs)))
    return turns


def _plain_story(rng: random.Random) -> list[Turn]:
    return [Turn("text", stories.tell_story(rng, stories.draw_cast(rng)), STORY_WEIGHT)]


def _chat_story(rng: random.Random) -> list[Turn]:
    cast = stories.draw_cast(rng)
    subject = rng.choice(
        (
            cast.hero.name,
            cast.hero.name,
            f"{cast.hero.name} and {cast.friend.name}",
            f"{cast.hero.name} and {lexicon.article(cast.treasure)}",
            f"{lexicon.article(cast.treasure)}",
        )
    )
    turns = [*_system(rng), Turn("user", rng.choice(_ASK_STORY).format(subject), PROMPT_WEIGHT)]
    turns.append(Turn("assistant", stories.tell_story(rng, cast), STORY_WEIGHT))
    for pair in rng.sample(story_questions(cast), rng.randint(0, 3)):
        turns += _exchange(pair)
    return turns


def story_questions(cast: stories.Cast) -> list[tuple[str, str]]:
    """Returns the questions about a story of this cast, with their right answers."""
    hero, friend = cast.hero, cast.friend
    hidden = f"{hero.name} hid the {cast.treasure} {cast.hiding_place}."
    return [
        (f"Where did {hero.name} hide the {cast.treasure}?", hidden),
        (f"Who was the friend of {hero.name}?", f"{hero.name} met {hero.possessive} friend {friend.name}."),
        (f"What colour was the {cast.thing}?", f"The {cast.thing} was {cast.colour}."),
        (f"What was the name of the {cast.animal}?", f"The {cast.animal} was named {cast.pet}."),
    ]
