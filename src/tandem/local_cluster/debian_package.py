"""Downloads one package of a Debian suite and unpacks it into a directory; the system is not changed.

Takes the mirror from this machine's apt configuration and downloads with a private sources list and apt's signature
checks. Installs nothing, changes no source, and stores no address: the private list is removed afterwards.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import StartError

ETC = Path("/etc/apt")
PROGRAMS = ("apt-get", "dpkg")
KEYRINGS = tuple(Path("/usr/share/keyrings") / f"debian-archive-keyring.{ending}" for ending in ("gpg", "pgp"))
SUITES = frozenset(
    {"bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"}
)
"""Debian's own suites: a mirror that has one of them with the component main may have the others too."""
TIMEOUT_S = 180.0
ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>.*)")
OPTIONS = {
    "APT::Update::Error-Mode": "any",
    "APT::Sandbox::User": "root",
    "Acquire::Languages": "none",
    "Acquire::Retries": "1",
    "Dir::Etc::sourceparts": "/dev/null",
    "Dir::Etc::preferences": "/dev/null",
    "Dir::Etc::preferencesparts": "/dev/null",
}
CLEARED = ("APT::Update", "DPkg::Post-Invoke", "Acquire::IndexTargets::deb::DEP-11", "Acquire::IndexTargets::deb::CNF")
"""Hooks and extra indexes of the system's own updates, which must not run here."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A Debian mirror of this machine's apt configuration."""

    uri: str
    keyring: Path | None
    """Keyring in its entry (signed-by); None: not set."""


def unpack(package: str, suite: str, target: Path, etc: Path = ETC) -> None:
    """Download a package of a suite and unpack it into `target`, which is replaced atomically.

    Raises:
        StartError: the download or unpacking failed; the message says why in one sentence.
    """
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise StartError(f"{program} is not installed, so the Debian package {package} cannot be downloaded")
    found = mirrors(etc)
    if not found:
        raise StartError(
            f"the apt configuration of this machine ({etc}) names no mirror of Debian to download {package} from"
        )
    problems = []
    for mirror in found:
        with tempfile.TemporaryDirectory(prefix="tandem-apt-") as work:
            try:
                _unpack(_fetch(package, suite, mirror, Path(work)), target)
            except StartError as problem:
                problems.append(problem)
            else:
                return
    raise problems[0]


def mirrors(etc: Path = ETC) -> list[Mirror]:
    """Debian mirrors of this machine's apt configuration, in its order, without duplicates."""
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    found: dict[str, Mirror] = {}
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        entries = _one_line(text) if file.suffix == ".list" else _stanzas(text) if file.suffix == ".sources" else ()
        for mirror in entries:
            found.setdefault(mirror.uri.rstrip("/"), mirror)
    return list(found.values())


def _one_line(text: str) -> Iterator[Mirror]:
    """Entries of a .list file."""
    for line in text.splitlines():
        entry = ONE_LINE.fullmatch(line.partition("#")[0].strip())
        if entry is not None and _is_debian([entry["suite"]], entry["components"].split()):
            options = dict(part.partition("=")[::2] for part in (entry["options"] or "").split())
            yield Mirror(entry["uri"], _keyring(options.get("signed-by")))


def _stanzas(text: str) -> Iterator[Mirror]:
    """Entries of a .sources file."""
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
                continue
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0") or "deb" not in fields.get("types", "").split():
            continue
        if _is_debian(fields.get("suites", "").split(), fields.get("components", "").split()):
            yield from (Mirror(uri, _keyring(fields.get("signed-by"))) for uri in fields.get("uris", "").split())


def _is_debian(suites: list[str], components: list[str]) -> bool:
    return "main" in components and not SUITES.isdisjoint(suites)


def _keyring(named: str | None) -> Path | None:
    """The keyring file of an entry. None for an inline key, which covers that suite only: then Debian's keyring is
    used.
    """
    return Path(named.split(",")[0].strip()) if named is not None and named.strip().startswith("/") else None


def _fetch(package: str, suite: str, mirror: Mirror, work: Path) -> Path:
    """Download the package; apt checks its signatures. Returns the path of the .deb file."""
    keyring = next((file for file in (mirror.keyring, *KEYRINGS) if file is not None and file.is_file()), None)
    if keyring is None:
        raise StartError(
            f"{package} of Debian's suite {suite} cannot be verified: its keyring {mirror.keyring or KEYRINGS[0]} is "
            "missing (package debian-archive-keyring)"
        )
    for directory in ("lists/partial", "cache/archives/partial"):
        (work / directory).mkdir(parents=True)
    (work / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror.uri} {suite} main\n")
    options = {
        **OPTIONS,
        "Dir::Etc::sourcelist": str(work / "sources.list"),
        "Dir::State::lists": str(work / "lists"),
        "Dir::Cache": str(work / "cache"),
    }
    lines = [*(f"#clear {name};" for name in CLEARED), *(f'{name} "{value}";' for name, value in options.items())]
    (work / "apt.conf").write_text("\n".join(lines) + "\n")
    apt = ("apt-get", f"--config-file={work / 'apt.conf'}", "-qq")
    what = f"could not read Debian's suite {suite} from the mirror in this machine's apt configuration"
    _run(what, *apt, "update", directory=work)
    _run(f"could not download {package} from Debian's suite {suite}", *apt, "download", package, directory=work)
    files = list(work.glob("*.deb"))
    if not files:
        raise StartError(f"could not download {package} from Debian's suite {suite}: apt-get downloaded nothing")
    return files[0]


def _unpack(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
        unpacked = Path(partial) / "unpacked"
        _run(f"{file.name} cannot be unpacked", "dpkg", "-x", str(file), str(unpacked), directory=file.parent)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


def _run(what: str, *command: str, directory: Path) -> None:
    """Run a program and wait for it; `what` begins the error message."""
    try:
        subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StartError(f"{what}: {command[0]} took longer than {TIMEOUT_S:.0f} s") from None
    except subprocess.CalledProcessError as problem:
        lines = [line for line in (problem.stderr or "").splitlines() if line.startswith("E: ")] or [
            "E: no error message"
        ]
        raise StartError(f"{what}: {lines[0].removeprefix('E: ')}") from None
    except OSError as problem:
        raise StartError(f"{what}: {problem.strerror}") from None
