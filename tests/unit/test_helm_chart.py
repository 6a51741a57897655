"""The Helm chart: current with the manifests, and its values, their schema and the templates name the same things.

`make deploy-lint` has helm render it, and compares the result with what kustomize makes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tools import gen_helm_chart
from tools.gen_helm_chart import CHART, ROOT, SERVICES, templates

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def test_the_templates_are_current() -> None:
    check = [sys.executable, "tools/gen_helm_chart.py", "--check"]
    ended = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_every_value_is_in_a_template_and_the_other_way_round() -> None:
    used = {name for text in templates().values() for name in re.findall(r"\.Values\.([\w.]+)", text)}
    assert used == {name for name in paths(VALUES) if not name.startswith("workerResources.")} | {"workerResources"}


def paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the values by path. Settings and resources are values themselves."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("settings", "resources"):
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_schema_knows_the_values_and_no_other() -> None:
    assert {*SCHEMA["properties"]} - {"global"} == {*VALUES} == {*SCHEMA["required"]}
    for name, schema in SCHEMA["properties"].items():
        if "properties" in schema:
            assert schema["additionalProperties"] is False
            assert {*schema["properties"]} == {*VALUES[name]}, name
    assert SCHEMA["additionalProperties"] is False


def test_the_console_needs_its_secret() -> None:
    assert VALUES["frontend"]["consoleKeysSecret"] == ""
    text = (CHART / "templates" / "frontend.yaml").read_text()
    switched = "".join(
        re.findall(r"\{\{- with \.Values\.frontend\.consoleKeysSecret \}\}\n(.*?)\{\{- end \}\}", text, re.DOTALL)
    )
    for part in ("containerPort: 8090", "CONSOLE_PORT", "CONSOLE_KEYS", "mountPath: /run/tandem/console", "secretName"):
        assert part in switched, part


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_takes_settings_by_their_names(service: str) -> None:
    text = (CHART / "templates" / f"{service}.yaml").read_text()
    assert f"TANDEM_{service.upper()}_{{{{ upper $key }}}}" in text
    assert f'"{{{{ .Values.image.prefix }}}}{service}:' in text


def test_a_manifest_that_a_rule_no_longer_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen_helm_chart, "EVERYWHERE", (*gen_helm_chart.EVERYWHERE, ("nowhere at all", "")))
    with pytest.raises(ValueError, match=r"apply to no manifest: {'nowhere at all'}"):
        templates()
