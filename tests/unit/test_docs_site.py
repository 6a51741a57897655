"""The documentation site's source: pages of the repository, and of what they link to. `make docs` builds the site."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_docs import ROOT, anchors, prose
from tools.build_docs_site import FOREIGN, github_anchor, navigation, stage, title

PAGES = {
    "README.md": "# Home\n\n[guide](docs/guide), [code](src/part.py), [shot](docs/shot.png), "
    "[it](docs/guide/a.md#one-two)\n",
    "docs/guide/a.md": "# A `page`\n\n## One, two\n\n`[no](../../src/part.py)` [up](../../README.md) [away](https://example.org)\n",
}
CODE = 'text = """\n```\n[not](a-link)\n```\n"""\n'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    files = {**PAGES, "src/part.py": CODE, "docs/shot.png": "\x89PNG"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "docs" / "linked.md").symlink_to("guide/a.md")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def test_links_to_code_and_folders_lead_to_pages_of_them(repository: Path, tmp_path: Path) -> None:
    pages = stage(repository, tmp_path / "source")
    assert pages == {"README.md": "Home", "docs/guide/a.md": "A page"}
    home = (tmp_path / "source" / "README.md").read_text()
    assert re.findall(r"\]\((.*?)\)", home) == [
        "docs/guide/index.md", "src/part.py.md", "docs/shot.png", "docs/guide/a.md#one-two"
    ]  # fmt: skip
    assert "- [a.md](a.md)" in (tmp_path / "source" / "docs" / "guide" / "index.md").read_text()
    assert (tmp_path / "source" / "docs" / "shot.png").is_file()


def test_code_is_shown_as_it_is(repository: Path, tmp_path: Path) -> None:
    stage(repository, tmp_path / "source")
    shown = (tmp_path / "source" / "src" / "part.py.md").read_text()
    assert shown == f"# src/part.py\n\n````python\n{CODE}````\n"
    page = (tmp_path / "source" / "docs" / "guide" / "a.md").read_text()
    assert page == PAGES["docs/guide/a.md"]


def test_every_page_of_the_repository_is_in_a_section() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = {name: name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink()}
    assert str(navigation(pages)).count(".md'") >= len(pages)
    with pytest.raises(SystemExit, match=r"in no section of the site: lost\.md"):
        navigation({**pages, "lost.md": "Lost"})


def test_anchors_are_those_of_github() -> None:
    page = ROOT / "docs" / "guide" / "deploy.md"
    headings = [line.lstrip("# ") for line in prose(page) if line.startswith("#")]
    assert {github_anchor(heading, "-") for heading in headings} == anchors(page)


def test_what_a_page_would_load_from_elsewhere_is_found() -> None:
    assert FOREIGN.findall('<link rel="stylesheet" href="https://fonts.example/css"> <script src="//cdn.example/x.js">')
    assert not FOREIGN.findall('<a href="https://example.org">link</a> <script src="assets/x.js"></script>')
    assert title("no heading", "docs/x.md") == "docs/x.md"
