"""Writes a small Llama with random weights and a byte-level BPE tokenizer trained on text made here.

For tests of the real engine: its output is nonsense but reproducible, and every Unicode text round-trips its tokenizer.
The same arguments and seed give the same files, byte for byte (same torch, transformers and tokenizers).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

CONTEXT_TOKENS_MAX = 4096
VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, EOS, PAD, END = (SPECIAL_TOKENS.index(t) for t in ("<s>", "</s>", "<pad>", "<|end|>"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCE_PARTS = (
    ("the engine", "a router", "the old ship", "our neighbour", "every token", "a small town", "the decoder"),
    ("carries", "watches", "forgets", "answers", "moves past", "remembers", "counts", "waits for"),
    ("the river", "two letters", "a page of memory", "the last train", "bread and music", "a number", "snow"),
    ("today", "at night", "again and again", "before the rain", "without a word", "in 1984", "slowly"),
)
SYLLABLES = (
    *("ba", "ko", "ri", "tu", "me", "lan", "dor", "vis", "per", "ash"),
    *("ond", "ile", "gra", "fen", "mor", "sti", "que", "zan", "hul", "wex"),
)
OTHER_SCRIPTS = (
    "Zwei Läufer, eine Staffel: wer den Stab verliert, fängt von vorne an.",
    "Быстрая лиса перепрыгнула через ленивую собаку.",
    "東京は今日も雨です。 你好，世界！ 안녕하세요 🙂🚀",
    'def relay(tokens): return {"tokens": [t for t in tokens if t is not None]}  # 0123456789',
)


def corpus(seed: int) -> list[str]:
    """A few hundred sentences, and some that make sure other scripts and code are seen."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choice(words) for words in SENTENCE_PARTS).capitalize() + "." for _ in range(600)]
    # Invented words, so that there are enough merges to fill the vocabulary.
    words = ["".join(draw.choice(SYLLABLES) for _ in range(draw.randint(2, 4))) for _ in range(400)]
    return sentences + [" ".join(draw.sample(words, 12)) + "." for _ in range(400)] + list(OTHER_SCRIPTS) * 5


def write_tokenizer(out: Path, seed: int) -> None:
    """Train and write tokenizer.json, and the configuration beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    # Every id the model can emit has a text.
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": CONTEXT_TOKENS_MAX,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_model(out: Path, hidden: int, layers: int, seed: int, dtype: str) -> int:
    """Write config.json, generation_config.json and the weights; return the number of parameters.

    The weights have a large standard deviation (0.2), so that logits differ clearly and greedy outputs depend on the
    prompt.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=[EOS, END],
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD)
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def write_json(file: Path, value: object) -> None:
    """Write it the same way every time."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Parse the arguments and write the directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output directory (created if missing)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args()
    if options.hidden % 8 or options.hidden <= 0 or options.layers <= 0:
        parser.error("--hidden must be a positive multiple of 8 and --layers positive")
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.out, options.seed)
    parameters = write_model(options.out, options.hidden, options.layers, options.seed, options.dtype)
    print(f"{options.out}: {parameters:,} parameters, {VOCABULARY_SIZE} tokens, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
