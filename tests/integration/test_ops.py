"""The operations port on a real socket: health, metrics, who may do what, and the admin API."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import aiohttp
import pytest

from balancer.admin import node_config
from balancer.core.node import NodeConfig
from balancer.core.request import NodeId
from balancer.errors import BadRequest, Forbidden, Unauthenticated
from balancer.explain import Call, Ring
from balancer.gate import Gate
from balancer.health_feed import MAX_BYTES, HealthFeed
from balancer.ops import OpsServer
from balancer.settings import AgentsConfig, OpsConfig, Settings, SettingsError, masked
from tests.answering import Fleet
from tests.fakes import ManualClock

KEY, TOKEN = "admin-key", "agent-token"
LOCAL = {"Host": "127.0.0.1:8081"}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Cache:
    def __init__(self) -> None:
        self.deleted: list[dict[str, str | None]] = []

    async def stats(self) -> dict[str, Any]:
        return {"hits": 3}

    async def delete(self, **given: str | None) -> int:
        self.deleted.append(given)
        return 2


class Ops:
    """An operations port over a small fleet, and what its callbacks were told."""

    def __init__(self, config: OpsConfig, listen: str) -> None:
        self.clock = ManualClock()
        self.fleet = Fleet(now=self.clock.now)
        self.node = self.fleet.put("http://10.0.0.7:8000", id="a", api_key="node-secret", models=("m",))
        self.ring, self.cache = Ring(), Cache()
        self.draining = False
        self.reload_error: Exception | None = None
        self.put: list[NodeConfig] = []
        self.removed: list[str] = []
        registry = self.fleet.registry
        settings = Settings(nodes=(self.node.config,), ops=config)
        self.server = OpsServer(
            listen,
            registry=registry,
            metrics=self.fleet.metrics,
            clock=self.clock,
            ring=self.ring,
            feed=HealthFeed(registry, AgentsConfig(), self.clock, Random(1), self.fleet.metrics),
            cache=self.cache,
            tenants=lambda: {"acme": {"requests": 5}},
            settings_view=lambda: masked(settings),
            reload=self._reload,
            drain_state=lambda: self.draining,
            ops_config=config,
            put_node=self._put,
            remove_node=self._remove,
        )

    def _put(self, config: NodeConfig) -> None:
        self.put.append(config)
        self.fleet.registry.put(config)

    def _remove(self, id_: NodeId) -> None:
        self.removed.append(id_)
        self.fleet.registry.remove(id_)

    async def _reload(self) -> list[str]:
        if self.reload_error is not None:
            raise self.reload_error
        return ["listen"]

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
        """Status, headers, and the body: JSON where it is."""
        url = f"http://{self.server.address}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, **options) as response:
            json = response.content_type == "application/json" and method != "HEAD"
            return response.status, response.headers, await (response.json() if json else response.text())

    async def data(self, method: str, path: str, **options: Any) -> Any:
        status, _, data = await self.ask(method, path, **options)
        assert status in (200, 201), data
        return data

    async def error(self, method: str, path: str, **options: Any) -> tuple[int, str, str | None]:
        """Status, code and param of an error in the OpenAI form."""
        status, _, data = await self.ask(method, path, **options)
        assert set(data) == {"error"}
        assert set(data["error"]) == {"message", "type", "param", "code"}
        return status, data["error"]["code"], data["error"]["param"]


@asynccontextmanager
async def running(listen: str = "127.0.0.1:0", **config: Any) -> AsyncIterator[Ops]:
    ops = Ops(OpsConfig(**config), listen)
    await ops.server.start()
    try:
        yield ops
    finally:
        await ops.server.close()


# -- health and metrics


async def test_readiness_follows_the_fleet_and_the_drain_and_health_does_not() -> None:
    async with running() as ops:
        assert await ops.data("GET", "/readyz") == {"status": "ready", "reason": None}
        ops.fleet.registry.checked(ops.node, False, "refused", ops.clock.now())
        status, headers, data = await ops.ask("GET", "/readyz")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert data == {"status": "not_ready", "reason": "no node is eligible by evidence"}
        ops.fleet.registry.checked(ops.node, True, "", ops.clock.now())
        ops.draining = True
        status, headers, data = await ops.ask("GET", "/readyz")
        assert (status, data["reason"]) == (503, "draining")
        assert await ops.data("GET", "/healthz") == {"status": "ok"}


async def test_head_is_answered_where_get_is() -> None:
    async with running() as ops:
        for path in ("/healthz", "/readyz", "/metrics", "/admin/nodes"):
            assert (await ops.ask("HEAD", path))[0] == 200


async def test_metrics_are_prometheus_text_and_need_no_key() -> None:
    async with running(admin_key_sha256=sha256(KEY)) as ops:
        status, headers, text = await ops.ask("GET", "/metrics")
        assert status == 200
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'balancer_node_state{node="a",state="ready"} 1.0' in text


async def test_unknown_paths_and_methods_are_refused_in_the_openai_form() -> None:
    async with running() as ops:
        assert await ops.error("GET", "/nowhere") == (404, "not_found", None)
        status, headers, data = await ops.ask("PATCH", "/admin/nodes/a")
        assert (status, headers["Allow"]) == (405, "DELETE, GET, HEAD, PUT")
        assert data["error"]["code"] == "method_not_allowed"


async def test_a_port_in_use_is_said_by_name() -> None:
    async with running() as ops:
        second = Ops(OpsConfig(), ops.server.address)
        with pytest.raises(OSError, match=f"ops_listen: {ops.server.address}: is in use"):
            await second.server.start()


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000"])
async def test_an_address_that_is_none_is_said_by_name(listen: str) -> None:
    with pytest.raises(OSError, match="must be HOST:PORT"):
        await Ops(OpsConfig(), listen).server.start()


async def test_closing_frees_the_port_and_does_not_wait_for_kept_connections() -> None:
    async with running() as ops, aiohttp.ClientSession() as session:
        address = ops.server.address
        async with session.get(f"http://{address}/healthz") as response:
            assert response.status == 200
        async with asyncio.timeout(5.0):
            await ops.server.close()
        async with running(address):
            pass


# -- who may


def test_a_gate_without_a_key_serves_this_machine_only() -> None:
    gate = Gate("admin key", None)
    for peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        gate.admit(LOCAL, peer)
    for peer in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "", "localhost", None):
        with pytest.raises(Forbidden):
            gate.admit({**LOCAL, "X-Forwarded-For": "127.0.0.1"}, peer)


def test_a_gate_without_a_key_refuses_names_and_pages_of_other_origins() -> None:
    gate = Gate("admin key", None)
    for host in ("localhost", "LOCALHOST:8081", "ops.localhost:1", "127.0.0.1", "[::1]:8081", "10.0.0.7:8081"):
        gate.admit({"Host": host}, "127.0.0.1")
        gate.admit({"Host": host, "Origin": f"http://{host}"}, "127.0.0.1")
        for origin in ("http://evil.example", "null", "", f"http://{host}.evil.example"):
            with pytest.raises(Forbidden):
                gate.admit({"Host": host, "Origin": origin}, "127.0.0.1")
    for host in ("evil.example", "evil.example:8081", "localhost.evil.example", "", "[", "127.0.0.1.evil.example"):
        with pytest.raises(Forbidden):
            gate.admit({"Host": host}, "127.0.0.1")


def test_a_gate_with_a_key_asks_everybody_for_it_and_nobody_for_more() -> None:
    gate = Gate("admin key", sha256(KEY).upper())
    gate.admit({"Authorization": f"Bearer {KEY}", "Host": "ops.example"}, "10.0.0.1")
    gate.admit({"Authorization": f"bearer  {KEY} "}, None)
    for value in ("", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", "Bearer \udcff", f"Bearer {sha256(KEY)}"):
        with pytest.raises(Unauthenticated):
            gate.admit({"Authorization": value, **LOCAL}, "127.0.0.1")


async def test_every_admin_call_is_behind_the_gate() -> None:
    calls = [
        ("GET", "/admin/nodes"),
        ("GET", "/admin/nodes/a"),
        ("PUT", "/admin/nodes/a"),
        ("DELETE", "/admin/nodes/a"),
        ("POST", "/admin/nodes/a/drain"),
        ("POST", "/admin/nodes/a/undrain"),
        ("GET", "/admin/requests/r"),
        ("GET", "/admin/cache"),
        ("DELETE", "/admin/cache?model=m"),
        ("GET", "/admin/tenants"),
        ("GET", "/admin/config"),
        ("POST", "/admin/reload"),
    ]
    async with running(admin_key_sha256=sha256(KEY)) as ops:
        for method, path in calls:
            assert await ops.error(method, path) == (401, "unauthenticated", None)
        _, headers, _ = await ops.ask("GET", "/admin/nodes")
        assert headers["WWW-Authenticate"] == "Bearer"
        assert (await ops.ask("GET", "/admin/nodes", headers={"Authorization": f"Bearer {KEY}"}))[0] == 200
    async with running() as ops:
        for method, path in calls:
            assert await ops.error(method, path, headers={"Host": "evil.example"}) == (403, "forbidden", None)
    assert (ops.put, ops.removed, ops.cache.deleted, ops.node.drained) == ([], [], [], False)


# -- the admin API


async def test_nodes_are_shown_without_their_secrets() -> None:
    async with running() as ops:
        shown = await ops.data("GET", "/admin/nodes")
        assert [node["id"] for node in shown["nodes"]] == ["a"]
        assert shown["unmatched"] == []
        assert await ops.data("GET", "/admin/nodes/a") == shown["nodes"][0]
        config = await ops.data("GET", "/admin/config")
        assert config["nodes"][0]["api_key"] == "***"
        assert "node-secret" not in f"{shown}{config}"
        assert await ops.error("GET", "/admin/nodes/b") == (404, "not_found", "id")


async def test_a_node_is_drained_and_undrained() -> None:
    async with running() as ops:
        assert (await ops.data("POST", "/admin/nodes/a/drain"))["admin"]["drained_by_operator"] is True
        assert ops.node.drained
        assert (await ops.data("POST", "/admin/nodes/a/undrain"))["state"] == "ready"
        assert not ops.node.drained
        assert await ops.error("POST", "/admin/nodes/b/drain") == (404, "not_found", "id")


async def test_a_node_is_added_replaced_and_removed() -> None:
    async with running() as ops:
        config = {"url": "http://10.0.0.8:8000", "weight": 2, "models": ["m"], "labels": {"zone": "b"}}
        status, _, node = await ops.ask("PUT", "/admin/nodes/b", json=config)
        assert (status, node["id"], node["weight"]) == (201, "b", 2.0)
        assert ops.put == [
            NodeConfig(id="b", url="http://10.0.0.8:8000", weight=2.0, models=("m",), labels={"zone": "b"})
        ]
        status, _, node = await ops.ask("PUT", "/admin/nodes/b", json={"id": "b", **config, "weight": 3})
        assert (status, node["weight"]) == (200, 3.0)
        assert await ops.data("DELETE", "/admin/nodes/b") == {"removed": "b"}
        assert ops.removed == ["b"]
        assert await ops.error("DELETE", "/admin/nodes/b") == (404, "not_found", "id")
        assert (await ops.ask("PUT", "/admin/nodes/10.0.0.9:8000", json=config))[2]["id"] == "10.0.0.9:8000"


async def test_a_wrong_node_is_refused_with_the_name_of_what_is_wrong() -> None:
    async with running() as ops:
        put = ("PUT", "/admin/nodes/b")
        assert await ops.error(*put, json={"url": "http://n:1", "wieght": 2}) == (400, "invalid_request", "wieght")
        assert await ops.error(*put, data=b"{") == (400, "invalid_json", None)
        assert await ops.error(*put, data=b" " * (MAX_BYTES + 1)) == (413, "body_too_large", None)
        assert ops.put == []


@pytest.mark.parametrize(
    ("id_", "data", "param"),
    [
        ("b", {}, "url"),
        ("b", [], None),
        ("b", None, None),
        ("b", {"url": "http://n:1", "weight": 0}, "weight"),
        ("b", {"url": "http://n:1", "max_in_flight": 0}, "max_in_flight"),
        ("b", {"url": "http://n:1", "models": "m"}, "models"),
        ("b", {"url": "http://n:1", "labels": {"zone": 1}}, "labels.zone"),
        ("b", {"url": "http://n:1", "id": "c"}, "id"),
        ("b", {"url": "http://n:1", "api_key_file": "/etc/shadow"}, "api_key_file"),
        ("b\r\nX-Evil: 1", {"url": "http://n:1"}, "id"),
        ("", {"url": "http://n:1"}, "id"),
        ("b", {"url": "n:1"}, "url"),
        ("b", {"url": "file:///etc/passwd"}, "url"),
        ("b", {"url": "http://"}, "url"),
        ("b", {"url": "http://user:word@n:1"}, "url"),
        ("b", {"url": "http://n:1/?x=1"}, "url"),
        ("b", {"url": "http://n:99999"}, "url"),
        ("b", {"url": "http://n:1\r\nX-Evil: 1"}, "url"),
        ("b", {"url": "http://n:1", "agent": "n:2"}, "agent"),
    ],
)
def test_node_fields_are_checked(id_: str, data: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        node_config(id_, data)
    assert refused.value.param == param


async def test_a_request_is_explained_while_it_is_remembered() -> None:
    async with running() as ops:
        ops.ring.add(Call("r-1", "chat", 1.0))
        assert (await ops.data("GET", "/admin/requests/r-1"))["request_id"] == "r-1"
        assert await ops.error("GET", "/admin/requests/r-2") == (404, "not_found", "request_id")


async def test_stored_answers_are_removed_by_what_is_named() -> None:
    async with running() as ops:
        assert await ops.data("GET", "/admin/cache") == {"hits": 3}
        assert await ops.data("DELETE", "/admin/cache?model=a%2Fb&tenant=acme") == {"deleted": 2}
        assert ops.cache.deleted == [{"tenant": "acme", "model": "a/b", "key": None, "older_than_s": None}]
        for query, param in (("", None), ("?model=", None), ("?modle=m", "modle"), ("?key=1&key=2", "key")):
            assert await ops.error("DELETE", f"/admin/cache{query}") == (400, "invalid_request", param)
        assert len(ops.cache.deleted) == 1


async def test_tenants_are_shown_and_settings_reloaded() -> None:
    async with running() as ops:
        assert await ops.data("GET", "/admin/tenants") == {"acme": {"requests": 5}}
        assert await ops.data("POST", "/admin/reload") == {"reloaded": True, "needs_restart": ["listen"]}
        ops.reload_error = SettingsError("nodes.0.wieght: no such setting")
        status, _, data = await ops.ask("POST", "/admin/reload")
        assert (status, data["error"]["message"]) == (400, "nodes.0.wieght: no such setting")


async def test_a_crash_is_a_500_that_says_nothing_of_the_inside() -> None:
    async with running() as ops:
        ops.reload_error = RuntimeError("the inside")
        status, _, data = await ops.ask("POST", "/admin/reload")
        assert (status, data["error"]["code"]) == (500, "internal")
        assert "the inside" not in data["error"]["message"]


# -- pushed reports


async def test_a_push_is_taken_from_this_machine_or_with_the_agents_token() -> None:
    report = {"version": 1, "host": "h", "boot_id": "b", "seq": 1, "nodes": [{"id": "a"}, {"id": "z"}]}
    push = ("POST", "/agent/v1/report")
    async with running(admin_key_sha256=sha256(KEY)) as ops:
        assert await ops.data(*push, json=report) == {"matched": 1}
        assert ops.node.report is not None
        assert set(ops.fleet.registry.nodes) == {"a"}
        assert await ops.error(*push, json={"version": 3}) == (400, "invalid_request", None)
        assert await ops.error(*push, data=b"\xff") == (400, "invalid_json", None)
        assert await ops.error(*push, data=b" " * (MAX_BYTES + 1)) == (413, "body_too_large", None)
    async with running(agent_token_sha256=sha256(TOKEN)) as ops:
        assert await ops.error(*push, json=report) == (401, "unauthenticated", None)
        assert await ops.data(*push, json=report, headers={"Authorization": f"Bearer {TOKEN}"}) == {"matched": 1}
        shown = await ops.data("GET", "/admin/nodes")
        assert [entry["id"] for entry in shown["unmatched"]] == ["z"]
        assert (await ops.data("GET", "/admin/nodes/a"))["report"] == {"id": "a"}
