"""The demo model's tokenizer: byte-level BPE, trained on the corpus, with the chat template.

Owns the special tokens and the template. Every byte is a token, so any text can be encoded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import lexicon, smalltalk
from .corpus import Mix, documents

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)]
VOCABULARY_SIZE = 1536
CONTEXT_TOKENS = 2048
_DOCUMENT_COUNT = 1500
# Repeating the word list makes every name and thing one token, both inside a sentence and at the start of a message.
_WORD_REPEATS = 40

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the same code gives the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the tokenizer's files, readable by both current major versions of transformers."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _texts() -> Iterator[str]:
    words = [*lexicon.NAMES, *lexicon.OBJECTS, *lexicon.COLOURS, *lexicon.PLACE_ADJECTIVES, *lexicon.PLACES]
    words += [*lexicon.ANIMALS, *lexicon.PET_NAMES, *lexicon.FOODS, *lexicon.VERBS, *lexicon.VERBS.values()]
    for _ in range(_WORD_REPEATS):
        yield from (f" {word}" for word in words)
        yield from lexicon.NAMES
    yield from smalltalk.all_texts() * 5
    mix = Mix(max_facts=8, max_filler=8, recall=0.4, story=0.4, repeat=0.0, chat=0.2)
    for document in itertools.islice(documents("tokenizer", mix), _DOCUMENT_COUNT):
        yield from (turn.text for turn in document)
