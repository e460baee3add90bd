"""The balancer's Deployment, and what stands around it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chart_variants import PUSH, VARIANTS
from rendered_chart import CHART_DIR, REPOSITORY, Render

SECRETS_DIR = "/etc/gpu-balancer/secrets"


def test_readiness_asks_readyz_and_the_other_probes_healthz_on_the_ops_port(render: Render) -> None:
    container = render().container("Deployment")
    assert {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "startupProbe": {"path": "/healthz", "port": "ops"},
        "readinessProbe": {"path": "/readyz", "port": "ops"},
        "livenessProbe": {"path": "/healthz", "port": "ops"},
    }


@pytest.mark.parametrize(
    ("timeouts", "expected_s"),
    [
        ({}, 45),
        ({"drain_s": 120}, 135),
        ({"drain_grace_s": 0, "drain_s": 0}, 10),
        ({"drain_grace_s": 2.5, "drain_s": 30}, 43),
        ({"drain_grace_s": None}, 40),
        ({"drain_s": None}, 45),
    ],
)
def test_a_pod_has_ten_seconds_more_than_it_drains(render: Render, timeouts: dict[str, Any], expected_s: int) -> None:
    """A setting taken out by null has the program's default: drain_grace_s 0, drain_s 30."""
    release = render({"config": {"timeouts": timeouts}})
    grace_s = release.pod("Deployment")["terminationGracePeriodSeconds"]
    drained = release.config()["timeouts"]
    assert grace_s == expected_s
    assert grace_s == math.ceil((drained.get("drain_grace_s") or 0) + drained.get("drain_s", 30) + 10)
    assert "lifecycle" not in release.container("Deployment")


def test_the_ports_follow_the_settings(render: Render) -> None:
    release = render({"config": {"listen": "[::]:9000", "ops_listen": "0.0.0.0:9001"}})
    ports = {port["name"]: port["containerPort"] for port in release.container("Deployment")["ports"]}
    assert ports == {"http": 9000, "ops": 9001}
    assert release.config()["listen"] == "[::]:9000"


def test_data_and_operations_are_two_services(render: Render) -> None:
    release = render({"balancer": {"service": {"type": "LoadBalancer", "port": 80}}})
    data, ops = release.one("Service", "balancer"), release.one("Service", "-ops")
    assert data["spec"]["type"] == "LoadBalancer"
    assert ops["spec"]["type"] == "ClusterIP"
    assert [(p["port"], p["targetPort"]) for p in data["spec"]["ports"]] == [(80, "http")]
    assert [(p["port"], p["targetPort"]) for p in ops["spec"]["ports"]] == [(8081, "ops")]


def test_the_dashboard_stays_in_reach_while_no_balancer_is_ready(render: Render) -> None:
    assert render().one("Service", "-ops")["spec"]["publishNotReadyAddresses"] is True
    assert "publishNotReadyAddresses" not in render().one("Service", "balancer")["spec"]


def test_settings_reach_the_file_as_they_were_written(render: Render) -> None:
    """Helm holds every number as a float: large ones must not come out as 1e+09, which YAML reads as text."""
    wanted = {
        "cache": {"memory_bytes": 1_000_000_000, "ttl_s": 3600, "enabled": True},
        "limits": {"buffered_bytes": 1073741824, "requests_per_minute": None},
        "redis": {"url": None, "timeout_s": 0.02},
        "models": [{"name": "m", "revision": "2024-01-01", "aliases": ["yes", "007"]}],
    }
    config = render({"config": wanted}).config()
    assert {name: config[name] for name in wanted} == wanted
    assert isinstance(config["cache"]["memory_bytes"], int)
    assert config["timeouts"] == {"drain_grace_s": 5, "drain_s": 30}


