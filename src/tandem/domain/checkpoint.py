"""Reads and checks a model directory in Hugging Face format, without torch.

Owns the integrity checks that run before anything is loaded, and the two digests by which workers and frontends verify
that they have the same model and the same tokenizer. Never loads weights. Cannot detect another model's tokenizer if it
has the same size as the right one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from tandem.errors import ConfigError, StartError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FRONTEND_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""All that a frontend may read of a model directory: for its own tokenizer, and for SGLang's output parsers."""
WHOLE_FILE_BYTES_MAX = 64 * 2**20
SAMPLE_COUNT = 16
SAMPLE_BYTES = 64 * 2**10
HEADER_BYTES_MAX = 100 * 2**20
SHOWN_CHARS_MAX = 100
"""Of a name or a value of a file, in a message."""
EMBEDDING_NAME = "model.embed_tokens.weight"
SCORING = ("SequenceClassification", "RewardModel")
"""Words in the names of architectures whose output is a score."""
HUB_PARTS = 2
"""Of a model's name in a hub: owner and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Configuration and tokenizer of a model directory, without its weights: what a frontend needs."""

    path: Path
    config: dict[str, Any]
    tokenizer_digest: str
    """SHA-256, hex, over TOKENIZER_FILES."""
    eos_token_ids: tuple[int, ...]
    vocabulary_size: int
    context_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Card):
    """A model directory, weights included."""

    model_digest: str
    """SHA-256, hex, over config.json and the weights (whole files up to 64 MiB; header and samples of larger ones)."""

    @property
    def kv_layout(self) -> str:
        """Attention kind and the KV shape of one token: layers x KV heads x head dimension."""
        c = self.config
        if "kv_lora_rank" in c:
            return f"mla:{c['num_hidden_layers']}x{c['kv_lora_rank']}+{c.get('qk_rope_head_dim', 0)}"
        return f"mha:{c['num_hidden_layers']}x{self.kv_heads}x{self._head_dim}"

    @property
    def is_mla(self) -> bool:
        """Whether the model keeps one compressed latent per token and layer instead of keys and values."""
        return "kv_lora_rank" in self.config

    @property
    def embedding_size(self) -> int:
        """Numbers in an embedding: the hidden size."""
        return int(self.config["hidden_size"])

    @property
    def embedding_sizes(self) -> tuple[int, ...]:
        """Sizes that its maker has trained for shortened embeddings (matryoshka); empty: none are named."""
        named = self.config.get("matryoshka_dimensions")
        sizes = named if isinstance(named, list) else []
        return tuple(sorted(size for size in sizes if _is_count(size) and 0 < size <= self.embedding_size))

    @property
    def is_matryoshka(self) -> bool:
        """Whether embeddings may be shortened: to `embedding_sizes`, or where none are named to any size."""
        return bool(self.embedding_sizes) or self.config.get("is_matryoshka") is True

    def check_embeds(self) -> None:
        """Check that the model can be served with task embed.

        Raises:
            ConfigError: it computes scores, as rerankers and reward models do.
        """
        named = self.config.get("architectures")
        for architecture in named if isinstance(named, list) else []:
            if any(word in str(architecture) for word in SCORING):
                raise ConfigError("task", f"is embed, but {architecture} computes scores, not embeddings")

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """KV bytes of one token over all layers (keys and values)."""
        c = self.config
        if self.is_mla:
            return int(c["num_hidden_layers"] * (c["kv_lora_rank"] + c.get("qk_rope_head_dim", 0)) * bytes_per_element)
        return int(c["num_hidden_layers"] * 2 * self.kv_heads * self._head_dim * bytes_per_element)

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer; of no meaning with latent attention."""
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def _head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])


def read_checkpoint(path: Path) -> Checkpoint:
    """Check that a model directory is complete, and read its configuration, tokenizer and weight headers.

    Raises:
        ConfigError: the directory does not exist.
        StartError: a file is missing, damaged or does not match; names the file.
    """
    card = read_card(path)
    return Checkpoint(
        **{field.name: getattr(card, field.name) for field in fields(card)},
        model_digest=_model_digest(path, card.vocabulary_size),
    )


def read_card(path: Path) -> Card:
    """Check and read a model's configuration and tokenizer; its weights may be missing.

    Raises:
        ConfigError: the directory does not exist.
        StartError: a file is missing, damaged or does not match; names the file.
    """
    if not path.is_dir():
        hint = ""
        if not path.is_absolute() and len(path.parts) == HUB_PARTS:
            hint = f" (Tandem downloads no models: `hf download {path} --local-dir DIRECTORY` does)"
        raise ConfigError("model", f"there is no directory {path}{hint}")
    config = _read_json(path / "config.json")
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings"):
        if not _is_count(config.get(key)) or config[key] < 1:
            raise StartError(
                f"{path / 'config.json'}: {key} must be a whole number, at least 1", path=str(path / "config.json")
            )
    digest = tokenizer_digest(path)
    eos_token_ids = _eos_token_ids(path, config)
    _check_tokenizer_fits(path / "tokenizer.json", config["vocab_size"], eos_token_ids)
    return Card(
        path=path,
        config=config,
        tokenizer_digest=digest,
        eos_token_ids=eos_token_ids,
        vocabulary_size=config["vocab_size"],
        context_tokens_max=config["max_position_embeddings"],
    )


def tokenizer_digest(path: Path) -> str:
    """SHA-256, hex, over TOKENIZER_FILES.

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
    except (OSError, ValueError, RecursionError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    if not isinstance(value, dict):
        raise StartError(f"{file} is not a JSON object", path=str(file))
    return value


def _eos_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence token ids of config.json and generation_config.json: an engine stops at either's."""
    found = {path / "config.json": config.get("eos_token_id")}
    generation = path / "generation_config.json"
    if generation.is_file():
        found[generation] = _read_json(generation).get("eos_token_id")
    token_ids: list[int] = []
    for file, value in found.items():
        listed = value if isinstance(value, list) else [] if value is None else [value]
        # Some published models have -1 for "none".
        listed = [] if listed == [-1] else listed
        if not all(map(_is_count, listed)):
            raise StartError(f"{file}: eos_token_id must be a token id or a list of token ids", path=str(file))
        token_ids += listed
    return tuple(dict.fromkeys(token_ids))


def _is_count(value: Any) -> bool:
    """Whether a JSON value is an integer of at least 0; bool is excluded, which is an int in Python."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tokenizer_fits(file: Path, vocabulary_size: int, eos_token_ids: tuple[int, ...]) -> None:
    """Reject a tokenizer that cannot belong to this model, as when files of two directories are mixed up.

    Three signs are certain, and do not occur in valid checkpoints: an ordinary token id beyond the vocabulary (only
    added tokens, such as padding, may lie there); no end-of-sequence token; and fewer tokens than half of the
    vocabulary (padding of the vocabulary is a few percent).
    """
    ordinary, added = _tokenizer_ids(file)
    problem = ""
    if max(ordinary) >= vocabulary_size:
        problem = f"its token id {max(ordinary)} is beyond the vocabulary of {vocabulary_size}"
    usable = {token_id for token_id in ordinary | added if token_id < vocabulary_size}
    if not problem and eos_token_ids and usable.isdisjoint(eos_token_ids):
        problem = f"it has none of the end-of-sequence tokens ({', '.join(map(str, eos_token_ids))})"
    if not problem and 2 * len(usable) < vocabulary_size:
        problem = f"it has {len(usable)} tokens for a vocabulary of {vocabulary_size}"
    if problem:
        raise StartError(f"{file} does not match the model: {problem}", path=str(file))


def _tokenizer_ids(file: Path) -> tuple[set[int], set[int]]:
    """Token ids of the vocabulary, and token ids of added tokens."""
    tokenizer = _read_json(file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise StartError(f"{file} is damaged: it has no vocabulary", path=str(file))
    # Unigram tokenizers list their pieces in id order; the others map each piece to its id.
    ordinary = list(range(len(vocabulary))) if isinstance(vocabulary, list) else list(vocabulary.values())
    try:
        added = [entry["id"] for entry in tokenizer.get("added_tokens") or ()]
    except (TypeError, KeyError):
        raise StartError(f"{file} is damaged: an added token has no id", path=str(file)) from None
    if not all(map(_is_count, ordinary + added)):
        raise StartError(f"{file} is damaged: a token id is not a whole number of at least 0", path=str(file))
    return set(ordinary), set(added)


def _model_digest(path: Path, vocabulary_size: int) -> str:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise StartError(f"{path} has no weights (*.safetensors)", path=str(path))
    digest = hashlib.sha256((path / "config.json").read_bytes())
    embedding_rows: dict[Path, int] = {}
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}\0{size_bytes}\0".encode())
        with file.open("rb") as stream:
            shapes = read_shapes(file, stream, size_bytes)
            _digest_weights(digest, stream, size_bytes)
        if shapes.get(EMBEDDING_NAME):
            embedding_rows[file] = shapes[EMBEDDING_NAME][0]
    _check_embedding_fits(embedding_rows, vocabulary_size)
    return digest.hexdigest()


def _check_embedding_fits(rows_by_file: dict[Path, int], vocabulary_size: int) -> None:
    """Check that the embedding, summed over shards, has a row per token. Other tensor names are not checked."""
    if rows_by_file and sum(rows_by_file.values()) < vocabulary_size:
        file, rows = next(iter(rows_by_file.items()))
        raise StartError(
            f"{file} does not match config.json: {rows} rows of {EMBEDDING_NAME} for a vocabulary of {vocabulary_size}",
            path=str(file),
        )


def shown(value: object, to_text: Callable[[object], str] = str) -> str:
    """A name or a value of a file as a message may have it: at most SHOWN_CHARS_MAX characters that can be sent."""
    try:
        text = to_text(value)
    except (ValueError, RecursionError):
        text = "a value that is too long or too deep"
    # JSON and names of files may have halves of surrogate pairs, which are not UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "..."


def read_shapes(
    file: Path, stream: BinaryIO, size_bytes: int, header_bytes_max: int = HEADER_BYTES_MAX
) -> dict[str, list[int]]:
    """Shape of each tensor by name, after checking that the file is as long as its header requires.

    The format: 8 bytes little-endian header length, a JSON header with offsets, then the tensors without gaps. No other
    thread runs while the header is parsed.

    Raises:
        StartError: the file is damaged, or its header is longer than `header_bytes_max`.
    """
    header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > size_bytes - 8:
        raise StartError(f"{file} is damaged: its header is longer than the file", path=str(file))
    if header_bytes > header_bytes_max:
        raise StartError(
            f"{file} has a header of {header_bytes} bytes, at most {header_bytes_max} are read", path=str(file)
        )
    try:
        header = json.loads(stream.read(header_bytes))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
        shapes = {name: [int(length) for length in tensor["shape"]] for name, tensor in tensors.items()}
        expected_bytes = 8 + header_bytes + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        raise StartError(f"{file} is damaged: its header cannot be parsed", path=str(file)) from None
    if expected_bytes != size_bytes:
        raise StartError(
            f"{file} is truncated or damaged: it has {size_bytes} bytes, its header requires {shown(expected_bytes)}",
            path=str(file),
        )
    return shapes


def _digest_weights(digest: Any, stream: BinaryIO, size_bytes: int) -> None:
    # Samples of large files only: hashing all weights would delay each start by minutes.
    stream.seek(0)
    if size_bytes <= WHOLE_FILE_BYTES_MAX:
        digest.update(stream.read())
        return
    for index in range(SAMPLE_COUNT):
        stream.seek(index * (size_bytes - SAMPLE_BYTES) // (SAMPLE_COUNT - 1))
        digest.update(stream.read(SAMPLE_BYTES))
