"""Warm-up from a file, by hand and at the start; and the way back: what is asked for most, exported as such a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from balancer.cli import main
from balancer.warmup import BadLine, Summary, bar, own_url, requests, warm_up
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, caches, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, ask, chat

# What OpenAI's clients send, and so does a warm-up that is told nothing else: it is part of the key.
ACCEPT = "Accept: application/json"
COMPLETION = {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 6}


def write(file: Path, *lines: Any) -> str:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


async def run(*arguments: str) -> int:
    """The program's exit status; it runs in a thread, beside the balancer it talks to."""

    def call() -> int:
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return await asyncio.to_thread(call)


# -- the file


def test_a_line_is_a_chat_body_or_names_its_path(file: Path) -> None:
    big = '{"path": "/v1/completions", "body": {"seed": 123456789012345678901234567890, "prompt": "ä"}}'
    path = write(file, chat(), "", {"path": "/v1/completions", "body": COMPLETION}, big)
    found = list(requests(path))
    assert [line.path for line in found] == [CHAT, "/v1/completions", "/v1/completions"]
    assert json.loads(found[0].body) == chat()
    assert b"123456789012345678901234567890" in found[2].body
    assert "ä".encode() in found[2].body


@pytest.mark.parametrize(
    "line", ["x", "[]", '"x"', '{"path": 1, "body": {}}', '{"path": "v1", "body": {}}', '{"headers": 1, "body": {}}']
)
def test_a_line_that_is_no_request_is_named(file: Path, line: str) -> None:
    with pytest.raises(BadLine, match=r"requests\.jsonl:2: "):
        list(requests(write(file, chat(), line)))


def test_a_data_port_is_reached_from_its_own_machine() -> None:
    assert own_url("0.0.0.0:8080") == "http://127.0.0.1:8080"
    assert own_url("[::]:8080") == "http://[::1]:8080"
    assert own_url("10.0.0.1:80") == "http://10.0.0.1:80"


def test_progress_is_told_in_a_line() -> None:
    summary = Summary(total=4)
    summary.results.update(["hit", "miss", "miss"])
    assert bar(summary, width=8) == "[######..] 3 of 4 requests: 1 hit, 2 miss"


# -- sending


async def test_a_warm_up_fills_the_cache_once(balancer: Balancer, node: FakeNode, file: Path) -> None:
    path = write(file, *(chat(str(number)) for number in range(20)), {"path": "/v1/completions", "body": COMPLETION})
    seen: list[int] = []
    summary = await warm_up(path, url=balancer.url, concurrency=5, on_progress=lambda told: seen.append(told.done))
    assert (dict(summary.results), summary.failed, seen) == ({"miss": 21}, 0, list(range(1, 22)))
    assert len(node.requests) == 21
    again = await warm_up(path, url=balancer.url, concurrency=5)
    assert dict(again.results) == {"hit": 21}
    asked = (chat("7"), CHAT, ACCEPT), (COMPLETION, "/v1/completions", ACCEPT)
    assert await caches(balancer, *asked) == ["hit", "hit"]


async def test_no_more_are_under_way_at_once_than_asked_for(serve: Serve, file: Path) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.002) as slow:
        balancer = await serve(slow)
        most = 0

        def look(_: Summary) -> None:
            nonlocal most
            most = max(most, slow.in_flight)

        path = write(file, *(chat(str(number)) for number in range(12)))
        await warm_up(path, url=balancer.url, concurrency=3, on_progress=look)
        assert 0 < most <= 3


async def test_failures_are_counted_and_the_first_is_told(balancer: Balancer, node: FakeNode, file: Path) -> None:
    node.faults.add(Fault("status", status=400, first=1, body='{"error": {"message": "too long"}}'))
    summary = await warm_up(write(file, chat("a"), chat("b")), url=balancer.url, concurrency=1)
    assert (summary.failed, summary.results["miss"]) == (1, 1)
    assert "too long" in summary.first_failure
    nobody = await warm_up(str(file), url="http://127.0.0.1:1", concurrency=1)
    assert nobody.failed == 2


