"""Values that cannot work are refused before anything reaches the cluster."""

from __future__ import annotations

from typing import Any

import pytest
from chart_variants import NODES, PUSH
from rendered_chart import Refusal, Render, Values


def nested(path: str, value: Any) -> Values:
    *outer, last = path.split(".")
    values: Values = {last: value}
    for name in reversed(outer):
        values = {name: values}
    return values


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("replicas", 2, "replicas"),
        ("balancer.replica", 2, "replica"),
        ("balancer.replicas", "2", "/balancer/replicas"),
        ("balancer.replicas", -1, "/balancer/replicas"),
        ("balancer.image.digest", "latest", "/balancer/image/digest"),
        ("balancer.image.pullPolicy", "Sometimes", "/balancer/image/pullPolicy"),
        ("balancer.resources.limits.memory", "2 GB", "/balancer/resources/limits/memory"),
        ("balancer.probes.readiness.path", "/", "path"),
        ("balancer.service.type", "ExternalName", "/balancer/service/type"),
        ("balancer.service.port", 70000, "/balancer/service/port"),
        ("balancer.opsService.type", "LoadBalancer", "type"),
        ("balancer.podDisruptionBudget.maxUnavailable", 0, "/balancer/podDisruptionBudget/maxUnavailable"),
        ("balancer.podDisruptionBudget.maxUnavailable", "0%", "/balancer/podDisruptionBudget/maxUnavailable"),
        ("balancer.podAnnotations.number", 1, "/balancer/podAnnotations/number"),
        ("balancer.extraEnv", [{"name": "BALANCER_TIMEOUTS__DRAIN_S", "value": "600"}], "/balancer/extraEnv/0/name"),
        ("balancer.rbac.namespaces", ["No_Name"], "/balancer/rbac/namespaces/0"),
        ("agent.engines", [], "/agent/engines"),
        ("agent.engines", [{"id": "a"}], "/agent/engines/0"),
        ("agent.engines", [{"url": "10.0.0.7:8000"}], "/agent/engines/0/url"),
        ("agent.engines", [{"url": "http://10.0.0.7:8000,id=a"}], "/agent/engines/0/url"),
        ("agent.engines", [{"url": "http://10.0.0.7:8000", "gpu": [0]}], "gpu"),
        ("agent.engines", [{"url": "http://10.0.0.7:8000", "gpus": ["0+1"]}], "/agent/engines/0/gpus/0"),
        ("agent.nvidia.driverCapabilities", "compute", "/agent/nvidia/driverCapabilities"),
        ("agent.extraEnv", [{"name": "NODE_AGENT_TOKEN", "value": "x"}], "/agent/extraEnv/0/name"),
        ("secrets.redisURL", {"name": "redis", "key": "url"}, "redisURL"),
        ("secrets.redisUrl", "redis://:x@redis", "/secrets/redisUrl"),
        ("secrets.nodeApiKeys", {"../escape": {"name": "n", "key": "k"}}, "../escape"),
        ("secrets.nodeApiKeys", {"a100-0": {"name": "n"}}, "/secrets/nodeApiKeys/a100-0"),
        ("config", {"timeouts": {"drain_s": "30"}}, "/config/timeouts/drain_s"),
        ("config", {"timeouts": {"drain_s": -1}}, "/config/timeouts/drain_s"),
        ("config", {"nodes": [{"id": "a100-0"}]}, "/config/nodes/0"),
        ("config.listen", "8080", "/config/listen"),
        ("monitoring.serviceMonitor.interval", "15", "/monitoring/serviceMonitor/interval"),
        ("fullnameOverride", "Not-Valid", "/fullnameOverride"),
    ],
)
def test_the_schema_refuses_and_names_the_place(refusal: Refusal, path: str, value: Any, named: str) -> None:
    assert named in refusal(nested(path, value))


def test_the_schema_leaves_settings_to_the_balancer_and_parents_their_own(render: Render) -> None:
    release = render({"config": {"not_known_here": {"a": 1}}, "global": {"x": 1}, "enabled": True})
    assert release.config()["not_known_here"] == {"a": 1}


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@redis:6379/0",
        "rediss://user:hunter2@redis:6379/0",
        "redis://:hun/ter2@redis:6379/0",
        "redis+sentinel://:hunter2@s1:26379,s2:26379/mymaster",
        "redis://redis:6379/0?password=hunter2",
        "unix://:hunter2@/run/redis.sock",
    ],
)
def test_a_password_in_the_redis_url_is_refused_and_not_repeated(refusal: Refusal, url: str) -> None:
    said = refusal({"config": {"redis": {"url": url}}})
    assert "config.redis.url contains a password" in said
    assert "secrets.redisUrl" in said
    assert "ter2" not in said


