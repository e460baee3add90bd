"""Helm accepts the chart, and Kubernetes would accept what it renders."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml
from chart_variants import VARIANTS
from rendered_chart import CHART_DIR, Manifest, Release, Render

pytestmark = pytest.mark.parametrize("variant", VARIANTS)

# Kinds of the Prometheus operator: no schema of them comes with Kubernetes.
CUSTOM_KINDS = {"ServiceMonitor", "PodMonitor"}


def oldest_and_newest_kubernetes(validate: ModuleType) -> tuple[str, str]:
    """The chart's own lower bound, and the newest version whose schemas are here."""
    constraint = yaml.safe_load((CHART_DIR / "Chart.yaml").read_text())["kubeVersion"]
    bound = re.match(r">=(\d+\.\d+)", constraint)
    assert bound, constraint
    return bound[1], validate.latest_version()


@pytest.fixture(scope="module")
def kubernetes_validate() -> Iterator[ModuleType]:
    module = pytest.importorskip("kubernetes_validate", exc_type=ImportError)
    # It reads the whole schema of a Kubernetes version anew for each object; once is enough.
    patch = pytest.MonkeyPatch()
    patch.setattr(module.utils, "schema_contents", functools.cache(module.utils.schema_contents))
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def accepted() -> set[tuple[str, str]]:
    """Objects already found valid, by version: most variants share most objects."""
    return set()


@pytest.fixture
def release(render: Render, variant: str) -> Release:
    return render(VARIANTS[variant])


def test_lint_finds_nothing_to_warn_of(helm: ModuleType, variant: str) -> None:
    report = helm.lint(CHART_DIR, VARIANTS[variant], strict=True)
    told = [message for message in report["messages"] if message["severity"] >= 2]
    assert (told, report["errors"]) == ([], [])


def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes(
    release: Release, kubernetes_validate: ModuleType, accepted: set[tuple[str, str]]
) -> None:
    assert release.manifests
    for manifest in release.manifests:
        if manifest["kind"] in CUSTOM_KINDS:
            continue
        for version in oldest_and_newest_kubernetes(kubernetes_validate):
            identity = version, json.dumps(manifest, sort_keys=True)
            if identity not in accepted:
                kubernetes_validate.validate(manifest, version, strict=True)
                accepted.add(identity)


def test_every_object_has_a_name_of_its_own_and_the_release_in_its_labels(release: Release) -> None:
    names = [(m["kind"], m["metadata"]["namespace"], m["metadata"]["name"]) for m in release.manifests]
    assert len(set(names)) == len(names)
    for manifest in release.manifests:
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "lb"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"


def test_what_selects_pods_selects_exactly_one_kind_of_pod(release: Release) -> None:
    pods = {
        manifest["metadata"]["name"]: manifest["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "DaemonSet")
        for manifest in release.all(kind)
    }
    for manifest in release.manifests:
        for selector in _pod_selectors(manifest):
            chosen = [name for name, labels in pods.items() if selector.items() <= labels.items()]
            assert len(chosen) == 1, (manifest["kind"], manifest["metadata"]["name"], chosen)


def _pod_selectors(manifest: Manifest) -> list[dict[str, str]]:
    spec: dict[str, Any] = manifest.get("spec", {})
    match manifest["kind"]:
        case "Service":
            return [spec["selector"]]
        case "Deployment" | "DaemonSet":
            spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
            return [spec["selector"]["matchLabels"], *(each["labelSelector"]["matchLabels"] for each in spread)]
        case "PodDisruptionBudget" | "PodMonitor":
            return [spec["selector"]["matchLabels"]]
        case "NetworkPolicy":
            return [spec["podSelector"]["matchLabels"]]
    return []


def test_ports_are_named_alike_where_they_are_opened_and_where_they_are_used(release: Release) -> None:
    for kind in ("Deployment", "DaemonSet"):
        for workload in release.all(kind):
            (container,) = workload["spec"]["template"]["spec"]["containers"]
            opened = {port["name"] for port in container["ports"]}
            probed = {
                container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            }
            assert probed <= opened
    for service in release.all("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= {"http", "ops"}


def test_every_pod_is_restricted(release: Release) -> None:
    for kind in ("Deployment", "DaemonSet"):
        for workload in release.all(kind):
            pod = workload["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]
            # BALANCER_PORT and its like would come from a Service of that name, and stop the start.
            assert pod["enableServiceLinks"] is False


def test_nothing_of_a_secret_is_rendered_but_its_name(release: Release) -> None:
    assert release.all("Secret") == []
    for kind in ("Deployment", "DaemonSet"):
        for workload in release.all(kind):
            environment = workload["spec"]["template"]["spec"]["containers"][0].get("env", [])
            assert [entry for entry in environment if "secretKeyRef" in entry.get("valueFrom", {})] == []
