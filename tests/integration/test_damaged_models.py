"""Workers whose model is damaged or does not fit its tokenizer: each ends with one sentence that names the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.testing.fake_model import write_fake_model

DEMO_MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"


def foreign_tokenizer(model: Path, tmp_path: Path) -> None:
    shutil.copy(write_fake_model(tmp_path / "other", vocabulary_size=512) / "tokenizer.json", model)


def larger_tokenizer(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1535}))


def larger_vocabulary(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1600}))


def flipped_header(model: Path, tmp_path: Path) -> None:
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(20)
        stream.write(b"\xff\xff\xff")


def truncated(model: Path, tmp_path: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "name", "sentence"),
    [
        (truncated, "model.safetensors", "is truncated or damaged"),
        (flipped_header, "model.safetensors", "is damaged: its header cannot be parsed"),
        (foreign_tokenizer, "tokenizer.json", "does not match the model: it has 512 tokens for a vocabulary of 1536"),
        (larger_tokenizer, "tokenizer.json", "does not match the model: its token id 1535 is beyond the vocabulary"),
        (larger_vocabulary, "model.safetensors", "does not match config.json: 1536 rows"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("worker", ["tandem_prefill", "tandem_decode"])
def test_a_worker_refuses_a_damaged_model(worker: str, damage: Any, name: str, sentence: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    damage(model, tmp_path)
    command = [sys.executable, "-m", worker, "--registry=127.0.0.1:1", f"--model={model}", "--engine=simulated"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1
    assert f"{model / name} {sentence}" in last
    assert "Traceback" not in found.stderr
