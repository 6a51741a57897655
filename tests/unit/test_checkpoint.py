"""Model directories: each missing or damaged file gives one sentence, and other weights give another digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.domain import checkpoint
from tandem.domain.checkpoint import read_card, read_checkpoint, tokenizer_digest
from tandem.errors import ConfigError, StartError
from tandem.testing.fake_model import write_fake_model, write_fake_weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fake_model(tmp_path / "model")


def edit_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def refused(model: Path) -> str:
    with pytest.raises(StartError) as caught:
        read_checkpoint(model)
    assert "\n" not in caught.value.message
    assert caught.value.metadata["path"]
    return caught.value.message


def test_whole_directory(model: Path) -> None:
    found = read_checkpoint(model)
    assert (found.vocabulary_size, found.context_tokens_max, found.eos_token_ids) == (512, 2048, (2,))
    assert (found.kv_layout, found.is_mla) == ("mha:2x2x16", False)
    assert (found.kv_bytes_per_token(4), found.kv_bytes_per_token(2)) == (2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * 16 * 2)
    assert found.tokenizer_digest == tokenizer_digest(model)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: there is no directory") as caught:
        read_checkpoint(tmp_path / "nowhere")
    assert caught.value.exit_status == 2


def test_a_name_of_a_hub_is_answered_with_the_command_that_downloads_it() -> None:
    with pytest.raises(ConfigError) as caught:
        read_card(Path("Qwen/Qwen3-0.6B"))
    assert "`hf download Qwen/Qwen3-0.6B --local-dir DIRECTORY`" in caught.value.message
    with pytest.raises(ConfigError, match=r"there is no directory nowhere$"):
        read_card(Path("nowhere"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe\x00", "[" * 100_000])
def test_missing_or_unreadable_json(model: Path, name: str, content: str | bytes | None) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert str(model / name) in refused(model)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", ["absent", "12", None, -5, 0, True])
def test_config_without_a_needed_number(model: Path, key: str, value: Any) -> None:
    edit_config(model, **{key: value})
    assert key in refused(model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no weights" in refused(model)


@pytest.mark.parametrize("cut_bytes", [1, 8, 15])
def test_truncated_weights(model: Path, cut_bytes: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut_bytes])
    assert "truncated" in refused(model)


def test_weights_longer_than_their_header_requires(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert "damaged" in refused(model)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (2**63).to_bytes(8, "little"),
        (9).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{x",
        (9).to_bytes(8, "little") + b'{"a": {}}',
    ],
)
def test_damaged_header(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert "damaged" in refused(model)


def test_one_of_two_files_damaged_is_named(model: Path) -> None:
    write_fake_weights(model / "model-2.safetensors", (1.0,))
    read_checkpoint(model)
    (model / "model-2.safetensors").write_bytes(b"12345678")
    assert "model-2.safetensors" in refused(model)


def test_digests_differ_between_models(model: Path) -> None:
    first = read_checkpoint(model)
    assert read_checkpoint(model) == first
    write_fake_weights(model / "model.safetensors", (1.0, 2.0, 3.0, 4.5))
    other_weights = read_checkpoint(model)
    assert other_weights.model_digest != first.model_digest
    assert other_weights.tokenizer_digest == first.tokenizer_digest
    edit_config(model, rope_theta=1.0)
    assert read_checkpoint(model).model_digest not in (first.model_digest, other_weights.model_digest)


def test_tokenizer_digest_covers_the_chat_template(model: Path) -> None:
    first = read_checkpoint(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    second = read_checkpoint(model)
    assert second.tokenizer_digest != first.tokenizer_digest
    assert second.model_digest == first.model_digest


def test_samples_of_large_files_see_both_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WHOLE_FILE_BYTES_MAX", 1000)
    monkeypatch.setattr(checkpoint, "SAMPLE_BYTES", 256)
    values = [0.0] * 1000
    digests = set()
    for place in (None, 0, 999):
        changed = [1.0 if i == place else v for i, v in enumerate(values)]
        write_fake_weights(model / "model.safetensors", tuple(changed))
        digests.add(read_checkpoint(model).model_digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("value", "ids"),
    [(5, (2, 5)), ([5, 6], (2, 5, 6)), (2, (2,)), ("absent", (2,)), (None, (2,))],
)
def test_generation_config_adds_to_the_ends(model: Path, value: Any, ids: tuple[int, ...]) -> None:
    content = {} if value == "absent" else {"eos_token_id": value}
    (model / "generation_config.json").write_text(json.dumps(content))
    assert read_checkpoint(model).eos_token_ids == ids


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["k", [2, "k"], 1.5, True, -2, [2, -1], {}])
def test_an_end_of_sequence_that_is_no_token(model: Path, name: str, value: Any) -> None:
    file = model / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, "eos_token_id": value}))
    assert refused(model).startswith(f"{file}: eos_token_id must be a token id")


@pytest.mark.parametrize("ids", [{"a": "b"}, {"a": None}, {"a": 1.5}])
def test_a_vocabulary_without_ids(model: Path, ids: dict[str, Any]) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    assert str(model / "tokenizer.json") in refused(model)


def test_no_end_of_sequence(model: Path) -> None:
    edit_config(model, eos_token_id=None)
    assert read_checkpoint(model).eos_token_ids == ()


def test_head_dimension_of_its_own(model: Path) -> None:
    edit_config(model, head_dim=48, num_key_value_heads=None)
    assert read_checkpoint(model).kv_layout == "mha:2x4x48"


def test_latent_attention(model: Path) -> None:
    edit_config(model, kv_lora_rank=32, qk_rope_head_dim=8)
    found = read_checkpoint(model)
    assert (found.kv_layout, found.is_mla, found.kv_bytes_per_token(2)) == ("mla:2x32+8", True, 2 * 40 * 2)


def edit_tokenizer(directory: Path, /, **changes: Any) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def vocabulary_of(size: int) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {f"piece {i}": i for i in range(size)}, "merges": []}


@pytest.mark.parametrize("read", [read_card, read_checkpoint])
def test_tokenizer_of_a_larger_model(model: Path, read: Any) -> None:
    edit_config(model, vocab_size=511)
    with pytest.raises(
        StartError, match=r"tokenizer\.json does not match the model: its token id 511 is beyond .* 511$"
    ):
        read(model)


def test_tokenizer_of_a_much_smaller_model(model: Path) -> None:
    edit_tokenizer(model, model=vocabulary_of(255), added_tokens=[])
    assert refused(model).endswith("tokenizer.json does not match the model: it has 255 tokens for a vocabulary of 512")
    edit_tokenizer(model, added_tokens=[{"id": 255, "content": "<|end|>"}])
    read_checkpoint(model)


@pytest.mark.parametrize("vocabulary_size", [512, 513, 576, 1024])
def test_a_padded_vocabulary_is_no_mismatch(model: Path, vocabulary_size: int) -> None:
    """Makers round the embedding up to a multiple that suits their hardware."""
    edit_config(model, vocab_size=vocabulary_size)
    assert read_checkpoint(model).vocabulary_size == vocabulary_size


def test_added_tokens_may_lie_beyond_the_vocabulary(model: Path) -> None:
    """A padding token without a row in the embedding is seen in sound checkpoints."""
    edit_tokenizer(model, added_tokens=[{"id": 2, "content": "</s>"}, {"id": 512, "content": "<pad>"}])
    read_checkpoint(model)


def test_tokenizer_without_the_end_of_sequence(model: Path) -> None:
    edit_config(model, vocab_size=600, eos_token_id=598)
    (model / "generation_config.json").write_text('{"eos_token_id": [599, 600]}')
    edit_tokenizer(model, added_tokens=[{"id": 600, "content": "beyond the embedding: never emitted"}])
    assert refused(model).endswith("it has none of the end-of-sequence tokens (598, 599, 600)")
    # One of several is enough: a list may name tokens of a sibling model.
    edit_tokenizer(model, added_tokens=[{"id": 599, "content": "<|end|>"}])
    assert read_checkpoint(model).eos_token_ids == (598, 599, 600)


@pytest.mark.parametrize("value", [None, [], -1, [-1]])
def test_without_a_known_end_there_is_nothing_to_miss(model: Path, value: Any) -> None:
    edit_config(model, eos_token_id=value)
    read_checkpoint(model)


def test_pieces_of_a_unigram_tokenizer_are_counted_by_position(model: Path) -> None:
    pieces = [[f"piece {i}", -1.0] for i in range(513)]
    edit_tokenizer(model, model={"type": "Unigram", "vocab": pieces})
    assert "its token id 512 is beyond" in refused(model)
    edit_tokenizer(model, model={"type": "Unigram", "vocab": pieces[:512]})
    read_checkpoint(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {}},
        {"model": {"vocab": {}}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": {"a": [0]}}},
        {"model": {"vocab": {"a": None}}},
        {"added_tokens": [{"content": "x"}]},
        {"added_tokens": ["x"]},
        {"added_tokens": [{"id": "7"}]},
        {"added_tokens": 7},
    ],
)
def test_damaged_tokenizer(model: Path, changes: dict[str, Any]) -> None:
    edit_tokenizer(model, **changes)
    assert refused(model).startswith(f"{model / 'tokenizer.json'} is damaged")


def write_embedding(file: Path, rows: int, name: str = checkpoint.EMBEDDING_NAME) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [rows, 1], "data_offsets": [0, 4 * rows]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * rows))


def test_an_embedding_with_fewer_rows_than_tokens(model: Path) -> None:
    write_embedding(model / "model.safetensors", 511)
    sentence = "model.safetensors does not match config.json: 511 rows of model.embed_tokens.weight"
    assert sentence in refused(model)
    write_embedding(model / "model.safetensors", 512)
    read_checkpoint(model)


def test_an_embedding_in_parts_and_one_of_another_name(model: Path) -> None:
    write_embedding(model / "model.safetensors", 300)
    write_embedding(model / "model-2.safetensors", 212)
    write_embedding(model / "model-3.safetensors", 1, name="vision.embed_tokens.weight")
    read_checkpoint(model)


def test_card_needs_no_weights(model: Path) -> None:
    whole = read_checkpoint(model)
    (model / "model.safetensors").unlink()
    card = read_card(model)
    assert (card.tokenizer_digest, card.vocabulary_size) == (whole.tokenizer_digest, whole.vocabulary_size)
    with pytest.raises(StartError, match="has no weights"):
        read_checkpoint(model)