@pytest.mark.parametrize(
    "url", ["redis://redis:6379/0", "rediss://user@redis:6379", "redis://[::1]:6379/0", "unix:///run/redis.sock"]
)
def test_a_redis_url_without_a_password_is_taken(render: Render, url: str) -> None:
    assert render({"config": {"redis": {"url": url}}}).config()["redis"]["url"] == url


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"nodes": [{"id": "a", "url": "http://10.0.0.7:8000", "api_key": "hunter2"}]}, "config.nodes[0].api_key"),
        ({"nodes": [{"url": "http://user:hunter2@10.0.0.7:8000"}]}, "config.nodes[0].url"),
        ({"redis": {"password": "hunter2"}}, "config.redis.password"),
        ({"auth": {"keys": [{"tenant": "acme", "key": "hunter2"}]}}, "config.auth.keys[0].key"),
        ({"ops": {"admin_key": "hunter2"}}, "config.ops.admin_key"),
        ({"ops": {"agent_token": "hunter2"}}, "config.ops.agent_token"),
        ({"cache": {"semantic": {"embeddings_url": "http://u:hunter2@e/v1"}}}, "config.cache.semantic.embeddings_url"),
    ],
)
def test_no_secret_gets_into_the_configmap(refusal: Refusal, config: Values, path: str) -> None:
    said = refusal({"config": config})
    assert path in said
    assert "hunter2" not in said


def test_hashes_and_what_only_sounds_like_a_secret_may_be_in_the_configmap(render: Render) -> None:
    config = {
        "auth": {"keys": [{"tenant": "acme", "sha256": "a" * 64, "tokens_per_minute": 1000}]},
        "ops": {"admin_key_sha256": "b" * 64, "agent_token_sha256": None},
        "nodes": [{"id": "a", "url": "http://10.0.0.7:8000", "api_key": None}],
        "redis": {"url": None},
    }
    rendered = render({"config": config}).config()
    assert {name: rendered[name] for name in config} == config


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"config": {"listen": "127.0.0.1:8080"}}, "config.listen is 127.0.0.1:8080"),
        ({"config": {"ops_listen": "localhost:8081"}}, "config.ops_listen"),
        (
            {"config": {"redis": {"url": "redis://redis"}}, "secrets": {"redisUrl": {"name": "redis"}}},
            "config.redis.url and secrets.redisUrl are both set",
        ),
        (
            {
                "config": {"auth": {"keys": [{"tenant": "acme", "sha256": "a" * 64}]}},
                "secrets": {"tenantKeys": {"acme": {"name": "tenants", "key": "acme"}}},
            },
            "secrets.tenantKeys names acme",
        ),
        (
            {
                "config": {"auth": {"keys": [{"tenant": "acme"}, {"tenant": "acme"}]}},
                "secrets": {"tenantKeys": {"acme": {"name": "tenants", "key": "acme"}}},
            },
            "and 2 are",
        ),
        (
            {"config": {"nodes": NODES}, "secrets": {"nodeApiKeys": {"a100-9": {"name": "n", "key": "k"}}}},
            "secrets.nodeApiKeys names a100-9",
        ),
        ({"agent": {"balancerUrls": PUSH["balancerUrls"]}}, "agent.balancerUrls needs agent.token"),
        ({"balancer": {"podDisruptionBudget": {"minAvailable": 1}}}, "either maxUnavailable or minAvailable"),
        ({"balancer": {"podDisruptionBudget": {"maxUnavailable": None}}}, "either maxUnavailable or minAvailable"),
        (
            {"balancer": {"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": 2}}},
            "no pod could ever be evicted",
        ),
        ({"balancer": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "minReplicas is over maxReplicas"),
    ],
)
def test_values_that_contradict_each_other_are_refused(refusal: Refusal, values: Values, reason: str) -> None:
    assert reason in refusal(values)
