"""The words of the demo model's little world: people, things, colours and places.

Owns the word lists and the rule that splits them into training and held-out combinations. Holds no grammar: sentences
are built in `facts`, `stories` and `smalltalk`. Standard library only.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """Splits a list of words at its spaces."""
    return tuple(text.split())


GIRLS = words(
    "Mia Anna Lucy Emma Nora Ella Ruby Rosa Lily Sara Clara Alice Julia Ivy Maya Nina Tess Zoe Hana Vera "
    "Olga Dora Elsa Greta Ines Kira Leah Mona Petra Wanda"
)
BOYS = words(
    "Ben Tom Max Leo Sam Jack Noah Finn Oscar Hugo Adam Eric Felix Henry Ivan Jonas Karl Luca Milo Nick "
    "Owen Paul Ravi Simon Theo Victor Walter Yusuf Omar Peter"
)
NAMES = GIRLS + BOYS
COLOURS = words("red blue green yellow white black brown golden silver purple orange pink")
OBJECTS = words(
    "key ball book box cup hat kite lamp map ring bell boat coin drum flag flute brush basket blanket bottle bowl "
    "button candle card chair clock coat crown doll feather glove hammer horn jar kettle ladder letter mask "
    "mirror mug needle paddle pen pencil pillow pipe plate pot puppet purse ribbon rope scarf shell shirt shoe "
    "spoon stamp star stone stool sword teapot ticket torch towel toy train trumpet umbrella vase violin wagon "
    "wallet watch wheel whistle"
)
PLACE_ADJECTIVES = words("old small big quiet dark tall long round little empty wide narrow warm cold")
# Each noun has one preposition, so that recalling a place means recalling the adjective and the noun.
PLACES = {
    "barn": "in",
    "garden": "in",
    "kitchen": "in",
    "cellar": "in",
    "attic": "in",
    "tower": "in",
    "cave": "in",
    "forest": "in",
    "school": "in",
    "library": "in",
    "bakery": "in",
    "cabin": "in",
    "tent": "in",
    "castle": "in",
    "mill": "in",
    "stable": "in",
    "bridge": "under",
    "bed": "under",
    "table": "under",
    "bench": "under",
    "tree": "under",
    "door": "behind",
    "fence": "behind",
    "wall": "behind",
    "shed": "behind",
    "hedge": "behind",
    "shelf": "on",
    "roof": "on",
    "hill": "on",
    "window": "near",
    "river": "near",
    "pond": "near",
    "well": "near",
    "gate": "near",
    "fountain": "near",
    "lighthouse": "near",
}
ANIMALS = words("dog cat rabbit pony goat parrot duck turtle mouse owl")
PET_NAMES = words("Biscuit Pepper Sunny Coco Shadow Button Clover Misty Rusty Star Patch Honey")
FOODS = words("bread soup cake apples cheese pie pancakes honey berries nuts plums cookies")
VERBS = {"hid": "hide", "left": "leave", "put": "put", "kept": "keep", "dropped": "drop", "lost": "lose"}
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Person:
    """A named person with the pronouns used for them."""

    name: str
    noun: str
    subject: str
    possessive: str
    objective: str


def person(name: str) -> Person:
    """Returns the person called `name`."""
    if name in GIRLS:
        return Person(name, "girl", "she", "her", "her")
    return Person(name, "boy", "he", "his", "him")


def is_held_out(name: str, thing: str) -> bool:
    """Returns whether this name and object never meet in a training fact (one pair in eight)."""
    return zlib.crc32(f"{name}|{thing}".encode()) % HELD_OUT_SHARE == 0


def pick_place(rng: random.Random) -> str:
    """Returns a place such as `in the old barn`."""
    noun = rng.choice(tuple(PLACES))
    return f"{PLACES[noun]} the {rng.choice(PLACE_ADJECTIVES)} {noun}"


def pick_landmark(rng: random.Random) -> str:
    """Returns a place where a house can stand, such as `near the wide river`."""
    noun = rng.choice([one for one, preposition in PLACES.items() if preposition == "near" and one != "window"])
    return f"near the {rng.choice(PLACE_ADJECTIVES)} {noun}"


def article(phrase: str) -> str:
    """Returns `phrase` after the right indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
