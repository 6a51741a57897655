"""The Dockerfiles: pinned, multi-stage, without an owner's names, and as alike as they say."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.unit.support.deployed_settings import REPOSITORY, VARIABLE, unknown_settings

SERVICES = ("registry", "frontend", "prefill", "decode")
FILES = {
    **{service: REPOSITORY / "services" / service / "Dockerfile" for service in SERVICES},
    "edge": REPOSITORY / "services" / "edge" / "Dockerfile",
}
FINAL_STAGES = {"registry": 1, "frontend": 1, "edge": 1, "prefill": 2, "decode": 2}
PINNED = re.compile(r"[a-z0-9./-]+:\S*\d+\.\d+\.\d+\S*")
SECRETS = "--mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle"


def stages(file: Path) -> list[str]:
    """The text of each stage, without comments; what stands before the first one is left out."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    return ["FROM " + stage.strip() for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]]


def final_stages(service: str) -> list[str]:
    return [stage for stage in stages(FILES[service]) if "ENTRYPOINT" in stage]


@pytest.mark.parametrize("service", FILES)
def test_bases_are_pinned(service: str) -> None:
    text = FILES[service].read_text()
    given = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, re.MULTILINE))
    assert given
    assert all(PINNED.fullmatch(image) for image in given.values()), given
    names = set(re.findall(r"^FROM .* AS ([a-z-]+)$", text, re.MULTILINE))
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert base in names or base in {f"${{{name}}}" for name in given}, base


@pytest.mark.parametrize("service", FILES)
def test_an_image_has_no_owner_and_has_a_health_check(service: str) -> None:
    finals = final_stages(service)
    assert len(finals) == FINAL_STAGES[service]
    for stage in finals:
        assert "\nUSER 10001:10001\n" in stage
        assert "\nSTOPSIGNAL SIGTERM\n" in stage
        assert f'CMD ["python3", "-m", "tandem.service.healthcheck", "{service}"]' in stage
        assert f'ENTRYPOINT ["tandem-{service}"]' in stage
        assert "org.opencontainers.image.version" in stage
        # What builds is in other stages: nothing is installed here, and no secret is mounted.
        assert "pip" not in stage
        assert "install.sh" not in stage
        variables = [match[0] for match in VARIABLE.finditer(stage)]
        assert f"TANDEM_{service.upper()}_PORT" in variables
        assert unknown_settings(variables) == []


@pytest.mark.parametrize("service", FILES)
def test_an_image_build_can_use_another_package_index(service: str) -> None:
    for stage in stages(FILES[service]):
        for run in re.findall(r"^RUN (.*install\.sh.*)$", stage, re.MULTILINE):
            assert SECRETS in run, run
    assert "ARG PIP_INDEX_URL" in FILES[service].read_text()


@pytest.mark.parametrize(("first", "second"), [("registry", "frontend"), ("prefill", "decode")])
def test_stages_that_are_shared_are_the_same(first: str, second: str) -> None:
    """A difference would have them built twice, and kept twice on every machine."""
    building = [[stage for stage in stages(FILES[service]) if "ENTRYPOINT" not in stage] for service in (first, second)]
    assert building[0] == building[1]


def test_small_images_have_no_engine() -> None:
    for service in ("registry", "frontend", "edge"):
        assert "engine" not in "".join(stages(FILES[service]))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (REPOSITORY / ".dockerignore").read_text().splitlines()[1] == "*"
    for file in FILES.values():
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", file.read_text(), re.MULTILINE):
            for source in sources.split():
                assert any(entry.startswith(source) or fnmatch(source, entry) for entry in allowed), source
