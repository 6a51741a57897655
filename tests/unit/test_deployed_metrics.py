"""Metrics of each deployment that is shipped: what a scrape rule names is there, and each alert has its runbook."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.tls.authority import issue_all
from tests.unit.support.deployed_settings import CONFIGS, REPOSITORY
from tests.unit.test_deployments import DEPLOY, KUBERNETES, NOMAD, SETTINGS, documents, pods
from tests.unit.test_docs import anchors
from tools import gen_prometheus_rule

PROMETHEUS = DEPLOY / "observability" / "prometheus"
MONITORING = DEPLOY / "kubernetes" / "monitoring"
LABELS = {"process", "role"}
"""Labels of a target that alerts and dashboards read, beside its job."""
JOBS = {"tandem": "/metrics", "tandem-envoy": "/envoy"}
RUNBOOKS = "docs/guide/runbooks.md"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def scrape_jobs(file: str) -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((PROMETHEUS / file).read_text())
    assert [(PROMETHEUS / rule_file).is_file() for rule_file in config["rule_files"]] == [True]
    return {job["job_name"]: job for job in config["scrape_configs"]}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (page, anchor) == (RUNBOOKS, rule["alert"].lower())
    assert anchor in anchors(REPOSITORY / page)
    section = (REPOSITORY / page).read_text().split(f"\n## {rule['alert']}\n")[1].split("\n## ")[0].lower()
    assert f"**meaning** ({rule['labels']['severity']})" in section
    assert "**check**" in section
    assert re.search(r"\*\*(act\*\*:|check\*\* and \*\*act\*\*)", section)


def test_there_is_no_runbook_without_its_alert() -> None:
    headings = re.findall(r"^## (\w+)$", (REPOSITORY / RUNBOOKS).read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]


def test_the_operators_copy_of_the_alerts_is_current() -> None:
    assert gen_prometheus_rule.RULE.read_text() == gen_prometheus_rule.manifest()
    (rule,) = documents(gen_prometheus_rule.RULE)
    assert [entry for group in rule["spec"]["groups"] for entry in group["rules"]] == rules()


@pytest.mark.parametrize("service", CONFIGS)
def test_a_pod_has_a_metrics_port(service: str) -> None:
    [container] = pods()[service]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given[f"TANDEM_{service.upper()}_METRICS_PORT"] == str(ports["metrics"])


def test_a_policy_lets_prometheus_reach_the_metrics_ports_and_no_others() -> None:
    policies = {
        policy["metadata"]["name"]: policy["spec"] for policy in documents(KUBERNETES / "network-policies.yaml")
    }
    policy = policies["tandem-metrics"]
    assert policy["podSelector"] == policies["tandem-among-themselves"]["podSelector"]
    [ingress] = policy["ingress"]
    assert ingress["ports"] == [{"port": "metrics"}]
    assert ingress["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_the_pod_monitors_select_what_is_deployed() -> None:
    kustomization = documents(MONITORING / "kustomization.yaml")[0]
    assert set(kustomization["resources"]) == {file.name for file in MONITORING.glob("*.yaml")} - {"kustomization.yaml"}
    part_of = documents(KUBERNETES / "kustomization.yaml")[0]["labels"][0]
    assert part_of["includeTemplates"]
    found = {monitor["metadata"]["name"]: monitor["spec"] for monitor in documents(MONITORING / "pod-monitors.yaml")}
    assert set(found) == set(JOBS)
    assert found["tandem"]["selector"]["matchLabels"] == part_of["pairs"]
    assert found["tandem-envoy"]["selector"]["matchLabels"] == {"app": "tandem-edge"}
    for job, spec in found.items():
        [endpoint] = spec["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["path"]) == ("metrics", JOBS[job])
        targets = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
        assert set(targets) == LABELS | {"job"}
        assert targets["job"]["replacement"] == job
        assert_roles(targets["role"]["regex"])


def test_prometheus_without_the_operator_finds_the_same_pods() -> None:
    jobs = scrape_jobs("kubernetes.yml")
    assert {name: job["metrics_path"] for name, job in jobs.items()} == JOBS
    for name, job in jobs.items():
        relabels = job["relabel_configs"]
        app, port = (rule["regex"] for rule in relabels if rule.get("action") == "keep")
        assert port == "metrics"
        kept = {service for service in CONFIGS if re.fullmatch(app, f"tandem-{service}")}
        assert kept == (set(CONFIGS) if name == "tandem" else {"edge"})
        targets = {rule["target_label"]: rule for rule in relabels if "target_label" in rule}
        assert set(targets) == LABELS
        assert_roles(targets["role"]["regex"])


def assert_roles(regex: str) -> None:
    """The regular expression takes the role out of the label `app` of each pod."""
    found = [re.fullmatch(regex, f"tandem-{service}") for service in CONFIGS]
    assert [match and match[1] for match in found] == list(CONFIGS)


def test_prometheus_beside_consul_finds_what_nomad_and_machines_register() -> None:
    jobs = scrape_jobs("consul.yml")
    assert {name: job["metrics_path"] for name, job in jobs.items()} == JOBS
    for job in jobs.values():
        [discovery] = job["consul_sd_configs"]
        assert discovery["services"] == ["tandem-metrics"]
        sources = {rule["target_label"]: rule["source_labels"] for rule in job["relabel_configs"]}
        assert sources == {name: [f"__meta_consul_service_metadata_{name}"] for name in LABELS}
    assert jobs["tandem-envoy"]["consul_sd_configs"][0]["tags"] == ["edge"]


@pytest.mark.parametrize("service", CONFIGS)
def test_nomad_registers_a_metrics_port(service: str) -> None:
    group = NOMAD.read_text().split(f'  group "{service}" {{')[1].split("\n  group ")[0]
    assert 'port "metrics" {}' in group
    assert re.search(rf'TANDEM_{service.upper()}_METRICS_PORT += "\${{NOMAD_PORT_metrics}}"', group)
    metrics = group.split('name     = "tandem-metrics"')[1]
    assert 'port     = "metrics"' in metrics
    assert f'tags     = ["{service}"]' in metrics
    assert re.search(rf'process = "{service}-', metrics)
    assert f'role    = "{service}"' in metrics


def test_the_agent_of_a_machine_with_systemd_registers_the_ports_of_its_settings() -> None:
    registered = json.loads((DEPLOY / "consul" / "metrics.json").read_text())["services"]
    by_id = {entry["id"].removeprefix("tandem-metrics-"): entry for entry in registered}
    settings = {file.stem: tomllib.loads(file.read_text()) for file in SETTINGS}
    assert {name: entry["port"] for name, entry in by_id.items()} == {
        name: value["metrics_port"] for name, value in settings.items()
    }
    ports = [value[key] for value in settings.values() for key in ("port", "metrics_port")]
    assert len(set(ports)) == len(ports), "all of them run on one machine"
    for name, entry in by_id.items():
        service = name.partition("-")[0]
        assert (entry["name"], entry["tags"], entry["meta"]["role"]) == ("tandem-metrics", [service], service)
        assert set(entry["meta"]) == LABELS
        assert settings[name]["host"] in (entry["address"], "0.0.0.0")


def test_compose_scrapes_the_ports_that_its_processes_have() -> None:
    text = (DEPLOY / "compose" / "observability.env").read_text()
    ports = dict(re.findall(r"^TANDEM_([A-Z]+)_METRICS_PORT=(\d+)$", text, re.MULTILINE))
    assert {name.lower() for name in ports} == set(CONFIGS)
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    targets = json.loads((DEPLOY / "compose" / "targets.json").read_text())
    assert {target["labels"]["role"] for target in targets} == set(CONFIGS)
    for target in targets:
        [(host, port)] = [address.split(":") for address in target["targets"]]
        assert host in services
        assert port == ports[target["labels"]["role"].upper()]


@pytest.mark.parametrize("file", ["prometheus.yml", "consul.yml"])
def test_the_certificate_files_of_a_configuration_exist(file: str, tmp_path: Path) -> None:
    issue_all(tmp_path)
    named = re.findall(r"certs/([\w.-]+)", (PROMETHEUS / file).read_text())
    assert len(named) == 3
    assert [name for name in named if not (tmp_path / name).is_file()] == []