def test_another_setting_rolls_the_pods_and_another_label_does_not(render: Render) -> None:
    def checksum(values: dict[str, Any]) -> str:
        return render(values).one("Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) == checksum({"commonLabels": {"team": "serving"}})
    assert checksum({}) != checksum({"config": {"retry": {"max_attempts": 2}}})


def test_each_secret_is_a_file_of_its_own_and_the_settings_name_it(render: Render) -> None:
    release = render(VARIANTS["every secret"])
    (volume,) = [each for each in release.pod("Deployment")["volumes"] if each["name"] == "secrets"]
    files = {
        (source["secret"]["name"], item["key"]): f"{SECRETS_DIR}/{item['path']}"
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    assert files == {
        ("redis", "url"): f"{SECRETS_DIR}/redis-url",
        ("keys", "admin"): f"{SECRETS_DIR}/admin-key-sha256",
        ("keys", "agent"): f"{SECRETS_DIR}/agent-token-sha256",
        ("tenants", "acme"): f"{SECRETS_DIR}/tenant-keys/acme",
        ("nodes", "first"): f"{SECRETS_DIR}/node-api-keys/a100-0",
        ("nodes", "second"): f"{SECRETS_DIR}/node-api-keys/a100-1",
    }
    assert release.environment("Deployment") == {
        "BALANCER_REDIS__URL_FILE": f"{SECRETS_DIR}/redis-url",
        "BALANCER_OPS__ADMIN_KEY_SHA256_FILE": f"{SECRETS_DIR}/admin-key-sha256",
        "BALANCER_OPS__AGENT_TOKEN_SHA256_FILE": f"{SECRETS_DIR}/agent-token-sha256",
    }
    assert [node["api_key_file"] for node in release.config()["nodes"]] == [
        f"{SECRETS_DIR}/node-api-keys/a100-0",
        f"{SECRETS_DIR}/node-api-keys/a100-1",
    ]
    assert [key.get("sha256_file") for key in release.config()["auth"]["keys"]] == [
        f"{SECRETS_DIR}/tenant-keys/acme",
        None,
    ]


def test_secret_files_are_for_the_balancers_group_only(render: Render) -> None:
    release = render(VARIANTS["every secret"])
    (volume,) = [each for each in release.pod("Deployment")["volumes"] if each["name"] == "secrets"]
    assert volume["projected"]["defaultMode"] == 0o440
    context = release.pod("Deployment")["securityContext"]
    assert context["fsGroup"] == context["runAsGroup"]


def test_no_secret_means_no_volume_and_no_variable(render: Render) -> None:
    release = render()
    assert {volume["name"] for volume in release.pod("Deployment")["volumes"]} == {"config", "tmp"}
    assert release.environment("Deployment") == {}


@pytest.mark.parametrize("variant", ["defaults", "nodes and tuned settings", "every secret"])
def test_the_balancer_itself_accepts_the_settings(render: Render, variant: str, tmp_path: Path) -> None:
    """`check-config` in the pod's environment, with the Secrets' files under `tmp_path`."""
    if find_spec("balancer.__main__") is None or find_spec("balancer.cli") is None:
        pytest.skip("the balancer has no command line yet")
    release = render(VARIANTS[variant])
    contents = {
        "redis-url": "redis://:hunter2@redis:6379/0",
        "admin-key-sha256": "a" * 64,
        "agent-token-sha256": "b" * 64,
        "tenant-keys/acme": "c" * 64,
        "node-api-keys/a100-0": "hunter2",
        "node-api-keys/a100-1": "hunter2",
    }
    for name, content in contents.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content + "\n")
    config = tmp_path / "balancer.yaml"
    config.write_text(release.config_text().replace(SECRETS_DIR, str(tmp_path)))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
    given = {
        name: str(value).replace(SECRETS_DIR, str(tmp_path))
        for name, value in release.environment("Deployment").items()
    }
    check = subprocess.run(
        [sys.executable, "-m", "balancer", "check-config", str(config)],
        cwd=REPOSITORY,
        env=inherited | given,
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
    assert "hunter2" not in check.stdout + check.stderr


def test_memory_holds_what_the_settings_allow_to_be_kept(render: Render) -> None:
    """The program's own defaults for cache.memory_bytes and limits.buffered_bytes, and 256 MiB for itself."""
    limit = render().container("Deployment")["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Gi")) * 1024**3 >= 268435456 + 1073741824 + 256 * 1024**2


def test_evictions_leave_all_but_one_balancer_running(render: Render) -> None:
    release = render()
    budget = release.one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert release.one("Deployment")["spec"]["replicas"] == 2
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_rollout_never_takes_a_balancer_away_first(render: Render) -> None:
    spec = render().one("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    # For 5 s after its start a node never judged yet makes a balancer ready.
    assert spec["minReadySeconds"] > 5


def test_the_autoscaler_owns_the_number_of_replicas(render: Render) -> None:
    release = render(VARIANTS["autoscaled"])
    assert "replicas" not in release.one("Deployment")["spec"]
    scaler = release.one("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == release.one("Deployment")["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 12)
    assert render().all("HorizontalPodAutoscaler") == []


def test_only_discovery_gets_an_api_token(render: Render) -> None:
    plain = render()
    assert plain.pod("Deployment")["automountServiceAccountToken"] is False
    assert plain.all("Role") == plain.all("RoleBinding") == []

    release = render(VARIANTS["discovery"])
    assert release.pod("Deployment")["automountServiceAccountToken"] is True
    assert [role["metadata"]["namespace"] for role in release.all("Role")] == ["engines", "more-engines"]
    for role in release.all("Role"):
        assert role["rules"] == [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
        ]
    for binding in release.all("RoleBinding"):
        (subject,) = binding["subjects"]
        assert subject["namespace"] == "inference"
        assert subject["name"] == release.pod("Deployment")["serviceAccountName"]


def test_pods_run_under_the_account_that_is_made_or_named(render: Render) -> None:
    release = render()
    accounts = {account["metadata"]["name"] for account in release.all("ServiceAccount")}
    assert accounts == {release.pod("Deployment")["serviceAccountName"], release.pod("DaemonSet")["serviceAccountName"]}

    named = render({"balancer": {"serviceAccount": {"create": False, "name": "mine"}}})
    assert named.pod("Deployment")["serviceAccountName"] == "mine"
    bare = render({"balancer": {"serviceAccount": {"create": False}}})
    assert bare.pod("Deployment")["serviceAccountName"] == "default"


def test_prometheus_scrapes_the_ops_service_once(render: Render) -> None:
    release = render(VARIANTS["monitored and closed"])
    monitor = release.one("ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    scraped = [
        s["metadata"]["name"] for s in release.all("Service") if selector.items() <= s["metadata"]["labels"].items()
    ]
    assert scraped == ["lb-gpu-balancer-ops"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("ops", "/metrics")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["inference"]}
    assert render().all("ServiceMonitor") == render().all("PodMonitor") == []


def ingress(policy: dict[str, Any]) -> dict[str, Any]:
    """Port name -> peers; None lets everyone in."""
    return {port["port"]: rule.get("from") for rule in policy["spec"]["ingress"] for port in rule["ports"]}


def test_the_ops_port_is_open_to_the_given_namespaces_only(render: Render) -> None:
    release = render({"networkPolicy": {"enabled": True, "opsNamespaces": ["monitoring", "sre"]}})
    rules = ingress(release.one("NetworkPolicy", "balancer"))
    assert rules["http"] is None
    assert rules["ops"] == [
        {
            "namespaceSelector": {
                "matchExpressions": [
                    {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["monitoring", "sre"]}
                ]
            }
        }
    ]


def test_no_namespaces_close_the_ops_port_and_not_open_it(render: Render) -> None:
    """An empty list of peers would let everyone in."""
    rules = ingress(render({"networkPolicy": {"enabled": True}}).one("NetworkPolicy", "balancer"))
    assert "ops" not in rules
    alone = render({"balancer": {"enabled": False}, "networkPolicy": {"enabled": True}})
    assert alone.one("NetworkPolicy")["spec"]["ingress"] == []


def test_balancer_and_agents_may_reach_each_other(render: Render) -> None:
    release = render({"agent": PUSH, "networkPolicy": {"enabled": True}})
    (agents,) = ingress(release.one("NetworkPolicy", "balancer"))["ops"]
    (balancers,) = ingress(release.one("NetworkPolicy", "-agent"))["agent"]
    assert agents["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "node-agent"
    assert balancers["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "balancer"


@pytest.mark.parametrize("name", ["x" * 53, "gpu-balancer", "123", "1e3"])
def test_any_release_name_gives_valid_names_and_labels(render: Render, name: str) -> None:
    release = render({"networkPolicy": {"enabled": True}}, name=name, namespace="42")
    for manifest in release.manifests:
        metadata = manifest["metadata"]
        assert len(metadata["name"]) <= 63
        assert metadata["namespace"] == "42"
        assert metadata["labels"]["app.kubernetes.io/instance"] == name


def test_the_image_is_named_by_tag_or_digest(render: Render) -> None:
    assert render().container("Deployment")["image"] == "gpu-balancer:0.1.0"
    tagged = render({"balancer": {"image": {"repository": "mirror/gpu-balancer", "tag": "0.2.0"}}})
    assert tagged.container("Deployment")["image"] == "mirror/gpu-balancer:0.2.0"
    pinned = render({"balancer": {"image": {"tag": "0.2.0", "digest": "sha256:" + "a" * 64}}})
    assert pinned.container("Deployment")["image"] == "gpu-balancer@sha256:" + "a" * 64


def test_notes_tell_what_is_missing(render: Render) -> None:
    notes = render().notes
    assert "No nodes" in notes
    assert "No admin key" in notes
    assert "No tenant keys" in notes
    notes = render(VARIANTS["every secret"]).notes
    assert "No " not in notes


def test_the_readme_names_every_section_of_the_values(chart: Any) -> None:
    readme = (CHART_DIR / "README.md").read_text()
    for section, below in chart.values.items():
        assert f"`{section}" in readme, section
        for name in below if section in ("balancer", "agent", "secrets", "monitoring", "networkPolicy") else ():
            assert f"`{section}.{name}" in readme, f"{section}.{name}"
