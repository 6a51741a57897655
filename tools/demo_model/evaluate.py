"""Measures a trained demo model in plain transformers: `python -m tools.demo_model.evaluate`.

Reports held-out loss, recall by distance, well-formed sentences, and whether stories keep their names straight. The
recall prompts come from `facts.recall_prompts`, which needs no tensor library: a running cluster can be asked the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from . import lexicon, wellformed
from .corpus import Mix, documents, story_questions
from .facts import KINDS, Messages, RecallPrompt, recall_prompts
from .packing import Encoder, pack
from .stories import draw_cast, tell_story
from .train import weighted_loss

DEFAULT_MODEL = Path("models/tandem-demo")
DISTANCES = ((20, 100), (100, 300), (300, 700), (700, 1100), (1100, 1800))
HELD_OUT_MIX = Mix(14, 12, recall=0.6, story=0.25, repeat=0.05, chat=0.1)
_LONGEST_ANSWER_TOKENS = 40
_LONGEST_STORY_TOKENS = 700
PARTS = ("loss", "stories", "recall")


class Speaker:
    """A model with its tokenizer, answering chats in batches."""

    def __init__(self, directory: Path, device: str) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
        self.model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(directory).to(device).eval()
        self._device = device

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()  # type: ignore[untyped-decorator] # torch is not followed
    def answer(self, chats: Sequence[Messages], max_new_tokens: int, temperature: float = 0.0) -> list[tuple[str, int]]:
        """Returns each reply and its length in tokens; a reply that was cut off ends in an ellipsis."""
        texts = [self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        output = self.model.generate(
            input_ids=batch["input_ids"].to(self._device),
            attention_mask=batch["attention_mask"].to(self._device),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        return [self._read(row[batch["input_ids"].shape[1] :].tolist()) for row in output]

    def _read(self, ids: list[int]) -> tuple[str, int]:
        end = self.tokenizer.eos_token_id
        length = ids.index(end) if end in ids else len(ids)
        return self.tokenizer.decode(ids[:length]) + ("" if end in ids else "…"), length


def held_out_loss(speaker: Speaker, seed: int, row_count: int, device: str) -> float:
    """Returns the weighted loss on rows of 512 tokens that the training never drew."""
    rows = pack(documents(f"held-out-{seed}", HELD_OUT_MIX), Encoder(speaker.tokenizer), 512)
    with torch.inference_mode():
        losses = [weighted_loss(speaker.model, [next(rows) for _ in range(4)], device) for _ in range(row_count // 4)]
    return float(torch.stack(losses).mean())


def recall(speaker: Speaker, seed: int, count: int, distance: tuple[int, int], kind: str) -> dict[str, object]:
    """Returns the share of exactly right answers at one distance, with the first wrong one as an example."""
    prompts = list(recall_prompts(seed, count, *distance, speaker.count_tokens, (kind,)))
    wrong: list[dict[str, str]] = []
    for start in range(0, count, 25):
        part: list[RecallPrompt] = prompts[start : start + 25]
        replies = speaker.answer([prompt.messages for prompt in part], _LONGEST_ANSWER_TOKENS)
        for prompt, (reply, _) in zip(part, replies, strict=True):
            if reply.strip() != prompt.answer:
                wrong.append({"expected": prompt.answer, "got": reply})
    right = count - len(wrong)
    return {
        "kind": kind, "distance_tokens": list(distance), "prompts": count, "right": right,
        "share": round(right / count, 4), "first_wrong": wrong[:1],
    }  # fmt: skip


def stories(speaker: Speaker, seed: int, count: int, temperature: float) -> dict[str, object]:
    """Returns how well formed, how long and how consistent the stories about `count` names are."""
    names = random.Random(f"stories-{seed}").sample(lexicon.NAMES, count)
    torch.manual_seed(seed)
    chats = [[{"role": "user", "content": f"Tell me a story about {name}."}] for name in names]
    replies = speaker.answer(chats, _LONGEST_STORY_TOKENS, temperature)
    words = wellformed.known_words()
    checked = [wellformed.is_well_formed(one, words) for text, _ in replies for one in wellformed.sentences(text)]
    named = [(text, name) for (text, _), name in zip(replies, names, strict=True)]
    spans = [speaker.count_tokens(wellformed.friend_span(text, name)) for text, name in named]
    return {
        "temperature": temperature, "stories": count, "sentences": len(checked),
        "well_formed_share": round(sum(checked) / len(checked), 4),
        "keeps_hero_share": round(sum(wellformed.keeps_hero(*one) for one in named) / count, 4),
        "keeps_names_share": round(sum(wellformed.keeps_names(*one) for one in named) / count, 4),
        "first_slip": next((name for text, name in named if not wellformed.keeps_names(text, name)), None),
        "mean_tokens_between_first_and_last_mention_of_friend": round(sum(spans) / count),
        "ended_share": round(sum(not text.endswith("…") for text, _ in replies) / count, 4),
        "mean_tokens": round(sum(length for _, length in replies) / count),
    }  # fmt: skip


def story_answers(speaker: Speaker, seed: int, count: int) -> list[dict[str, object]]:
    """Returns the share of right answers to questions about a whole story earlier in the chat.

    Hero and thing are a held-out pair. The four questions ask for the hiding place, the friend, the colour and the pet.
    """
    rng = random.Random(f"story-answers-{seed}")
    chats: list[list[tuple[Messages, str]]] = []
    lengths: list[int] = []
    while len(chats) < count:
        name, thing = rng.choice(lexicon.NAMES), rng.choice(lexicon.OBJECTS)
        if not lexicon.is_held_out(name, thing):
            continue
        cast = draw_cast(rng, name, treasure=(rng.choice(lexicon.COLOURS), thing))
        story = tell_story(rng, cast)
        lengths.append(speaker.count_tokens(story))
        turns = [("user", f"Tell me a story about {name}."), ("assistant", story)]
        chats.append(
            [
                ([{"role": role, "content": text} for role, text in [*turns, ("user", question)]], answer)
                for question, answer in story_questions(cast)
            ]
        )
    found: list[dict[str, object]] = []
    for index, kind in enumerate(("where", "friend", "colour", "pet")):
        asked = [chat[index] for chat in chats]
        replies = [
            reply
            for start in range(0, count, 25)
            for reply, _ in speaker.answer([chat for chat, _ in asked[start : start + 25]], _LONGEST_ANSWER_TOKENS)
        ]
        right = sum(reply.strip() == answer for reply, (_, answer) in zip(replies, asked, strict=True))
        found.append(
            {"story_question": kind, "stories": count, "right": right, "mean_story_tokens": round(sum(lengths) / count)}
        )
    return found


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=500, help="recall prompts up to a distance of 300 tokens")
    parser.add_argument("--stories", type=int, default=len(lexicon.NAMES), help="stories, at most one for each name")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    return parser.parse_args()


def main() -> None:
    """Prints the measurements, one JSON object a line."""
    arguments = parse_arguments()
    torch.set_num_threads(2)
    speaker = Speaker(arguments.model, arguments.device)
    for part in [arguments.only] if arguments.only else PARTS:
        for line in measure(part, speaker, arguments):
            print(json.dumps(line), flush=True)


def measure(part: str, speaker: Speaker, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields the measurements of one part."""
    seed = arguments.seed
    if part == "loss":
        yield {"held_out_loss": round(held_out_loss(speaker, seed, 80, arguments.device), 4)}
    elif part == "stories":
        shares = wellformed.corpus_share(seed, 500), wellformed.corpus_names_share(seed, 500)
        yield {"corpus_well_formed_share": shares[0], "corpus_keeps_names_share": shares[1]}
        for temperature in (0.0, 0.8):
            yield stories(speaker, seed, arguments.stories, temperature)
        yield from story_answers(speaker, seed, arguments.prompts // 5)
    else:
        yield from all_recall(speaker, seed, arguments.prompts)


def all_recall(speaker: Speaker, seed: int, prompts: int) -> Iterator[dict[str, object]]:
    """Yields recall for every kind of question and distance; the two that matter most get all the prompts."""
    for kind in KINDS:
        for distance in DISTANCES:
            count = prompts if distance[1] <= 300 and kind == "where" else prompts // 5
            yield recall(speaker, seed, count, distance, kind)


if __name__ == "__main__":
    main()
