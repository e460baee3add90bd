"""The agents' DaemonSet."""

from __future__ import annotations

import pytest
from chart_variants import PUSH, VARIANTS
from rendered_chart import Render


def test_agents_run_on_gpu_hosts_and_claim_no_gpu(render: Render) -> None:
    release = render()
    pod, container = release.pod("DaemonSet"), release.container("DaemonSet")
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert "nvidia.com/gpu" not in str(container["resources"])
    environment = release.environment("DaemonSet")
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "utility"
    assert "runtimeClassName" not in pod


def test_an_agent_reports_its_hosts_name_and_not_its_pods(render: Render) -> None:
    environment = render().environment("DaemonSet")
    assert environment["NODE_AGENT_HOST"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert environment["HOST_IP"] == {"fieldRef": {"fieldPath": "status.hostIP"}}


def test_agents_are_reached_at_their_hosts_address_unless_they_only_push(render: Render) -> None:
    def host_port(agent: dict[str, object]) -> int | None:
        (port,) = render({"agent": agent}).container("DaemonSet")["ports"]
        assert port["containerPort"] == agent.get("port", 9477)
        return port.get("hostPort")

    assert host_port({}) == 9477
    assert host_port({"port": 9999}) == 9999
    assert host_port({"hostPort": False}) is None
    assert host_port({"hostPort": False, "hostNetwork": True}) == 9477
    assert "Nobody hears the agents" in render({"agent": {"hostPort": False}}).notes


def test_the_hosts_namespaces_are_entered_only_on_request(render: Render) -> None:
    plain = render().pod("DaemonSet")
    assert not {"hostNetwork", "hostPID", "hostIPC", "dnsPolicy"} & plain.keys()
    entered = render(VARIANTS["agents on the host's network"]).pod("DaemonSet")
    assert (entered["hostNetwork"], entered["hostPID"]) == (True, True)
    # The cluster's names have to be found from the host's network as well.
    assert entered["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert entered["runtimeClassName"] == "nvidia"


def test_engines_become_specs_on_the_command_line(render: Render) -> None:
    args = render(VARIANTS["agents on the host's network"]).container("DaemonSet")["args"]
    assert args[:2] == ["serve", "--listen=0.0.0.0:9477"]
    assert [arg for arg in args if arg.startswith("--engine=")] == [
        "--engine=http://127.0.0.1:8000,id=$(NODE_NAME)-0,kind=vllm,gpus=0+1",
        "--engine=http://127.0.0.1:8001,id=$(NODE_NAME)-1,advertise=http://$(HOST_IP):8001"
        ",metrics=http://127.0.0.1:9001/metrics,gpus=GPU-5e1b0e2f",
    ]


@pytest.mark.parametrize("variant", ["defaults", "agents on the host's network"])
def test_the_agent_itself_reads_the_specs(render: Render, variant: str) -> None:
    engine_spec = pytest.importorskip("node_agent.engine_spec", exc_type=ImportError)
    args = render(VARIANTS[variant]).container("DaemonSet")["args"]
    specs = [arg.removeprefix("--engine=") for arg in args if arg.startswith("--engine=")]
    assert specs
    for spec in specs:
        engine_spec.parse(spec.replace("$(HOST_IP)", "10.0.0.7").replace("$(NODE_NAME)", "gpu-7"))


def test_agents_push_with_a_token_from_a_file(render: Render) -> None:
    release = render({"agent": PUSH})
    container = release.container("DaemonSet")
    assert "--balancer=http://lb-gpu-balancer-ops.inference.svc:8081" in container["args"]
    path = release.environment("DaemonSet")["NODE_AGENT_TOKEN_FILE"]
    (volume,) = [each for each in release.pod("DaemonSet")["volumes"] if each["name"] == "token"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "token"]
    assert volume["secret"]["secretName"] == "agent-token"
    assert [f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]] == [path]
    assert mount["readOnly"] is True


def test_notes_warn_of_reports_that_will_not_arrive(render: Render) -> None:
    pushing = render({"agent": PUSH}).notes
    assert "knows no agent token" in pushing
    assert "reaches one replica only" in pushing
    sure = {"balancer": {"replicas": 1}, "secrets": {"agentTokenSha256": {"name": "agent-token", "key": "sha256"}}}
    notes = render({"agent": PUSH, **sure}).notes
    assert "knows no agent token" not in notes
    assert "one replica only" not in notes


def test_prometheus_scrapes_the_agents_pods_and_keeps_their_hosts_name(render: Render) -> None:
    (endpoint,) = render(VARIANTS["monitored and closed"]).one("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("agent", "/metrics")
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "host"}]


def test_agents_can_be_left_out_and_be_alone(render: Render) -> None:
    assert render({"agent": {"enabled": False}}).all("DaemonSet") == []
    kinds = {manifest["kind"] for manifest in render({"balancer": {"enabled": False}}).manifests}
    assert kinds == {"DaemonSet", "ServiceAccount"}
