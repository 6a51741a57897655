"""Measures a trained demo model in plain transformers: `python -m tools.demo_model.evaluate`.

Reports held-out loss, recall by distance and the share of well-formed sentences. The prompts come from
`facts.recall_prompts`, which needs no tensor library, so the same ones can be sent to a running cluster.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from . import lexicon, wellformed
from .corpus import Mix, documents
from .facts import KINDS, Messages, RecallPrompt, recall_prompts
from .packing import Encoder, pack
from .train import weighted_loss

DEFAULT_MODEL = Path("models/tandem-demo")
DISTANCES = ((20, 100), (100, 300), (300, 700), (700, 1100), (1100, 1800))
HELD_OUT_MIX = Mix(14, 12, recall=0.6, story=0.25, repeat=0.05, chat=0.1)
_LONGEST_ANSWER_TOKENS = 40
_LONGEST_STORY_TOKENS = 700


class Speaker:
    """A model with its tokenizer, answering chats in batches."""

    def __init__(self, directory: Path, device: str) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
        self.model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(directory).to(device).eval()
        self._device = device

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()
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
    return torch.stack(losses).mean().item()


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
    return {
        "temperature": temperature, "stories": count, "sentences": len(checked),
        "well_formed_share": round(sum(checked) / len(checked), 4),
        "keeps_hero_share": sum(
            wellformed.keeps_hero(text, name) for (text, _), name in zip(replies, names, strict=True)
        ) / count,
        "ended_share": sum(not text.endswith("…") for text, _ in replies) / count,
        "mean_tokens": sum(length for _, length in replies) / count,
    }  # fmt: skip


def main() -> None:
    """Prints all measurements, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=500, help="recall prompts up to a distance of 300 tokens")
    parser.add_argument("--stories", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    speaker = Speaker(arguments.model, arguments.device)
    loss = held_out_loss(speaker, arguments.seed, 80, arguments.device)
    print(json.dumps({"held_out_loss": round(loss, 4)}), flush=True)
    print(json.dumps({"corpus_well_formed_share": wellformed.corpus_share(arguments.seed, 500)}), flush=True)
    for temperature in (0.0, 0.8):
        print(json.dumps(stories(speaker, arguments.seed, arguments.stories, temperature)), flush=True)
    for kind in KINDS:
        for distance in DISTANCES:
            count = arguments.prompts if distance[1] <= 300 and kind == "where" else arguments.prompts // 5
            print(json.dumps(recall(speaker, arguments.seed, count, distance, kind)), flush=True)


if __name__ == "__main__":
    main()
