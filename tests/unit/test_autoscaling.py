"""The autoscalers for Kubernetes: fields of KEDA and Kubernetes, metrics that Tandem has, and time for a drain."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tandem.observability.metric_attributes import ROLES
from tests.unit.support.deployed_settings import REPOSITORY, drain_s
from tests.unit.test_deployments import DEPLOY, KUBERNETES, documents

AUTOSCALING = DEPLOY / "kubernetes" / "autoscaling"
SCALED = ("prefill", "decode")
METRIC = re.compile(r"(tandem_\w+?)(?:\{([^}]*)\})?(?=[\s)]|$)")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Policy(_Strict):
    """autoscaling/v2, HPAScalingPolicy."""

    type: Literal["Pods", "Percent"]
    value: int = Field(gt=0)
    periodSeconds: int = Field(gt=0, le=1800)  # noqa: N815


class Rules(_Strict):
    """autoscaling/v2, HPAScalingRules."""

    policies: list[Policy] = Field(min_length=1)
    stabilizationWindowSeconds: int | None = Field(None, ge=0, le=3600)  # noqa: N815
    selectPolicy: Literal["Max", "Min", "Disabled"] | None = None  # noqa: N815


class Behavior(_Strict):
    """autoscaling/v2, HorizontalPodAutoscalerBehavior."""

    scaleUp: Rules  # noqa: N815
    scaleDown: Rules  # noqa: N815


class Target(_Strict):
    """A Deployment."""

    name: str
    apiVersion: Literal["apps/v1"] = "apps/v1"  # noqa: N815
    kind: Literal["Deployment"] = "Deployment"


class Metadata(_Strict):
    """Of an object."""

    name: str


class PrometheusQuery(_Strict):
    """The metadata of KEDA's trigger `prometheus`: texts only."""

    serverAddress: str  # noqa: N815
    query: str
    threshold: str
    ignoreNullValues: Literal["true", "false"]  # noqa: N815


class Trigger(_Strict):
    """keda.sh/v1alpha1, ScaleTriggers."""

    type: Literal["prometheus"]
    metricType: Literal["AverageValue", "Value"]  # noqa: N815
    metadata: PrometheusQuery


class AutoscalerConfig(_Strict):
    """keda.sh/v1alpha1, HorizontalPodAutoscalerConfig."""

    behavior: Behavior


class Advanced(_Strict):
    """keda.sh/v1alpha1, AdvancedConfig."""

    horizontalPodAutoscalerConfig: AutoscalerConfig  # noqa: N815


class ScaledObjectSpec(_Strict):
    """keda.sh/v1alpha1, ScaledObjectSpec."""

    scaleTargetRef: Target  # noqa: N815
    minReplicaCount: int = Field(ge=1)  # noqa: N815
    maxReplicaCount: int  # noqa: N815
    pollingInterval: int = Field(gt=0)  # noqa: N815
    advanced: Advanced
    triggers: list[Trigger] = Field(min_length=1)


class ScaledObject(_Strict):
    """keda.sh/v1alpha1."""

    apiVersion: Literal["keda.sh/v1alpha1"]  # noqa: N815
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledObjectSpec


class MetricTarget(_Strict):
    """autoscaling/v2; quantities are texts."""

    type: Literal["AverageValue", "Value"]
    averageValue: str | None = None  # noqa: N815
    value: str | None = None


class External(_Strict):
    """autoscaling/v2, ExternalMetricSource."""

    metric: Metadata
    target: MetricTarget


class ExternalMetric(_Strict):
    """autoscaling/v2, MetricSpec."""

    type: Literal["External"]
    external: External


class AutoscalerSpec(_Strict):
    """autoscaling/v2, HorizontalPodAutoscalerSpec."""

    scaleTargetRef: Target  # noqa: N815
    minReplicas: int = Field(ge=1)  # noqa: N815
    maxReplicas: int  # noqa: N815
    behavior: Behavior
    metrics: list[ExternalMetric] = Field(min_length=1)


