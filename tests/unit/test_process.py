"""What a starting process says when it cannot tell where it serves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.service.process import announce


def test_an_announcement_is_whole(tmp_path: Path) -> None:
    announce(tmp_path / "here.json", "127.0.0.1:7400", 9400)
    assert json.loads((tmp_path / "here.json").read_text()) == {
        "address": "127.0.0.1:7400",
        "pid": os.getpid(),
        "metrics_port": 9400,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["here.json"]


@pytest.mark.parametrize("file", ["missing/here.json", "directory", "."])
def test_an_announcement_that_cannot_be_written_names_its_key(tmp_path: Path, file: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError) as refused:
        announce(tmp_path / file if file != "." else Path("."), "127.0.0.1:7400")
    assert refused.value.key == "announce_file"
