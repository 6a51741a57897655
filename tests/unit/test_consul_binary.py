"""Where Consul's binary comes from: PATH, a copy, or Debian through this machine's own mirror, checked by apt."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.errors import StartError
from tandem.local_cluster import consul_binary, debian_package
from tandem.local_cluster.debian_package import Mirror, mirrors

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="this machine has no apt-get")

STANZAS = """\
# A comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: http://one.example/debian
 http://two.example/debian/
Suites:
 trixie
Components: contrib
 main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main
"""
LINES = """\
# deb http://off.example/debian bookworm main
deb [arch=amd64 signed-by=/keys/debian.gpg] http://three.example/debian bookworm main contrib
deb http://one.example/debian/ sid main # named twice
deb-src http://sources.example/debian bookworm main
deb https://other.example/linux/debian bookworm stable
deb https://other.example/apt tool-bookworm main
"""


def an_etc(directory: Path, stanzas: str = "", lines: str = "") -> Path:
    parts = directory / "etc" / "sources.list.d"
    parts.mkdir(parents=True)
    (parts / "debian.sources").write_text(stanzas)
    (parts / "debian.sources.disabled").write_text(STANZAS)
    (parts.parent / "sources.list").write_text("")
    (parts / "more.list").write_text(lines)
    return parts.parent


@pytest.fixture
def no_consul_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consul_binary, "NAME", "a-consul-that-is-not-there")


def test_both_forms_of_an_apt_configuration_are_read(tmp_path: Path) -> None:
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    assert mirrors(an_etc(tmp_path, STANZAS, LINES)) == [
        Mirror("http://mirror.example/debian", keyring),
        Mirror("http://one.example/debian", None),
        Mirror("http://two.example/debian/", None),
        Mirror("http://three.example/debian", Path("/keys/debian.gpg")),
    ]


def test_the_one_on_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "consul"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    copy = tmp_path / "cache" / "consul" / "usr" / "bin" / "consul"
    copy.parent.mkdir(parents=True)
    copy.touch(0o755)
    assert consul_binary.find_consul(tmp_path / "cache") == own


@pytest.mark.usefixtures("no_consul_on_path")
def test_one_of_several_processes_fetches_consul_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    reports: list[str] = []

    def unpack(package: str, suite: str, target: Path) -> None:
        asked.append((package, suite))
        time.sleep(0.1)
        (target / "usr" / "bin").mkdir(parents=True)
        (target / "usr" / "bin" / consul_binary.NAME).touch(0o755)

    monkeypatch.setattr(debian_package, "unpack", unpack)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: consul_binary.find_consul(tmp_path, reports.append), range(4)))
    assert found == {tmp_path / consul_binary.NAME / "usr" / "bin" / consul_binary.NAME}
    assert asked == [(consul_binary.NAME, "bullseye")]
    assert len(reports) == 1
    assert "downloading" in reports[0]


@pytest.mark.usefixtures("no_consul_on_path")
def test_an_unavailable_consul_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(package: str, suite: str, target: Path) -> None:
        raise StartError("there is no network")

    monkeypatch.setattr(debian_package, "unpack", unpack)
    with pytest.raises(StartError) as refused:
        consul_binary.find_consul(tmp_path)
    expected = "Consul is not on PATH, and the download failed: there is no network; put consul on PATH"
    assert str(refused.value) == expected


@pytest.mark.usefixtures("no_consul_on_path")
def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"file/cache cannot be written: Not a directory"):
        consul_binary.find_consul(tmp_path / "file" / "cache")


@needs_apt
def test_without_a_mirror_of_debian_it_says_where_it_looked(tmp_path: Path) -> None:
    etc = an_etc(tmp_path, lines="deb http://archive.example/ubuntu noble main\n")
    with pytest.raises(StartError, match="names no mirror of Debian"):
        debian_package.unpack("consul", "bullseye", tmp_path / "target", etc)


@needs_apt
def test_a_missing_keyring_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_package, "KEYRINGS", ())
    etc = an_etc(tmp_path, lines="deb [signed-by=/nowhere/keys.gpg] http://mirror.example/debian bookworm main\n")
    with pytest.raises(StartError, match=r"keyring /nowhere/keys\.gpg is missing \(package debian-archive-keyring\)"):
        debian_package.unpack("consul", "bullseye", tmp_path / "target", etc)


@needs_apt
def test_an_unsigned_archive_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    repository = tmp_path / "debian"
    index = repository / "dists" / "bullseye" / "main" / "binary-amd64"
    index.mkdir(parents=True)
    (index / "Packages").write_text("Package: consul\nVersion: 9\nArchitecture: all\nFilename: consul.deb\n")
    (index.parents[1] / "Release").write_text("Origin: Debian\nSuite: bullseye\nCodename: bullseye\n")
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    etc = an_etc(tmp_path, lines=f"deb [signed-by={keyring}] file:{repository} bookworm main\n")
    with pytest.raises(StartError, match="is not signed"):
        debian_package.unpack("consul", "bullseye", tmp_path / "target", etc)
    assert not (tmp_path / "target").exists()


@needs_apt
def test_a_mirror_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    etc = an_etc(tmp_path, lines="deb http://127.0.0.1:1/debian bookworm main\n")
    with pytest.raises(StartError, match="mirror in this machine's apt configuration") as refused:
        debian_package.unpack("consul", "bullseye", tmp_path / "target", etc)
    assert "\n" not in str(refused.value)
