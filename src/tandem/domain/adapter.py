"""LoRA adapters: their names, their identity, and the check of their files against the model that they adapt.

An adapter is named by clients as a model. Its digest covers configuration and weights, so that two adapters of one name
differ. Files are read only, and never as pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tandem.domain.checkpoint import read_shapes, shown
from tandem.errors import StartError

NAME_CHARS_MAX = 64
NAME_PATTERN = f"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}"
NAME_RULE = f"must be 1 to {NAME_CHARS_MAX} characters of a-z, A-Z, 0-9, '.', '_', '-', first a letter or a digit"
ADAPTERS_MAX = 64
"""Of one worker: membership stores hold all of them in one entry."""
DIGEST = re.compile("[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(NAME_PATTERN, re.ASCII)

CONFIG_FILE = "adapter_config.json"
OTHER_FILES = ("added_tokens.json", "model.safetensors.index.json")
"""Files that SGLang reads beside configuration and weights, where they exist."""
CONFIG_BYTES_MAX = 2**20
"""Also of each of the other files."""
HEADER_BYTES_MAX = 2 * 2**20
"""Of one file of weights. All workers parse it at once, and their streams wait; an entry has some 150 bytes."""
WEIGHTS_FILES_MAX = 8
"""PEFT writes one."""
WEIGHTS_BYTES_MAX = 8 * 2**30
_CHUNK_BYTES = 2**20
UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "alora_invocation_tokens", "layer_replication"
)  # fmt: skip
"""Settings of PEFT that an adapter must not have set."""
_PREFIX = "base_model.model."
_LAYER = re.compile(r"layers\.[0-9]+\.")
_OUTSIDE_LAYERS = frozenset({"embed_tokens", "lm_head"})
_NEEDED = {
    "q_proj": "v_proj",
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "up_proj": "gate_proj",
    "q_a_proj": "kv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "q_a_proj",
}
"""Modules that SGLang joins with others, and those without which it cannot. It fills up k beside q and v, and up beside
gate.
"""
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.[A-Za-z0-9_-]+)?\.weight")


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """One adapter: a name and the weights that it has now."""

    name: str
    digest: str
    """SHA-256, hex, over configuration and weights."""

    @property
    def engine_id(self) -> str:
        """Its name in engines, and in the hashes of its KV blocks: 32 hex digits, the same in all engines."""
        return hashlib.sha256(f"{self.name}\0{self.digest}".encode()).hexdigest()[:32]


def is_name(text: str) -> bool:
    """Whether an adapter may have that name."""
    return _NAME.fullmatch(text) is not None


def named(adapters: Iterable[Adapter], name: str) -> Adapter | None:
    """The adapter of that name; None: there is none."""
    return next((adapter for adapter in adapters if adapter.name == name), None)


def read_adapter(name: str, path: Path, model_path: Path, rank_max: int, modules: Iterable[str]) -> Adapter:
    """Check an adapter's files against the model, and compute its digest. Blocks: call it in a thread.

    SGLang loads an adapter whose shapes are another model's, and its scheduler dies when the first request uses it.

    Args:
        name: a valid name.
        path: its directory, in the format of PEFT.
        model_path: directory of the model.
        rank_max: highest rank that the engine holds.
        modules: names of the layers that the engine can adapt, such as "q_proj".

    Only regular files below the directory are read, so that no link leads elsewhere and no pipe blocks.

    Raises:
        StartError: a file is missing, damaged, too large, a link out of the directory or not of this model; names it
            without its directory.
    """
    path = Path(os.path.realpath(path))
    config = _read_config(path)
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= rank_max:
        raise StartError(
            f"{CONFIG_FILE}: r, the rank, must be 1 to {rank_max} (adapter_rank_max), not {shown(rank, repr)}"
        )
    modules = frozenset(modules)
    _check_targets(config, modules)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise StartError(f"it has no weights in {shown(path.name)}/*.safetensors; other formats are not read")
    if len(files) > WEIGHTS_FILES_MAX:
        raise StartError(f"its weights are in more than {WEIGHTS_FILES_MAX} files")
    shapes = _read_shapes(path, files)
    model = _model_shapes(model_path)
    _check_layers(_check_shapes(shapes, model, rank), model, modules)
    return Adapter(name, _digest(path, files))


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of the adapter, and its size in bytes. The directory has no links in its path."""
    try:
        real = Path(os.path.realpath(directory / name, strict=True))
        if not real.is_relative_to(directory):
            raise StartError(f"{shown(name)} is a link to a file outside of the adapter's directory")
        # A pipe would block here, and a device might start to work.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StartError(f"{shown(name)} is no regular file")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                yield stream, status.st_size
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise StartError(f"{shown(name)} cannot be read: {problem.strerror}") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path / CONFIG_FILE):
        raise StartError(f"it has no {CONFIG_FILE}: it must be a directory in the format of PEFT")
    with _opened(path, CONFIG_FILE) as (stream, _):
        text = stream.read(CONFIG_BYTES_MAX + 1)
    if len(text) > CONFIG_BYTES_MAX:
        raise StartError(f"{CONFIG_FILE} is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise StartError(f"{CONFIG_FILE} is damaged: it is not JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise StartError(f"{CONFIG_FILE}: peft_type must be LORA")
    _check_scale(config)
    return config


def _check_scale(config: dict[str, Any]) -> None:
    """Refuse what would change answers and SGLang ignores: it applies lora_alpha / r to all layers and tokens."""
    for key in UNSUPPORTED:
        if config.get(key):
            raise StartError(f"{CONFIG_FILE}: {key} is not supported")
    for key, common in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or any(value != config.get(common) for value in pattern.values()):
            raise StartError(f"{CONFIG_FILE}: {key} is not supported: all layers must have the same {common}")


def _check_targets(config: dict[str, Any], modules: frozenset[str]) -> None:
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise StartError(f"{CONFIG_FILE}: target_modules must be a list of names")
    foreign = sorted({target.rpartition(".")[2] for target in targets} - modules)
    if foreign:
        known = ", ".join(sorted(modules))
        raise StartError(f"{CONFIG_FILE}: target_modules has {shown(', '.join(foreign))}; this worker adapts {known}")


def _read_shapes(path: Path, files: Iterable[str]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    total_bytes = 0
    for name in files:
        with _opened(path, name) as (stream, size_bytes):
            total_bytes += size_bytes
            if total_bytes > WEIGHTS_BYTES_MAX:
                raise StartError(f"its weights are larger than {WEIGHTS_BYTES_MAX} bytes")
            shapes |= read_shapes(Path(shown(name)), stream, size_bytes, HEADER_BYTES_MAX)
    return shapes


def _model_shapes(path: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                shapes |= read_shapes(Path(file.name), stream, file.stat().st_size)
        except OSError as problem:
            raise StartError(f"{file.name} of the model cannot be read: {problem.strerror}") from None
    return shapes


def _check_shapes(shapes: dict[str, list[int]], model: dict[str, list[int]], rank: int) -> dict[str, set[str]]:
    """Compare each part with the weight that it adapts. Layers that the model stores in another form, as a quantised
    or fused one does, are only compared with the rank. Returns which of the parts A and B each layer has.
    """
    layers: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        part = _PART.fullmatch(key)
        if part is None:
            raise StartError(f"its tensor {shown(key)} is no part of a LoRA adapter")
        layer, side = part["layer"].removeprefix(_PREFIX), part["side"]
        layers.setdefault(layer, set()).add(side)
        weight = model.get(f"{layer}.weight")
        if weight is None:
            if len(shape) != len("AB") or shape["AB".index(side)] != rank:
                raise StartError(f"its tensor {shown(key)} has the shape {shown(shape)}, which is not of rank {rank}")
            continue
        expected = [rank, weight[-1]] if side == "A" else [weight[0], rank]
        if shape != expected:
            raise StartError(f"its tensor {shown(key)} has the shape {shown(shape)}, this model needs {expected}")
    return layers


def _check_layers(layers: dict[str, set[str]], model: Iterable[str], modules: frozenset[str]) -> None:
    """Check that SGLang finds a place for each layer: a scheduler dies at the first request of one without a place."""
    stored = {key.rpartition(".")[0] for key in model}
    stored_modules = {layer.rpartition(".")[2] for layer in stored}
    for layer, sides in layers.items():
        parent, _, module = layer.rpartition(".")
        its = f"its layer {shown(layer)}"
        if module not in modules or "experts" in parent.split("."):
            raise StartError(f"{its} cannot be adapted; this worker adapts {', '.join(sorted(modules))}")
        has_number = module in _OUTSIDE_LAYERS or _LAYER.search(layer) is not None
        if not has_number or (module in stored_modules and layer not in stored):
            raise StartError(f"{its} is none of this model")
        if len(sides) != len("AB"):
            raise StartError(f"{its} has only one of the two parts A and B")
        needed = _NEEDED.get(module)
        if needed is not None and f"{parent}.{needed}" not in layers:
            raise StartError(f"{its} needs {needed} beside it: SGLang computes the two in one step")


def _digest(path: Path, files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    others = [name for name in OTHER_FILES if os.path.lexists(path / name)]
    for name in (CONFIG_FILE, *others, *files):
        with _opened(path, name) as (stream, size_bytes):
            if name in OTHER_FILES and size_bytes > CONFIG_BYTES_MAX:
                raise StartError(f"{name} is larger than {CONFIG_BYTES_MAX} bytes")
            digest.update(f"{name}\0{size_bytes}\0".encode("utf-8", "surrogateescape"))
            left = size_bytes
            while left > 0 and (chunk := stream.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
