"""New settings at run time: nodes and keys come and go without a lost request, and a wrong file changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from typing import Any

import pytest

from balancer.settings import SettingsError
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import chat, client_of, fleet, paced_node
from tests.harness import QUIET, Balancer, running
from tests.process import serving

STREAM = chat("a long story", stream=True)
PATIENT = {"health": {"timeout_s": 30.0}, "cache": {"enabled": False}}
GOOD = 'nodes: [{url: "http://127.0.0.1:1"}]\n'
WRONG = [
    ("nodes: [", "not YAML"),
    ("- a list", "must hold a mapping"),
    (GOOD + "retry: {max_atempts: 3}", "retry.max_atempts: no such setting"),
    (GOOD + "retry: {max_attempts: none}", "retry.max_attempts: "),
    (GOOD + "models: [{name: m, fallbacks: [n]}]", "models.fallbacks: is not built yet"),
    ('nodes: [{url: "http://127.0.0.1:1", id: x}, {url: "http://127.0.0.1:2", id: x}]', "the id x is there twice"),
]


def key_of(tenant: str) -> dict[str, str]:
    return {"tenant": tenant, "sha256": hashlib.sha256(f"{tenant}-key".encode()).hexdigest()}


def bearer(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant}-key"}


async def reload(balancer: Balancer, **changes: Any) -> list[str]:
    balancer.write_settings({**balancer.settings, **changes})
    return await balancer.app.reload()


# -- SIGHUP on a real process


async def test_sighup_adds_and_removes_nodes_and_keys_and_drops_nothing() -> None:
    async with paced_node() as old, FakeNode(instant=True) as new:
        settings = {"nodes": fleet(old), **PATIENT, "auth": {"keys": [key_of("acme")]}}
        async with serving(settings) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat(), headers=bearer("acme"))).node == "a"
            assert (await client.post(chat(), headers=bearer("new"))).code == "unauthenticated"
            old.faults.add(Fault("hang", after_events=3, first=1))
            story = client.begin(STREAM, headers=bearer("acme"))
            await old.wait_for(lambda: old.in_flight == 1)
            seen = len(old.requests)
            listen = {name: getattr(balancer, name).removeprefix("http://") for name in ("url", "ops_url")}
            here = {"listen": listen["url"], "ops_listen": listen["ops_url"], **PATIENT}
            await balancer.reload({**here, "nodes": fleet(new, id="b"), "auth": {"keys": [key_of("new")]}})
            replies = [await client.post(chat(f"{number}"), headers=bearer("new")) for number in range(10)]
            assert {reply.node for reply in replies} == {"b"}
            assert (await client.post(chat(), headers=bearer("acme"))).code == "unauthenticated"
            assert len(old.requests) == seen
            old.faults.release()
            reply = await story
            assert (reply.is_whole, reply.node, reply.text) == (True, "a", old.expected_text(STREAM))
            nodes = (await client.get(f"{balancer.ops_url}/admin/nodes")).json["nodes"]
            assert [node["id"] for node in nodes] == ["b"]


async def test_sighup_with_a_wrong_file_changes_nothing_and_is_logged() -> None:
    async with FakeNode(instant=True) as node:
        settings = {"nodes": fleet(node), **PATIENT, "auth": {"keys": [key_of("acme")]}}
        async with serving(settings) as balancer, client_of(balancer.url) as client:
            for number, (text, reason) in enumerate(WRONG, 1):
                balancer.write_settings(text)
                balancer.process.send(signal.SIGHUP)
                told = await balancer.logged("settings.rejected", number)
                assert (reason in told["reason"], told["level"]) == (True, "error")
            balancer.file.unlink()
            balancer.process.send(signal.SIGHUP)
            assert "No such file" in (await balancer.logged("settings.rejected", len(WRONG) + 1))["reason"]
            assert (await client.post(chat(), headers=bearer("acme"))).node == "a"
            assert (await client.post(chat())).code == "unauthenticated"
            assert balancer.events("settings.reloaded") == []


async def test_a_file_that_is_empty_for_a_moment_neither_removes_the_nodes_nor_opens_the_door() -> None:
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), auth={"keys": [key_of("acme")]}) as balancer,
        client_of(balancer.url) as client,
    ):
        balancer.write_settings("")
        with pytest.raises(SettingsError, match="nodes"):
            await balancer.app.reload()
        assert (await client.post(chat())).code == "unauthenticated"
        assert (await client.post(chat(), headers=bearer("acme"))).is_whole


@pytest.mark.parametrize(("text", "reason"), WRONG)
async def test_the_admin_api_says_why_a_file_is_wrong(text: str, reason: str) -> None:
    async with FakeNode(instant=True) as node, running(*fleet(node)) as balancer, client_of(balancer.url) as client:
        balancer.write_settings(text)
        told = await client.post(b"", f"{balancer.ops_url}/admin/reload")
        assert told.status == 400
        assert reason in told.json["error"]["message"]
        assert (await client.post(chat())).is_whole


# -- what changes and what stays


async def test_nodes_that_come_and_go_under_load_lose_nothing() -> None:
    async with paced_node() as a, paced_node() as b, paced_node() as c:
        everyone = fleet(a, b, c, weight=1.0)
        async with running(*everyone[:2], **QUIET) as balancer, client_of(balancer.url) as client:
            load = asyncio.create_task(client.many(300, lambda n: chat(f"{n}", stream=n % 2 == 0), at_once=16))
            for step in range(1, 25):
                await balancer.wait_for(lambda: len(balancer.requests) >= 10 * step)
                await reload(balancer, nodes=[everyone[step % 3], everyone[(step + 1) % 3]])
            replies = await load
        assert all(reply.is_whole and reply.attempts == 1 for reply in replies)
        assert all(len(node.requests) > 10 for node in (a, b, c))
        assert all(node.cancelled == 0 for node in (a, b, c)), "no running request was cut"


async def test_a_node_that_stays_keeps_its_evidence_and_its_connections() -> None:
    async with FakeNode(instant=True) as sick, FakeNode(instant=True) as well:
        sick.faults.add(Fault("status", status=500))
        settings = {**QUIET, "routing": {"policy": "round_robin"}, "breaker": {"open_s": 1000.0}}
        async with running(*fleet(sick, well), **settings) as balancer, client_of(balancer.url) as client:
            await client.many(12, at_once=1)
            assert balancer.node("a").breaker.state == "open"
            made = well.connections_made
            await reload(balancer, retry={"max_attempts": 2})
            assert all(reply.is_whole for reply in await client.many(12, at_once=1))
            assert balancer.node("a").breaker.state == "open"
            assert (len(sick.requests), well.connections_made) == (5, made)


async def test_a_node_whose_url_changes_is_asked_at_the_new_one() -> None:
    async with FakeNode(instant=True) as old, FakeNode(instant=True) as new:
        async with running(*fleet(old), **QUIET) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat())).is_whole
            await reload(balancer, nodes=fleet(new))
            assert all(reply.is_whole and reply.node == "a" for reply in await client.many(10))
        assert [len(old.requests), len(new.requests)] == [1, 10]


async def test_a_nodes_new_credential_is_used() -> None:
    async with (
        FakeNode(instant=True, api_key="second") as node,
        running(*fleet(node, api_key="first"), **QUIET) as balancer,
        client_of(balancer.url) as client,
    ):
        assert (await client.post(chat())).code == "upstream_bad_answer"
        await reload(balancer, nodes=fleet(node, api_key="second"))
        assert (await client.post(chat())).is_whole


async def test_retries_limits_and_the_queue_follow_a_reload() -> None:
    async with FakeNode(instant=True) as sick, FakeNode(instant=True) as well:
        sick.faults.add(Fault("reset"))
        async with running(*fleet(sick, well), **QUIET) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat())).attempts == 2
            await reload(balancer, retry={"max_attempts": 1}, nodes=fleet(sick))
            assert (await client.post(chat())).code == "upstream_unreachable"
            await reload(balancer, nodes=fleet(well), limits={"requests_per_minute": 0.001, "burst": 2})
            assert [(await client.post(chat())).status for _ in range(3)] == [200, 200, 429]


async def test_a_limit_on_bodies_follows_a_reload_or_is_named_by_it() -> None:
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), **QUIET) as balancer,
        client_of(balancer.url) as client,
    ):
        named = await reload(balancer, limits={"body_bytes": 2000})
        reply = await client.post(chat("x" * 4000))
        assert reply.status == 413 or "limits" in str(named)


async def test_a_limit_on_connections_follows_a_reload_or_is_named_by_it() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang", first=1))
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            named = await reload(balancer, upstream={"max_connections_per_node": 1})
            held = client.begin(chat("holds the only connection"))
            await node.wait_for(lambda: node.in_flight == 1)
            reply = await client.post(chat("a second one"))
            node.faults.release()
            assert (await held).is_whole
            assert reply.status == 503 or "upstream" in str(named)


async def test_a_setting_that_needs_a_restart_is_named() -> None:
    async with FakeNode(instant=True) as node, running(*fleet(node), **QUIET) as balancer:
        named = await reload(balancer, breaker={"open_s": 7.0}, ops={"admin_key_sha256": "0" * 64})
        assert named == ["breaker", "ops"]
