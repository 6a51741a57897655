"""Writes LoRA adapters with random weights for a model directory: real files in PEFT's format, without PyTorch."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path

from tandem.domain.checkpoint import read_shapes

MODULES = ("q_proj", "v_proj")
SCALE = 0.5
"""Of the weights: large enough that a tiny model's tokens change."""


def write_adapter(
    directory: Path, model: Path, seed: int, *, rank: int = 8, modules: Sequence[str] = MODULES, scale: float = SCALE
) -> Path:
    """Write an adapter of all layers of a model that have one of these names. The same seed gives the same bytes.

    A model directory without weights that name such layers, as `fake_model` writes, gives it one layer whose modules
    are 8 by 8.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        key.removesuffix(".weight"): shape
        for file in sorted(model.glob("*.safetensors"))
        for key, shape in _shapes(file).items()
        if any(key.endswith(f".{module}.weight") for module in modules)
    } or {f"model.layers.0.self_attn.{module}": [8, 8] for module in modules}
    tensors: dict[str, list[int]] = {}
    for layer, (out_size, in_size) in sorted(weights.items()):
        tensors[f"base_model.model.{layer}.lora_A.weight"] = [rank, in_size]
        tensors[f"base_model.model.{layer}.lora_B.weight"] = [out_size, rank]
    _write_tensors(directory / "adapter_model.safetensors", tensors, seed, scale)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        return read_shapes(file, stream, file.stat().st_size)


def _write_tensors(file: Path, shapes: dict[str, list[int]], seed: int, scale: float) -> None:
    draw = random.Random(seed)  # noqa: S311 -- weights for tests, no secret
    header, data = {}, bytearray()
    for name, shape in shapes.items():
        count = shape[0] * shape[1]
        begin = len(data)
        data += struct.pack(f"<{count}f", *(draw.gauss(0.0, scale) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
