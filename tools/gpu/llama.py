"""Writes a model with the shape of Llama 3 8B and random weights, in bfloat16, for performance measurements.

Its tokenizer is the demo model's with invented words after it, so that every token has a text of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 16_384,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
    },
}
SPREAD = 0.02


def config(shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **SHAPES[shape],
    }


def weight_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, as transformers spells them."""
    hidden, inner, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    queries = settings["num_attention_heads"] * settings["head_dim"]
    keys = settings["num_key_value_heads"] * settings["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(settings["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (queries, hidden),
            f"{at}.self_attn.k_proj.weight": (keys, hidden),
            f"{at}.self_attn.v_proj.weight": (keys, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, queries),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def extended_tokenizer(tokenizer: dict[str, Any], vocabulary_size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer with invented words for the ids it does not use."""
    words = dict(tokenizer["model"]["vocab"])
    used = set(words.values()) | {token["id"] for token in tokenizer.get("added_tokens", [])}
    words |= {f"\u0120w{number}": number for number in range(vocabulary_size) if number not in used}
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": words}}


def write(folder: Path, shape: str, demo: Path, device: str, seed: int = 0) -> Path:
    """Make the model, a file for each four layers so that they are written one after the other."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = config(shape)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    tokenizer = extended_tokenizer(json.loads((demo / "tokenizer.json").read_text()), settings["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo / name).read_bytes())
    shapes = weight_shapes(settings)
    names = list(shapes)
    draw = torch.Generator(device=device).manual_seed(seed)
    files = [names[begin : begin + 36] for begin in range(0, len(names), 36)]
    index: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _weight(shapes[name], draw, device) for name in held}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(held, file)
    total_bytes = sum(2 * _count(shape) for shape in shapes.values())
    content = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def _weight(shape: tuple[int, ...], draw: Any, device: str) -> Any:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, SPREAD, generator=draw).cpu()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
