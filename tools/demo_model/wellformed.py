"""The rules that say whether a generated sentence is well formed, and whether a story keeps its names straight.

A sentence is well formed if it starts with a capital or an opening quotation mark, ends with `.`, `!`, `?` or a closing
quotation mark, uses only words of the corpus, and holds a known verb. A story keeps its names straight if one hero, one
friend, one pet and one coloured thing go through it under the same names. Standard library only.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from . import lexicon
from .corpus import Mix, documents
from .stories import draw_cast, tell_story

_SPLIT = re.compile(r'(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]")\s+(?=["A-Z])')
_WORD = re.compile(r"[A-Za-z']+")
_PERSON = re.compile(rf"\b({'|'.join(lexicon.NAMES)})\b")
_PET = re.compile(rf"\b({'|'.join(lexicon.PET_NAMES)})\b")
_ANIMAL = re.compile(rf"\b({'|'.join(lexicon.ANIMALS)}) named|\b(?:{'|'.join(lexicon.PET_NAMES)}) the (\w+)")
_TREASURE = re.compile(rf"\b({'|'.join(lexicon.COLOURS)}) (\w+)")
# `The end.` is the one sentence without a verb.
_VERBS = lexicon.words(
    "were is am are be had have has lived did do found got loved woke ate took went met said want love walked "
    "sang ran showed stopped saw gone cried worry find looked was laughed came sat asked lost miss thought hold "
    "smiled made thank take turned began must waited held told look see gave lay learned closed slept named "
    "hid left put kept dropped helped end"
)


def known_words() -> set[str]:
    """Returns every word, in lower case, that the corpus can use in stories and answers."""
    words = {word.lower() for word in [*lexicon.NAMES, *lexicon.OBJECTS, *lexicon.COLOURS, *lexicon.PLACES]}
    for document in itertools.islice(documents("words", Mix(8, 8, recall=0.5, story=0.4, repeat=0, chat=0.1)), 2000):
        for turn in document:
            words.update(word.lower() for word in _WORD.findall(turn.text))
    return words


def sentences(text: str) -> list[str]:
    """Splits a story into sentences; what someone says stays with `said`."""
    return [part for paragraph in text.split("\n") for part in _SPLIT.split(paragraph.strip()) if part]


def is_well_formed(sentence: str, words: set[str]) -> bool:
    """Applies the rule of this module to one sentence."""
    found = [word.lower() for word in _WORD.findall(sentence)]
    starts = re.match(r'"?[A-Z]', sentence) is not None
    ends = re.search(r'[.!?]"?$', sentence) is not None
    return starts and ends and all(word in words for word in found) and any(w in _VERBS for w in found)


def keeps_hero(text: str, name: str) -> bool:
    """Returns whether the hero is named in every paragraph of the story."""
    return all(name in paragraph for paragraph in text.split("\n\n"))


@dataclass(frozen=True)
class Named:
    """Who and what a story names, everywhere in it."""

    people: frozenset[str]
    pets: frozenset[str]
    animals: frozenset[str]
    treasures: frozenset[str]


def named(text: str) -> Named:
    """Returns every person, pet, kind of pet and coloured thing that the story names."""
    return Named(
        people=frozenset(_PERSON.findall(text)),
        pets=frozenset(_PET.findall(text)),
        animals=frozenset(one or other for one, other in _ANIMAL.findall(text)),
        treasures=frozenset(f"{colour} {thing}" for colour, thing in _TREASURE.findall(text)),
    )


def keeps_names(text: str, hero: str) -> bool:
    """Returns whether the hero, one friend, one pet of one kind and one coloured thing are all the story names."""
    found = named(text)
    counts = [len(one) for one in (found.people, found.pets, found.animals, found.treasures)]
    return hero in found.people and counts == [2, 1, 1, 1]


def friend_span(text: str, hero: str) -> str:
    """Returns the text from the first to the last mention of anyone but the hero."""
    others = [one for one in _PERSON.finditer(text) if one.group() != hero]
    return text[others[0].start() : others[-1].end()] if others else ""


def corpus_share(seed: int, story_count: int) -> float:
    """Returns the share of well-formed sentences in the corpus itself, which must be 1."""
    rng, words = random.Random(seed), known_words()
    checked = [is_well_formed(s, words) for _ in range(story_count) for s in sentences(tell_story(rng, draw_cast(rng)))]
    return sum(checked) / len(checked)


def corpus_names_share(seed: int, story_count: int) -> float:
    """Returns the share of stories in the corpus itself that keep their names straight, which must be 1."""
    rng = random.Random(seed)
    casts = [draw_cast(rng) for _ in range(story_count)]
    return sum(keeps_names(tell_story(rng, cast), cast.hero.name) for cast in casts) / story_count
