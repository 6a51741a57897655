"""A complete model directory without real weights, for the simulated engine and a frontend's tokenizer.

Written in a fraction of a second, without torch. Its single weight exists for the digest; its tokenizer is real (a
byte-level BPE trained on a few sentences), so that every token of the simulated engine decodes to text.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
EOS_TOKEN_ID = 2
CONTEXT_TOKENS_MAX = 2048
CORPUS = (
    "The prefill engine reads the whole prompt and keeps a key and a value for every token and every layer.",
    "The decode engine takes what prefill has written and goes on from there, one token after the other.",
    "A registry knows who is alive; a frontend chooses a pair and watches both legs until the stream has ended.",
    "Health is truthful when it says serving only while a canary comes through; a drain finishes what was accepted.",
    "Bytes of memory move from one machine to the other, page by page, and nobody computes the same prompt again.",
    "Zwei Läufer, eine Staffel: wer den Stab verliert, fängt von vorne an. 東京 café naïve Ωmega 🙂",
    "def relay(tokens): return [token for token in tokens if token is not None]  # 0123456789",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_fake_model(directory: Path, *, vocabulary_size: int = 512, **config: Any) -> Path:
    """Write the model directory and return its path.

    Args:
        directory: created if missing.
        vocabulary_size: of tokenizer and model, in tokens; 512 covers all bytes and some merges.
        config: overrides of entries of config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(vocabulary_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT_TOKENS_MAX,
            "vocab_size": tokenizer.get_vocab_size(),
            "eos_token_id": EOS_TOKEN_ID,
            "bos_token_id": 1,
            "dtype": "float32",
            **config,
        },
    )
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    _write_json(directory / "tokenizer_config.json", {**tokenizer_config, "chat_template": CHAT_TEMPLATE})
    write_fake_weights(directory / "model.safetensors", (1.0, 2.0, 3.0, 4.0))
    return directory


def write_fake_weights(file: Path, values: tuple[float, ...]) -> None:
    """Write a valid safetensors file with one float32 tensor."""
    data = struct.pack(f"<{len(values)}f", *values)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _train_tokenizer(vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106 -- a token of text, no password
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