async def test_the_command_says_what_became_of_it(
    balancer: Balancer, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(file, chat("a"), chat("b"), chat("a"))
    assert await run("warmup", path, "--url", balancer.url, "--concurrency", "1") == 0
    assert capsys.readouterr().out.endswith("3 of 3 requests: 1 hit, 2 miss\n")
    assert await run("warmup", path, "--url", "http://127.0.0.1:1") == 1
    assert await run("warmup", str(tmp_path / "absent")) == 2
    assert await run("warmup", write(file, "x"), "--url", balancer.url) == 2
    assert await run("warmup", path, "--concurrency", "0") == 2


async def test_a_balancer_warms_itself_up_with_low_priority_and_its_own_key(
    node: FakeNode, serve: Serve, file: Path
) -> None:
    cache = {"warmup_file": write(file, chat("a"), chat("b")), "warmup_key": "acme"}
    balancer = await serve(node, **auth(key("acme")), cache=cache)
    await balancer.wait_for(lambda: len(balancer.requests) == 2)
    assert {call["tenant"] for call in balancer.requests} == {"acme"}
    assert await caches(balancer, (chat("a"), CHAT, ACCEPT, bearer("acme"))) == ["hit"]


async def test_a_warm_up_that_cannot_be_had_stops_nothing(node: FakeNode, serve: Serve, tmp_path: Path) -> None:
    balancer = await serve(node, cache={"warmup_file": str(tmp_path / "absent")})
    assert await caches(balancer, (chat(),)) == ["miss"]


# -- what is asked for most


async def top(balancer: Balancer, query: str = "") -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{balancer.ops_url}/admin/cache/top{query}") as answer:
        return answer.status, await answer.json()


async def test_the_most_asked_for_come_first_and_tell_no_prompt(balancer: Balancer) -> None:
    for text, times in (("once", 2), ("often", 5), ("never again", 1)):
        await caches(balancer, *[(chat(text),)] * times)
    status, told = await top(balancer, "?requests=true")
    assert status == 200
    assert [one["hits"] for one in told["top"]] == [4, 1]
    first = told["top"][0]
    assert set(first) == {"key", "tenant", "model", "hits", "bytes", "saved_s"}
    assert (first["tenant"], first["model"]) == ("anonymous", MODEL)
    assert await balancer.app.cache.delete(tenant=None, model=None, key=first["key"]) == 1
    assert len((await top(balancer, "?count=1"))[1]["top"]) == 1
    for wrong in ("?count=0", "?count=x", "?count=1001", "?requests=yes", "?prompt=1"):
        assert (await top(balancer, wrong))[0] == 400


async def test_an_export_warms_another_balancer_up(
    node: FakeNode, serve: Serve, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = await serve(node, cache={"keep_requests": True}), await serve(node)
    odd = chat("ä ☃", seed=12345678901234567, top_p=1.0)
    await caches(one, *[(odd,)] * 3, *[(chat("b"),)] * 2, (chat("not hit"),))
    target = str(tmp_path / "top.jsonl")
    capsys.readouterr()
    assert await run("cache", "top", "--ops", one.ops_url, "--export", target) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["hits", "2", "1"]
    assert "☃" not in printed.out + printed.err
    assert await run("warmup", target, "--url", two.url) == 0
    assert await caches(two, (odd,), (chat("b"),), (chat("not hit"),)) == ["hit", "hit", "miss"]


async def test_requests_are_not_kept_unless_the_operator_says_so(
    balancer: Balancer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await caches(balancer, *[(chat(),)] * 3)
    target = tmp_path / "top.jsonl"
    assert await run("cache", "top", "--ops", balancer.ops_url, "--export", str(target)) == 0
    assert target.read_text() == ""
    assert "cache.keep_requests" in capsys.readouterr().err


async def test_the_command_needs_the_admin_key_where_there_is_one(
    node: FakeNode, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balancer = await serve(node, ops={"admin_key_sha256": hashlib.sha256(b"secret").hexdigest()})
    assert await run("cache", "top", "--ops", balancer.ops_url) == 1
    assert "the admin key is required" in capsys.readouterr().err
    secret = tmp_path / "key"
    secret.write_text("secret\n")
    assert await run("cache", "top", "--ops", balancer.ops_url, "--key-file", str(secret)) == 0
    assert await run("cache", "top", "--ops", "http://127.0.0.1:1") == 1
    assert (await ask(balancer, chat())).cache == "miss"
