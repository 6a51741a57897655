"""The Markdown pages: relative links lead to files and headings that exist, and lines are short enough to read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "models", "services", "tools")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
COLUMNS_MAX = 120
REFLOWED = ("deploy", "docs", "examples", "services")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`]*`")
HEADING = re.compile(r"#+ (.*)")


def prose(page: Path) -> Iterator[str]:
    """The lines of a page that are not inside a fenced block."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield line


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, by GitHub's rule."""
    texts = [match[1] for line in prose(page) if (match := HEADING.fullmatch(line))]
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", text).strip().lower() for text in texts]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in (target for line in prose(page) for target in LINK.findall(CODE.sub("", line))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_each_test_that_contributors_are_pointed_to_exists() -> None:
    named = re.findall(r"tests/[\w/*]+(?:\.py)?", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    parts = page.relative_to(ROOT).parts
    if len(parts) > 1 and parts[0] not in REFLOWED:
        pytest.skip("this page is not reflowed yet")
    # Rows of tables cannot be wrapped.
    long = [line for line in prose(page) if len(line) > COLUMNS_MAX and not line.startswith("|")]
    assert long == []


def test_no_page_or_message_installs_the_other_project_called_tandem() -> None:
    """The package index has a `tandem` that is not this one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    other = re.compile(r"pip[3]?\s+install[^\n]*?[\s\"']tandem(?:\[[a-z,]+\])?(?![\w./-])|\btandem\[(?:sglang|edge)")
    found = [
        f"{name}: {match[0]}"
        for name in listed
        if Path(name).suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".hcl", ".service", ""}
        for match in other.finditer((ROOT / name).read_text(errors="replace"))
    ]
    assert found == []
    assert 'name = "tandem-serving"' in (ROOT / "pyproject.toml").read_text()
