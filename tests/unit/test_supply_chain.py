"""What is installed and built from: packages with hashes at the pinned versions, images that can be named by digest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import gen_hashes, image_pins

FILES = sorted(gen_hashes.HASHES.glob("*.txt"))
DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hashes_are_of_the_pinned_versions(file: Path) -> None:
    assert gen_hashes.differences(file) == []
    assert len(gen_hashes.hashed(file)) > 60


def test_there_are_hashes() -> None:
    assert FILES


def test_a_missing_and_another_version_are_found(tmp_path: Path) -> None:
    lines = FILES[0].read_text().splitlines()
    kept = [line for line in lines if not line.startswith("pydantic==")]
    changed = [line.replace("jinja2==", "jinja2==0.") for line in kept]
    file = tmp_path / "x.txt"
    file.write_text("\n".join(changed) + "\n")
    found = gen_hashes.differences(file)
    assert found[0] == "pydantic is missing"
    assert found[1].startswith("jinja2 is 0.")


def test_a_package_from_a_directory_or_without_a_hash_is_refused() -> None:
    one = {"metadata": {"name": "A_b", "version": "1"}, "download_info": {"url": "https://i/a", "archive_info": {}}}
    with pytest.raises(SystemExit, match="no SHA-256 for a-b 1"):
        gen_hashes.text_of([one])
    one["download_info"] = {"url": "file:///w/a.whl", "archive_info": {"hashes": {"sha256": "0" * 64}}}
    with pytest.raises(SystemExit, match="a-b comes from a directory"):
        gen_hashes.text_of([one])
    one["download_info"] = {"url": "https://i/a", "archive_info": {"hashes": {"sha256": "0" * 64}}}
    assert gen_hashes.text_of([one]).endswith(f"a-b==1 --hash={DIGEST}\n")


def test_each_foreign_image_can_be_named_by_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(image_pins.images())
    assert {"PYTHON_IMAGE", "CUDA_IMAGE", "CONSUL_IMAGE", "GRAFANA_IMAGE"} <= names
    monkeypatch.setattr(sys, "argv", ["image_pins.py", "--require"])
    for name in names - {"CUDA_IMAGE"}:
        monkeypatch.setenv(name, f"registry.example/x:1@{DIGEST}")
    assert image_pins.main() == 1
    monkeypatch.setenv("CUDA_IMAGE", f"registry.example/x@{DIGEST}")
    assert image_pins.main() == 0
