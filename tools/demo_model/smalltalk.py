"""Short chat turns: greetings, questions about the model, polite refusals, and repeating a text.

Owns the fixed question and answer pairs. Standard library only.
"""

from __future__ import annotations

import random

from . import lexicon

_GREETING = "Hello! I am Tandem's demo model. How can I help you?"
_IDENTITY = "I am Tandem's demo model. I tell small stories and answer questions about them."
_TANDEM = (
    "Tandem serves language models. One worker reads the prompt, and another worker writes the answer. "
    "Together they are fast."
)
_SKILLS = "I can tell a story, answer a question about a text, and repeat a short text."
_LIMITS = "I am a very small model. I only know small stories and the text you give me."
_ENGLISH = "I only understand simple English."
_PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Good morning!", "Good evening!", "Hey!", "Hello there."),
        _GREETING,
    ),
    (("How are you?", "Are you well?", "How do you do?", "How are you today?"), "I am fine, thank you. How are you?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"),
        _IDENTITY,
    ),
    (("What is Tandem?", "What does Tandem do?", "Tell me about Tandem.", "How does Tandem work?"), _TANDEM),
    (("What can you do?", "How can you help me?", "Help", "Help me!", "What do you know?"), _SKILLS),
    (("Thank you.", "Thank you!", "Thanks!", "Thanks", "Well done!", "Great!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Good night.", "See you tomorrow!", "Bye"), "Goodbye! Have a good day."),
    (("Who made you?", "Where do you come from?", "Who built you?"), "I was made for Tandem from small stories."),
    (("Say hello.", "Say hello!", "Please say hello."), "Hello!"),
    (
        (
            "What is the capital of France?",
            "Write a program.",
            "What is two plus two?",
            "What is the time?",
            "Who is the president?",
            "Explain how a computer works.",
            "What is the meaning of life?",
            "How far away is the moon?",
            "Write a poem about the sea.",
            "Count to ten.",
            "What should I eat today?",
            "Translate this text.",
            "How do I cook rice?",
            "Why is the sky blue?",
        ),
        _LIMITS,
    ),
)
_FOREIGN = (
    "你好", "世界", "Привет", "мир", "こんにちは", "안녕하세요", "مرحبا", "שלום", "γειά", "नमस्ते", "¡Hola!", "¿Qué?",
    "Guten Tag", "Bonjour", "où", "café", "naïve", "żółw", "🙂", "🚀", "🎉", "🐢", "👋", "❤️",
)  # fmt: skip
_SYMBOLS = lexicon.words("🙂 🚀 🎉 🐢 👋 é ü ñ ß 你 好 世 界 мир ∑ € 1 2 3 4 5 6 7 8 9 0")
_REPEAT = ("Repeat: ", "Please repeat: ", "Repeat after me: ", "Say this: ")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Tandem's demo model.",
    "Answer the question from the text.",
    "You tell small stories.",
    "Be brief.",
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Returns one user turn and the reply to it."""
    if rng.random() < 0.08:
        return " ".join(rng.choice(_FOREIGN) for _ in range(rng.randint(1, 4))), _ENGLISH
    asked, reply = rng.choice(_PAIRS)
    return rng.choice(asked), reply


def repeat_turn(rng: random.Random, word_count: int) -> tuple[str, str]:
    """Returns a request to repeat random words, and the words."""
    pools = (lexicon.NAMES, lexicon.OBJECTS, lexicon.COLOURS, lexicon.ANIMALS, lexicon.FOODS, tuple(lexicon.PLACES))
    words = [rng.choice(rng.choice(pools)) for _ in range(word_count)]
    if rng.random() < 0.25:
        words = [rng.choice(_SYMBOLS) if rng.random() < 0.5 else word for word in words]
    text = " ".join(words)
    return rng.choice(_REPEAT) + text, text


def all_texts() -> list[str]:
    """Returns every fixed text, for the tokenizer's corpus."""
    return [text for asked, reply in _PAIRS for text in (*asked, reply)] + [_ENGLISH, *_REPEAT, *SYSTEM_PROMPTS]
