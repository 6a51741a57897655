"""A model directory in Hugging Face format, read without torch: is it whole, and what does it say of itself?

Owns the checks a process makes before it loads anything, and the two digests by which workers and frontends recognise
that they hold the same model and the same tokenizer. Refuses to load weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from tandem.errors import ConfigError, StartError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WHOLE_FILE_BYTES_MAX = 64 * 2**20
SAMPLE_COUNT = 16
SAMPLE_BYTES = 64 * 2**10
HEADER_BYTES_MAX = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a model directory says of itself without its weights: all a frontend needs."""

    path: Path
    config: dict[str, Any]
    tokenizer_digest: str
    """SHA-256, hex, over the tokenizer's files."""
    eos_token_ids: tuple[int, ...]
    vocabulary_size: int
    context_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Card):
    """What a model directory says of itself, weights included."""

    model_digest: str
    """SHA-256, hex, over config.json and the weights (whole files up to 64 MiB; header and samples of larger ones)."""

    @property
    def kv_layout(self) -> str:
        """Attention kind and the KV shape of one token: layers x KV heads x head dimension."""
        c = self.config
        if "kv_lora_rank" in c:
            return f"mla:{c['num_hidden_layers']}x{c['kv_lora_rank']}+{c.get('qk_rope_head_dim', 0)}"
        return f"mha:{c['num_hidden_layers']}x{self._kv_heads}x{self._head_dim}"

    @property
    def is_mla(self) -> bool:
        """Whether the model keeps one compressed latent per token and layer instead of keys and values."""
        return "kv_lora_rank" in self.config

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """KV bytes of one token over all layers (keys and values)."""
        c = self.config
        if self.is_mla:
            return int(c["num_hidden_layers"] * (c["kv_lora_rank"] + c.get("qk_rope_head_dim", 0)) * bytes_per_element)
        return int(c["num_hidden_layers"] * 2 * self._kv_heads * self._head_dim * bytes_per_element)

    @property
    def _kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def _head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])


def read_checkpoint(path: Path) -> Checkpoint:
    """Check that a model directory is whole and read what it says of itself.

    Raises:
        ConfigError: there is no such directory.
        StartError: one sentence that names the directory or the file at fault.
    """
    card = read_card(path)
    return Checkpoint(
        **{field.name: getattr(card, field.name) for field in fields(card)}, model_digest=_model_digest(path)
    )


def read_card(path: Path) -> Card:
    """Check what describes a model and read it; its weights may be elsewhere.

    Raises:
        ConfigError: there is no such directory.
        StartError: one sentence that names the directory or the file at fault.
    """
    if not path.is_dir():
        raise ConfigError("model", f"there is no directory {path}")
    config = _read_json(path / "config.json")
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings"):
        if not _is_count(config.get(key)) or config[key] < 1:
            raise StartError(
                f"{path / 'config.json'} has no whole number {key} from 1 up", path=str(path / "config.json")
            )
    digest = tokenizer_digest(path)
    _check_tokenizer_fits(path / "tokenizer.json", config["vocab_size"])
    return Card(
        path=path,
        config=config,
        tokenizer_digest=digest,
        eos_token_ids=_eos_token_ids(path, config),
        vocabulary_size=config["vocab_size"],
        context_tokens_max=config["max_position_embeddings"],
    )


def tokenizer_digest(path: Path) -> str:
    """SHA-256, hex, over the tokenizer's files.

    Raises:
        StartError: the tokenizer is missing or is not JSON.
    """
    _read_json(path / "tokenizer.json")
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise StartError(f"{file} is missing", path=str(file)) from None
    except (OSError, ValueError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    if not isinstance(value, dict):
        raise StartError(f"{file} is not a JSON object", path=str(file))
    return value


def _eos_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Both files may say it, and an engine stops at what either says."""
    generation = path / "generation_config.json"
    values = {path / "config.json": config.get("eos_token_id")}
    if generation.is_file():
        values[generation] = _read_json(generation).get("eos_token_id")
    token_ids: list[int] = []
    for file, value in values.items():
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_count(token_id) for token_id in found):
            raise StartError(f"{file}: eos_token_id is neither a token id nor a list of them", path=str(file))
        token_ids += found
    return tuple(dict.fromkeys(token_ids))


def _is_count(value: Any) -> bool:
    """A whole number from 0 up; to Python, true is one too."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tokenizer_fits(file: Path, vocabulary_size: int) -> None:
    """Two directories were mixed up. Added tokens may lie beyond: some checkpoints have a padding token there."""
    tokenizer = _read_json(file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise StartError(f"{file} is damaged: it holds no vocabulary", path=str(file))
    if isinstance(vocabulary, dict) and not all(map(_is_count, vocabulary.values())):
        raise StartError(f"{file} is damaged: its vocabulary has a token without an id", path=str(file))
    highest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
    if highest >= vocabulary_size:
        raise StartError(
            f"{file} does not match the model: its token {highest} is beyond the vocabulary of {vocabulary_size}",
            path=str(file),
        )


def _model_digest(path: Path) -> str:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise StartError(f"{path} holds no weights (*.safetensors)", path=str(path))
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}\0{size_bytes}\0".encode())
        with file.open("rb") as stream:
            _check_safetensors(file, stream, size_bytes)
            _digest_weights(digest, stream, size_bytes)
    return digest.hexdigest()


def _check_safetensors(file: Path, stream: BinaryIO, size_bytes: int) -> None:
    """The format: 8 bytes little-endian header length, a JSON header with offsets, then the tensors without gaps."""
    header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > min(HEADER_BYTES_MAX, size_bytes - 8):
        raise StartError(f"{file} is damaged: its header is longer than the file", path=str(file))
    try:
        header = json.loads(stream.read(header_bytes))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise StartError(f"{file} is damaged: its header is not readable", path=str(file)) from None
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if expected_bytes != size_bytes:
        raise StartError(
            f"{file} is truncated or damaged: {size_bytes} bytes where its header says {expected_bytes}", path=str(file)
        )


def _digest_weights(digest: Any, stream: BinaryIO, size_bytes: int) -> None:
    stream.seek(0)
    if size_bytes <= WHOLE_FILE_BYTES_MAX:
        digest.update(stream.read())
        return
    for index in range(SAMPLE_COUNT):
        stream.seek(index * (size_bytes - SAMPLE_BYTES) // (SAMPLE_COUNT - 1))
        digest.update(stream.read(SAMPLE_BYTES))
