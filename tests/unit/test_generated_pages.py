"""Reference pages that are generated: each is current with the code, and complete."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from tandem_decode.config import DecodeConfig
from tandem_edge.config import EdgeConfig
from tandem_frontend.config import FrontendConfig
from tandem_prefill.config import PrefillConfig
from tandem_registry.config import RegistryConfig

from tandem.config import ServiceConfig
from tools import gen_contracts_page, gen_settings_page
from tools.markdown import ROOT, plain

SERVICES = (FrontendConfig, PrefillConfig, DecodeConfig, RegistryConfig, EdgeConfig)


@pytest.mark.parametrize("tool", ["gen_metrics_page", "gen_settings_page", "gen_contracts_page"])
def test_a_page_is_current(tool: str) -> None:
    check = [sys.executable, f"tools/{tool}.py", "--check"]
    ended = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_lint_holds_to_the_code_is_also_held_before_a_commit() -> None:
    checks = re.findall(r"tools/gen_\w+\.py --check", (ROOT / "Makefile").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert len(checks) >= 5
    assert [check for check in checks if check not in hooks] == []


@pytest.mark.parametrize("settings", SERVICES, ids=lambda settings: settings.__name__)
def test_each_setting_of_a_service_has_a_row(settings: type[ServiceConfig]) -> None:
    keys = re.findall(r"^\| `([a-z_]+)` \|", gen_settings_page.PAGE.read_text(), re.MULTILINE)
    assert set(settings.model_fields) <= set(keys)


def test_each_row_of_a_setting_says_what_it_does() -> None:
    rows = [line for line in gen_settings_page.lines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if not row.split(" | ")[-1].removesuffix("|").strip()] == []


def test_each_part_of_a_contract_has_its_comment() -> None:
    rows = [line for line in gen_contracts_page.lines() if line.startswith("| `")]
    assert len(rows) > 500
    assert [row for row in rows if not row.split(" | ")[-1].removesuffix("|").strip()] == []


def test_a_call_names_its_errors_and_its_path_over_http() -> None:
    text = gen_contracts_page.PAGE.read_text()
    assert re.search(r"^\| `KeepAlive` \| stream of .* \| `WORKER_NOT_FOUND` \|", text, re.MULTILINE)
    assert "| `POST /v1/generate:unary` |" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a|b", r"a\|b"), ("<id> *", r"\<id> \*"), ("`<id>` of a|b", r"`<id>` of a\|b"), ("two\n lines", "two lines")],
)
def test_a_cell_is_shown_as_it_is_written(text: str, shown: str) -> None:
    assert plain(text) == shown
