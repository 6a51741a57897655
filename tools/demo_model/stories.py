"""Small stories, in the order of one day so that a greedy reader always moves forward.

Owns the story grammar: one hero, one friend, one pet, one coloured thing, and a plot in the afternoon. Every choice is
drawn from the generator passed in. Standard library only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import lexicon
from .lexicon import Person, article

_WEATHER = ("sunny", "windy", "rainy", "cold", "warm", "foggy", "bright")
_MOODS = ("happy", "proud", "excited", "cheerful")
_FEARS = ("sad", "worried", "afraid")
_LESSONS = (
    "that good friends always help each other",
    "that small things can be great treasures",
    "that it is good to share",
    "that being brave does not mean being alone",
)


@dataclass(frozen=True)
class Cast:
    """Everything a story must keep consistent from its first line to its last."""

    hero: Person
    friend: Person
    animal: str
    pet: str
    colour: str
    thing: str
    home: str
    hiding_place: str

    @property
    def treasure(self) -> str:
        """The coloured thing, without an article."""
        return f"{self.colour} {self.thing}"


def draw_cast(
    rng: random.Random, name: str | None = None, friend: str | None = None, treasure: tuple[str, str] | None = None
) -> Cast:
    """Draws a cast around the given hero, friend and (colour, thing), choosing at random what is not given."""
    hero = name or rng.choice(lexicon.NAMES)
    other = friend or rng.choice([one for one in lexicon.NAMES if one != hero])
    colour, thing = treasure or (rng.choice(lexicon.COLOURS), rng.choice(lexicon.OBJECTS))
    while treasure is None and lexicon.is_held_out(hero, thing):
        thing = rng.choice(lexicon.OBJECTS)
    pet = rng.choice([one for one in lexicon.PET_NAMES if one.lower() != thing])
    home, hiding = lexicon.pick_landmark(rng), lexicon.pick_place(rng)
    return Cast(
        lexicon.person(hero), lexicon.person(other), rng.choice(lexicon.ANIMALS), pet, colour, thing, home, hiding
    )


def tell_story(rng: random.Random, cast: Cast) -> str:
    """Returns a whole story of about 250 to 450 tokens in five paragraphs."""
    plot = rng.choice((_plot_lost, _plot_gift, _plot_storm))
    parts = (_opening, _morning, plot, _evening, _ending)
    return "\n\n".join(" ".join(part(rng, cast)) for part in parts)


def _opening(rng: random.Random, cast: Cast) -> list[str]:
    hero, she = cast.hero, cast.hero.subject.capitalize()
    lines = [
        f"Once upon a time, there was a {hero.noun} named {hero.name}.",
        f"{she} lived in a small house {cast.home}.",
        f"{she} had {article(cast.animal)} named {cast.pet}.",
        f"{hero.name} and {cast.pet} did everything together.",
    ]
    origin = rng.choice(
        (
            f"One day, {hero.name} found {article(cast.treasure)} {lexicon.pick_place(rng)}.",
            f"For {hero.possessive} birthday, {hero.name} got {article(cast.treasure)}.",
            f"{hero.name} also had {article(cast.treasure)}.",
        )
    )
    love = f"{she} loved the {cast.treasure} more than anything else in the world."
    return [*lines, origin, love]


def _morning(rng: random.Random, cast: Cast) -> list[str]:
    hero, friend, she = cast.hero, cast.friend, cast.hero.subject.capitalize()
    return [
        f"One {rng.choice(_WEATHER)} morning, {hero.name} woke up early and ate some {rng.choice(lexicon.FOODS)}.",
        f"Then {hero.subject} took the {cast.treasure} and went for a walk with {cast.pet}.",
        f"On the way, {hero.name} met {hero.possessive} friend {friend.name}.",
        f'"Good morning, {hero.name}!" said {friend.name}. "What do you have there?"',
        f'"This is my {cast.treasure}," said {hero.name}. "Do you want to come with us?"',
        rng.choice(
            (
                f'"Yes, I do!" said {friend.name}, and they walked on together.',
                f'"I would love to!" said {friend.name}. So they all went together.',
            )
        ),
        rng.choice(
            (
                f"They sang a song, and {cast.pet} ran ahead.",
                f"{she} showed {friend.name} the way, and {cast.pet} ran behind them.",
            )
        ),
    ]


def _plot_lost(rng: random.Random, cast: Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    first, second, third = (lexicon.pick_place(rng) for _ in range(3))
    return [
        f"In the afternoon, they stopped to rest {lexicon.pick_place(rng)}.",
        f"Suddenly, {hero.name} saw that the {cast.treasure} was gone.",
        f'"Oh no!" cried {hero.name}. "Where is my {cast.thing}?"',
        f"{hero.name} was very {rng.choice(_FEARS)}.",
        f'"Do not worry," said {friend.name}. "We will find it."',
        f"First they looked {first}, but the {cast.thing} was not there.",
        f"Next they looked {second}, but they only found {article(rng.choice(lexicon.OBJECTS))}.",
        f"At last, {cast.pet} the {cast.animal} found the {cast.treasure} {third}.",
        f'"Well done, {cast.pet}!" said {friend.name}, and everyone laughed.',
    ]


def _plot_gift(rng: random.Random, cast: Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    return [
        f"In the afternoon, they came to a house {lexicon.pick_landmark(rng)}.",
        f"An old man sat there, and he looked very {rng.choice(_FEARS)}.",
        f'"What is the matter?" asked {hero.name}.',
        f'"I lost my {cast.thing} a long time ago," said the old man, "and I miss it every day."',
        f"{hero.name} thought about it for a while.",
        f'"You can hold my {cast.treasure}," said {hero.name}, and the old man smiled.',
        f"Then {friend.name} made some {rng.choice(lexicon.FOODS)}, and they all ate together.",
        f'"Thank you, {hero.name}," said the old man. "You have a kind heart. Now take your {cast.thing} home."',
    ]


def _plot_storm(rng: random.Random, cast: Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    return [
        "In the afternoon, the sky turned dark, and a big storm began.",
        f'"We must find a dry place!" cried {friend.name}.',
        f"They ran as fast as they could and waited {lexicon.pick_place(rng)}.",
        f"{cast.pet} the {cast.animal} was {rng.choice(_FEARS)}, so {hero.name} held {cast.pet} close.",
        f"{friend.name} told a funny story about {article(rng.choice(lexicon.ANIMALS))} and "
        f"{article(rng.choice(lexicon.OBJECTS))}.",
        f"{hero.name} laughed, and soon nobody was afraid.",
        f'When the rain stopped, {hero.name} looked up and said, "Look, {friend.name}, a rainbow!"',
        f"The {cast.treasure} was wet, but it was not broken.",
    ]


def _evening(rng: random.Random, cast: Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    return [
        f"In the evening, {hero.name} and {friend.name} walked home.",
        rng.choice(
            (
                f"They were tired but {rng.choice(_MOODS)}.",
                f"The stars were bright, and {friend.name} was {rng.choice(_MOODS)}.",
            )
        ),
        f'"Today was a good day," said {friend.name}. "See you tomorrow, {hero.name}!"',
        f"{hero.name} gave {cast.pet} some {rng.choice(lexicon.FOODS)}.",
        f"Then {hero.name} hid the {cast.treasure} {cast.hiding_place}.",
    ]


def _ending(rng: random.Random, cast: Cast) -> list[str]:
    hero, she = cast.hero, cast.hero.subject.capitalize()
    return [
        f"That night, {hero.name} lay in bed and thought about the day.",
        f"{she} had learned {rng.choice(_LESSONS)}.",
        f"{hero.name} closed {hero.possessive} eyes, and {cast.pet} slept next to {hero.objective}.",
        "The end.",
    ]


def filler_sentence(rng: random.Random) -> str:
    """Returns one everyday sentence that says nothing about where a thing is."""
    one, other = rng.sample(lexicon.NAMES, 2)
    who = lexicon.person(one)
    return rng.choice(
        (
            f"It was a {rng.choice(_WEATHER)} day.",
            f"{who.name} ate some {rng.choice(lexicon.FOODS)}.",
            f"{who.name} saw {article(rng.choice(lexicon.ANIMALS))}, and {who.subject} was {rng.choice(_MOODS)}.",
            f"{who.name} met {other} {lexicon.pick_place(rng)}.",
            f'"Good morning," said {who.name}.',
            f"{who.name} went for a walk with {other}.",
            "The sky turned dark, and a storm began.",
            f"{who.name} told {other} a funny story.",
            f"{who.name} was {rng.choice(_FEARS)}, but {other} helped {who.objective}.",
            f"They sang a song, and {who.name} laughed.",
        )
    )
