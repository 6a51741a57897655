"""Builds the documentation as a site into .cache/docs-site/site; run by `make docs`. A broken link fails the build.

The pages stay as they are read in the repository: this module copies them in their folders, and makes a page of each
source file and folder that they link to. The site needs no network: no font, script or picture comes from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.own_environment import ROOT, own_environment

SITE = ROOT / ".cache" / "docs-site"
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".proto": "protobuf", ".json": "json", ".mjs": "javascript", ".sh": "sh"}
SHOWN_BYTES_MAX = 200_000
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//(?!127\.0\.0\.1)[^>]*>")
SECTIONS = (
    ("Guide", ("docs/guide/",)),
    ("Reference", ("docs/reference/",)),
    ("Explanation", ("ARCHITECTURE.md", "docs/explanation/")),
    ("Decisions", ("docs/adr/",)),
    ("Evidence", ("docs/evidence/", "benchmarks/")),
    ("Services", ("services/", "deploy/", "models/", "tools/")),
    ("Examples", ("examples/",)),
    ("Project", ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/README.md")),
)
CONFIGURATION = """\
site_name: Tandem
docs_dir: source
site_dir: site
use_directory_urls: false
theme:
  name: material
  font: false
  features: [navigation.tabs, navigation.top, content.code.copy]
  palette:
    - {media: "(prefers-color-scheme: light)", scheme: default, toggle: {icon: material/weather-night, name: Dark}}
    - {media: "(prefers-color-scheme: dark)", scheme: slate, toggle: {icon: material/weather-sunny, name: Light}}
plugins: [search]
extra_css: [site.css]
markdown_extensions:
  - tables
  - sane_lists
  - pymdownx.superfences
  - pymdownx.highlight
  - toc:
      permalink: true
      slugify: !!python/name:tools.build_docs_site.github_anchor
validation: {omitted_files: ignore, absolute_links: warn, unrecognized_links: warn, anchors: warn, not_found: warn}
extra: {generator: false}
"""
STYLE = ".md-grid { max-width: 84rem; }\n"
"""Wide enough for lines of code of 120 characters."""


def main() -> int:
    shutil.rmtree(SITE, ignore_errors=True)
    pages = stage(ROOT, SITE / "source")
    _write(SITE / "source" / "site.css", STYLE)
    (SITE / "mkdocs.yml").write_text(f"{CONFIGURATION}nav: {json.dumps(navigation(pages))}\n")
    # Not --quiet: that also hides the warnings which --strict counts.
    mkdocs = [str(own_environment("docs") / "python"), "-m", "mkdocs", "build", "--strict"]
    paths = {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "true"}
    ended = subprocess.run(
        mkdocs, cwd=SITE, env={**os.environ, **paths}, check=False, stderr=subprocess.PIPE, text=True
    )
    if ended.returncode:
        print(ended.stderr, file=sys.stderr)
        return ended.returncode
    foreign = {str(page): found for page in SITE.rglob("*.html") if (found := FOREIGN.findall(page.read_text()))}
    if foreign:
        print(f"the site would load from elsewhere: {foreign}", file=sys.stderr)
        return 1
    print(f"{len(pages)} pages: {SITE / 'site' / 'index.html'}")
    return 0


def github_anchor(text: str, separator: str) -> str:
    """The anchor of a heading as GitHub makes it, so that links work in both places."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", separator)


def tracked(root: Path) -> list[str]:
    """The files that git lists, without those of the package that are links to others."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and not (root / name).is_symlink()]


def stage(root: Path, target: Path) -> dict[str, str]:
    """Copy the pages to `target` and make those that they need; the titles of the pages in the repository by path."""
    files = tracked(root)
    pages = {name: (root / name).read_text() for name in files if name.endswith(".md")}
    made: dict[str, str] = {}
    for name, text in pages.items():
        _write(target / name, _linked(name, text, root, target, files, made))
    for name, text in made.items():
        _write(target / name, text)
    return {name: title(text, name) for name, text in pages.items()}


def title(text: str, name: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].replace("`", "") if found else name


def navigation(pages: dict[str, str]) -> list[object]:
    """The tabs of the site. A page that no section names fails the build, so that none gets lost."""
    left = dict(sorted(pages.items()))
    tabs: list[object] = [{"Home": left.pop("README.md") and "README.md"}]
    for section, places in SECTIONS:
        inside = [name for place in places for name in left if name.startswith(place)]
        tabs.append({section: [{left.pop(name): name} for name in inside]})
    if left:
        sys.exit(f"in no section of the site: {', '.join(left)}")
    return tabs


def _linked(name: str, text: str, root: Path, target: Path, files: list[str], made: dict[str, str]) -> str:
    """A page whose links to files and folders lead to pages of them. Code stays as it is."""

    def led(link: re.Match[str]) -> str:
        path, mark, anchor = link[2].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        found = (root / name).parent.joinpath(path).resolve()
        page = _page_of(found.relative_to(root.resolve()).as_posix(), root, target, files, made)
        return f"{link[1]}{os.path.relpath(page, Path(name).parent)}{mark}{anchor}{link[3]}"

    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        parts = [line] if fenced else re.split(r"(`[^`]*`)", line)
        lines.append("".join(part if fenced or part.startswith("`") else LINK.sub(led, part) for part in parts))
    return "\n".join(lines) + "\n"


def _page_of(path: str, root: Path, target: Path, files: list[str], made: dict[str, str]) -> str:
    """Path of the page to which a link to a file or folder leads, which is made if there is none."""
    file = root / path
    if file.is_dir():
        if (file / "README.md").is_file():
            return f"{path}/README.md"
        page = f"{path}/index.md"
        if page not in made:
            made[page] = ""  # a folder may lead back to itself
            inside = [name for name in files if name.startswith(f"{path}/")]
            entries = (f"- [{name.removeprefix(f'{path}/')}]({name.removeprefix(f'{path}/')})" for name in inside)
            made[page] = _linked(page, f"# {path}\n\n" + "\n".join(entries), root, target, files, made)
        return page
    if file.suffix == ".md" or not file.is_file():
        return path
    if file.suffix in PICTURES or file.stat().st_size > SHOWN_BYTES_MAX or b"\0" in file.read_bytes()[:1000]:
        _write(target / path, file.read_bytes())
        return path
    text = file.read_text()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    made.setdefault(f"{path}.md", f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, '')}\n{text.rstrip()}\n{fence}\n")
    return f"{path}.md"


def _write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


if __name__ == "__main__":
    sys.exit(main())
