"""Words that the field has better ones for: code, tests, protos, pages and deployment files do without them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    *("src", "services", "protos", "docs", "deploy", "tests", "benchmarks", "tools", "examples"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
)
LEARNED = tuple(f"tools/demo_model/{name}.py" for name in ("corpus", "smalltalk", "stories", "wellformed"))
"""Texts and verbs that the demo model learns."""
FREE = (
    *("src/tandem/api/", "src/tandem/testing/fake_model.py", "tests/unit/test_words.py", "benchmarks/results/"),
    "src/tandem/models/",
    *LEARNED,
)
"""Generated code, a text that a fake model recites, the list itself, what runs recorded, and what a model learns."""
BANNED = {
    r"told|tells?": "report, record, publish, notify",
    r"whoever|nobody|somebody|everybody": "the component, or none of them",
    r"courses?": "request trace",
    r"vouch\w*": "extend_if_alive",
    r"leftovers?": "orphan",
    r"ledgers?": "reconciler, transfer statistics",
    r"outruns?": "supersede",
    r"happenings?": "event",
    r"of before": "previous",
    r"in vain": "without effect",
    r"(?:is|be) left alone": "skip, avoid, not changed",
    r"by (?:him|her)self": "automatically",
    r"waiting[ _]line": "queue",
}
WORDS = re.compile(r"(?<![\w.-])(?:" + "|".join(BANNED) + r")(?![\w-])", re.IGNORECASE)
ALLOWED = re.compile(r"\.tell\(\)|of course\b|tell me a story", re.IGNORECASE)
"""A file's position, an idiom, and a prompt."""
TEST_NAME = re.compile(r"\btest_[a-z0-9_]+")
TEXT = {".py", ".md", ".proto", ".jinja", ".lua", ".yaml", ".yml", ".toml", ".hcl", ".json", ".service", ".sh"}


def pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.splitlines() if not name.startswith(FREE)]
    return [ROOT / name for name in names if Path(name).suffix in TEXT]


def found(text: str) -> list[str]:
    """The banned words of a text; names of tests are read as sentences."""
    text = TEST_NAME.sub(lambda name: name[0].replace("_", " "), text)
    return WORDS.findall(ALLOWED.sub("", text))


def test_the_pages_are_found() -> None:
    assert len(pages()) > 300


@pytest.mark.parametrize(
    "word", ["a line that was told", "Nobody is there", "the start of before", "its Course", "def test_it_is_told"]
)
def test_a_banned_word_is_found_in_a_sentence(word: str) -> None:
    assert found(word)


def test_no_page_uses_a_banned_word() -> None:
    uses = {str(page.relative_to(ROOT)): words for page in pages() if (words := found(page.read_text()))}
    assert uses == {}, f"use instead: {BANNED}"


RANGES = re.compile(
    r"must (?:be|have|hold) [^\"\n]*?(?:\bor more\b|\bor less\b|\} up\b|\bfrom \{|\bfrom -?\d|\bover \{)"
    r"|must have (?:1 to|at most) \{"
)
"""A range is worded in one way: "must be at least 1", "must be at most 9", "must be 1 to 9", "must be above 0"."""


def test_ranges_are_worded_in_one_way() -> None:
    uses = {str(page.relative_to(ROOT)): found for page in pages() if (found := RANGES.findall(page.read_text()))}
    assert uses == {}
    for text in ("must be 1 or more", "must have at most {N} characters", "must be a number from 0 to 1"):
        assert RANGES.search(text), text
