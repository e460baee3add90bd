"""Values that operators would write, one set for each way of running the chart."""

from __future__ import annotations

from typing import Any

NODES = [
    {"id": "a100-0", "url": "http://10.0.0.7:8000", "agent": "http://10.0.0.7:9477"},
    {"id": "a100-1", "url": "http://10.0.0.8:8000", "agent": "http://10.0.0.8:9477", "weight": 0.5},
]

SECRETS = {
    "redisUrl": {"name": "redis", "key": "url"},
    "adminKeySha256": {"name": "keys", "key": "admin"},
    "agentTokenSha256": {"name": "keys", "key": "agent"},
    "tenantKeys": {"acme": {"name": "tenants", "key": "acme"}},
    "nodeApiKeys": {"a100-0": {"name": "nodes", "key": "first"}, "a100-1": {"name": "nodes", "key": "second"}},
}

TENANTS = [{"tenant": "acme", "requests_per_minute": 600, "burst": 50}, {"tenant": "other", "sha256": "d" * 64}]

PUSH = {
    "balancerUrls": ['http://{{ include "gpu-balancer.fullname" . }}-ops.{{ .Release.Namespace }}.svc:8081'],
    "token": {"name": "agent-token", "key": "token"},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nodes and tuned settings": {
        "config": {
            "nodes": NODES,
            "timeouts": {"drain_s": 120, "unary_s": None},
            "cache": {"memory_bytes": 1_000_000_000, "max_entry_bytes": 1048576},
            "limits": {"buffered_bytes": 1073741824},
            "redis": {"url": "redis://redis:6379/0", "timeout_s": 0.02},
        }
    },
    "every secret": {"config": {"nodes": NODES, "auth": {"keys": TENANTS}}, "secrets": SECRETS},
    "autoscaled": {
        "balancer": {
            "autoscaling": {
                "enabled": True,
                "minReplicas": 3,
                "maxReplicas": 12,
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
                "metrics": [
                    {
                        "type": "Pods",
                        "pods": {
                            "metric": {"name": "balancer_event_loop_lag_seconds"},
                            "target": {"type": "AverageValue", "averageValue": "20m"},
                        },
                    }
                ],
            },
            "podDisruptionBudget": {"maxUnavailable": "34%"},
        }
    },
    "monitored and closed": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True},
        },
        "networkPolicy": {
            "enabled": True,
            "opsNamespaces": ["monitoring"],
            "dataFrom": [{"namespaceSelector": {"matchLabels": {"inference": "allowed"}}}],
            "agentFrom": [{"ipBlock": {"cidr": "10.0.0.0/16"}}],
        },
    },
    "discovery": {"balancer": {"rbac": {"endpointSlices": True, "namespaces": ["engines", "more-engines"]}}},
    "placed": {
        "imagePullSecrets": [{"name": "pull"}],
        "commonLabels": {"team": "serving"},
        "balancer": {
            "image": {"digest": "sha256:" + "0" * 64},
            "service": {"type": "LoadBalancer", "port": 80, "externalTrafficPolicy": "Local"},
            "podDisruptionBudget": {"maxUnavailable": None, "minAvailable": 1},
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "system-cluster-critical",
            "podAnnotations": {"a": "b"},
            "podLabels": {"c": "d"},
            "extraEnv": [{"name": "TZ", "value": "UTC"}],
            "extraVolumes": [{"name": "model", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "model", "mountPath": "/model"}],
            "serviceAccount": {"create": False},
        },
    },
    "agents on the host's network": {
        "agent": {
            **PUSH,
            "hostNetwork": True,
            "hostPID": True,
            "runtimeClassName": "nvidia",
            "extraEnv": [{"name": "NODE_AGENT_LOG__LEVEL", "value": "debug"}],
            "podAnnotations": {"a": "b"},
            "engines": [
                {"url": "http://127.0.0.1:8000", "id": "$(NODE_NAME)-0", "kind": "vllm", "gpus": [0, 1]},
                {
                    "url": "http://127.0.0.1:8001",
                    "id": "$(NODE_NAME)-1",
                    "advertise": "http://$(HOST_IP):8001",
                    "metrics": "http://127.0.0.1:9001/metrics",
                    "gpus": ["GPU-5e1b0e2f"],
                },
            ],
        }
    },
    "agents that push, behind a policy": {
        "agent": {**PUSH, "hostPort": False},
        "secrets": {"agentTokenSha256": {"name": "agent-token", "key": "sha256"}},
        "networkPolicy": {"enabled": True},
    },
    "balancer alone": {"agent": {"enabled": False}, "networkPolicy": {"enabled": True, "opsNamespaces": ["ops"]}},
    "agents alone": {"balancer": {"enabled": False}, "networkPolicy": {"enabled": True}},
}
