"""The files of the console's page: complete, no code or style in the document, no way to make markup."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

from tandem_frontend.console import pages
from tandem_frontend.console.pages import HEADERS, POLICY, read_pages

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "services" / "frontend" / "tandem_frontend" / "console" / "static"
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|createContextual"
)


class Document(HTMLParser):
    """What a document loads, and what it holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self.inline: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style") and data.strip():
            self.inline.append(data)


def test_each_file_is_served_with_a_type_of_its_own() -> None:
    found = read_pages()
    files = {file.name for file in STATIC.iterdir()}
    assert set(found) == {"/" if name == "index.html" else f"/{name}" for name in files}
    assert found["/"].content_type == "text/html; charset=utf-8"
    assert found["/console.js"].content_type == "text/javascript; charset=utf-8"
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert package_data["tandem_frontend"] == ["console/static/*"], "an installed package has them too"


def test_the_document_loads_its_own_files_only_and_holds_no_code() -> None:
    document = Document((STATIC / "index.html").read_text())
    assert document.inline == []
    assert [name for name in document.attributes if name.startswith("on") or name == "style"] == []
    loaded = [address for address in document.addresses if not address.startswith("#")]
    assert loaded
    assert [address for address in loaded if address not in read_pages()] == []


def test_the_scripts_make_no_markup_of_text_and_load_nothing_from_elsewhere() -> None:
    for file in STATIC.glob("*.js"):
        text = file.read_text()
        assert MARKUP.findall(text) == [], file.name
        assert re.findall(r"https?://", text) == [], file.name
        imported = re.findall(r'from "\./([a-z]+\.js)"', text)
        assert [name for name in imported if not (STATIC / name).is_file()] == [], file.name
        assert len(text.splitlines()) <= 300, file.name
    assert re.findall(r"url\(|@import", (STATIC / "console.css").read_text()) == []


def test_the_policy_allows_the_pages_own_files_and_no_text_as_code() -> None:
    assert "unsafe" not in POLICY
    assert "http" not in POLICY
    allowed = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert allowed["default-src"] == allowed["frame-ancestors"] == allowed["base-uri"] == "'none'"
    assert allowed["script-src"] == allowed["style-src"] == allowed["connect-src"] == "'self'"
    assert allowed["require-trusted-types-for"] == "'script'"
    assert HEADERS["X-Frame-Options"] == "DENY"
    assert not [name for name in HEADERS if name.startswith("Access-Control")]
    assert pages.TYPES.keys() >= {file.suffix for file in STATIC.iterdir()}