class Autoscaler(_Strict):
    """autoscaling/v2."""

    apiVersion: Literal["autoscaling/v2"]  # noqa: N815
    kind: Literal["HorizontalPodAutoscaler"]
    metadata: Metadata
    spec: AutoscalerSpec


def scaled_objects() -> dict[str, ScaledObject]:
    found = [ScaledObject(**one) for one in documents(AUTOSCALING / "keda" / "scaled-objects.yaml")]
    return {one.spec.scaleTargetRef.name: one for one in found}


def autoscalers() -> dict[str, Autoscaler]:
    found = [Autoscaler(**one) for one in documents(AUTOSCALING / "hpa" / "autoscalers.yaml")]
    return {one.spec.scaleTargetRef.name: one for one in found}


def adapter_rules() -> dict[str, dict[str, Any]]:
    values = yaml.safe_load((AUTOSCALING / "hpa" / "adapter-values.yaml").read_text())
    return {rule["name"]["as"]: rule for rule in values["rules"]["external"]}


def queries() -> list[str]:
    keda = [trigger.metadata.query for one in scaled_objects().values() for trigger in one.spec.triggers]
    return keda + [rule["metricsQuery"] for rule in adapter_rules().values()]


def test_both_sets_scale_the_workers_that_are_deployed() -> None:
    everything = [one for file in KUBERNETES.glob("*.yaml") for one in documents(file)]
    deployed = {one["metadata"]["name"] for one in everything if one["kind"] == "Deployment"}
    wanted = {f"tandem-{service}" for service in SCALED}
    assert set(scaled_objects()) == set(autoscalers()) == wanted <= deployed


@pytest.mark.parametrize("folder", ["keda", "hpa"])
def test_a_set_lists_files_that_exist(folder: str) -> None:
    [kustomization] = documents(AUTOSCALING / folder / "kustomization.yaml")
    for name in kustomization["resources"]:
        assert (AUTOSCALING / folder / name).is_file()


def test_queries_name_metrics_and_values_that_exist() -> None:
    lines = (REPOSITORY / "docs" / "reference" / "metrics.md").read_text().splitlines()
    for query in queries():
        names = METRIC.findall(query)
        assert len(names) == 2, query
        for series, matchers in names:
            metric = next(line for line in lines if f"| `{series}` |" in line).split("|")[1].strip()
            for label, value in re.findall(r'(\w+)="(\w+)"', matchers):
                if label == "role":
                    # The target's own label, which the PodMonitor sets.
                    assert value in ROLES
                    continue
                row = f"| `{label.replace('_', '.')}` | {metric} |"
                assert f"`{value}`" in next(line for line in lines if line.startswith(row))


def test_both_sets_ask_for_the_same() -> None:
    for name, scaled in scaled_objects().items():
        plain = autoscalers()[name].spec
        [trigger], [metric] = scaled.spec.triggers, plain.metrics
        target = metric.external.target
        assert adapter_rules()[metric.external.metric.name]["metricsQuery"] == trigger.metadata.query
        assert (target.type, target.averageValue or target.value) == (trigger.metricType, trigger.metadata.threshold)
        assert (plain.minReplicas, plain.maxReplicas) == (scaled.spec.minReplicaCount, scaled.spec.maxReplicaCount)
        assert plain.behavior == scaled.spec.advanced.horizontalPodAutoscalerConfig.behavior


@pytest.mark.parametrize("service", SCALED)
def test_one_worker_leaves_at_a_time_and_has_drained_before_the_next(service: str) -> None:
    down = autoscalers()[f"tandem-{service}"].spec.behavior.scaleDown
    [policy] = down.policies
    assert (policy.type, policy.value) == ("Pods", 1)
    assert policy.periodSeconds > drain_s(service)
    assert (down.stabilizationWindowSeconds or 0) >= policy.periodSeconds


def test_figures_that_are_missing_change_nothing() -> None:
    for one in scaled_objects().values():
        assert [trigger.metadata.ignoreNullValues for trigger in one.spec.triggers] == ["false"]
