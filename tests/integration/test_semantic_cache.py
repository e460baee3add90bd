"""The semantic cache as clients see it, in front of real nodes and a real `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, caches, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, ask, chat
from tests.integration.scripted_node import ScriptedNode, ok
from tests.real.vector_server import Unavailable, VectorServer

ASKED = "What is the capital of Australia?"
REWORDED = "Please tell me the capital city of Australia."
OTHER = "What is the capital of Austria?"


def semantic(embedder: FakeNode, **fields: Any) -> dict[str, Any]:
    """Settings of a guarded cache that serves; letters likeness is lower than a model's, so the threshold is too."""
    url = f"{embedder.url}/v1/embeddings"
    # A busy machine must not make a lookup late.
    section = {"enabled": True, "embeddings_url": url, "embeddings_model": MODEL, "mode": "guarded", "shadow": False}
    return {"semantic": {**section, "threshold": 0.5, "timeout_s": 1.0, **fields}}


@pytest.fixture
async def guarded(node: FakeNode, other: FakeNode, serve: Serve) -> Balancer:
    """A balancer that serves other wordings; `other` embeds."""
    return await serve(node, cache=semantic(other))


async def settled(balancer: Balancer) -> None:
    assert balancer.app.semantic is not None
    await balancer.app.semantic.settled()


async def fill(balancer: Balancer, *bodies: Any) -> None:
    for body in bodies:
        assert (await ask(balancer, body)).status == 200
    await settled(balancer)


async def test_another_wording_gets_the_stored_answer(guarded: Balancer, node: FakeNode) -> None:
    first = await ask(guarded, chat(ASKED))
    await settled(guarded)
    second = await ask(guarded, chat(REWORDED))
    assert (first.cache, second.cache) == ("miss", "semantic")
    assert second.body == first.body
    assert (second.header("age"), second.header("x-balancer-attempts")) == ("0", "0")
    assert len(node.requests) == 1
    assert guarded.counts("semantic_lookups") == {("far",): 1, ("served",): 1}


async def test_another_question_is_asked_of_the_node(guarded: Balancer, node: FakeNode) -> None:
    await fill(guarded, chat(ASKED))
    assert (await ask(guarded, chat(OTHER))).cache == "miss"
    assert len(node.requests) == 2
    assert guarded.counts("semantic_lookups") == {("far",): 1, ("unlike",): 1}


async def test_a_stream_and_a_unary_answer_stand_in_for_each_other(guarded: Balancer) -> None:
    await fill(guarded, chat(ASKED))
    streamed = await ask(guarded, chat(REWORDED, stream=True))
    assert streamed.cache == "semantic"
    assert streamed.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"temperature": 0.0},
        {"max_tokens": 9},
        {"response_format": {"type": "text"}},
        {"unknown": True},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": REWORDED}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                      {"role": "user", "content": REWORDED}]},
        {"messages": [{"role": "user", "name": "eve", "content": REWORDED}]},
    ],
)  # fmt: skip
async def test_everything_but_the_question_has_to_be_equal(guarded: Balancer, changed: dict[str, Any]) -> None:
    await fill(guarded, chat(ASKED))
    assert (await ask(guarded, chat(REWORDED, **changed))).cache == "miss"


async def test_no_tenant_gets_an_answer_of_another(node: FakeNode, other: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache=semantic(other), **auth(key("acme"), key("evil")))
    assert (await ask(balancer, chat(ASKED), CHAT, bearer("acme"))).cache == "miss"
    await settled(balancer)
    assert (await ask(balancer, chat(REWORDED), CHAT, bearer("evil"))).cache == "miss"
    assert (await ask(balancer, chat(REWORDED), CHAT, bearer("acme"))).cache == "semantic"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "pay"}}]},
        {"n": 2},
        {"logprobs": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": REWORDED},
                                                  {"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": REWORDED}, {"role": "assistant", "content": "Well,"}]},
    ],
)  # fmt: skip
async def test_what_may_set_something_off_or_is_no_text_is_never_looked_up(
    guarded: Balancer, fields: dict[str, Any]
) -> None:
    await fill(guarded, chat(ASKED, **{name: value for name, value in fields.items() if name != "messages"}))
    before = guarded.counts("semantic_lookups").get(("exact_only",), 0)
    assert (await ask(guarded, chat(REWORDED, **fields))).cache == "miss"
    assert guarded.counts("semantic_lookups")["exact_only",] == before + 1


async def test_headers_say_no(guarded: Balancer) -> None:
    await fill(guarded, chat(ASKED))
    modes = [(chat(REWORDED), CHAT, f"X-Balancer-Cache: {mode}") for mode in ("bypass", "refresh")]
    assert await caches(guarded, *modes) == ["bypass", "bypass"]
    other_words = chat("Tell me the capital of Australia.")
    assert await caches(guarded, (other_words, CHAT, "X-Balancer-Cache: exact")) == ["miss"]


async def test_only_takes_another_wordings_answer(guarded: Balancer) -> None:
    await fill(guarded, chat(ASKED))
    answer = await ask(guarded, chat(REWORDED), CHAT, "X-Balancer-Cache: only")
    assert (answer.status, answer.cache) == (200, "semantic")


async def test_a_model_may_be_left_out_or_be_the_only_one(node: FakeNode, other: FakeNode, serve: Serve) -> None:
    off = await serve(node, cache=semantic(other), models=[{"name": MODEL, "semantic": False}])
    on = await serve(node, cache=semantic(other, enabled=False), models=[{"name": MODEL, "semantic": True}])
    for balancer, result in ((off, "miss"), (on, "semantic")):
        await fill(balancer, chat(ASKED))
        assert (await ask(balancer, chat(REWORDED))).cache == result


async def test_shadow_measures_and_never_serves(node: FakeNode, other: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache=semantic(other, shadow=True))
    await fill(balancer, chat(ASKED), chat(REWORDED))
    assert balancer.counts("semantic_lookups") == {("far",): 1, ("shadow",): 1}
    assert balancer.counts("semantic_comparisons") == {("wrong",): 1}  # this node says something else to each prompt
    assert len(node.requests) == 2


async def test_an_answer_that_is_gone_is_a_miss_and_its_question_goes_too(guarded: Balancer) -> None:
    await fill(guarded, chat(ASKED))
    assert await guarded.app.cache.delete(tenant=None, model=None, key=None) == 1
    assert (await ask(guarded, chat(REWORDED, max_tokens=8))).cache == "miss"
    assert guarded.counts("semantic_lookups") == {("far",): 2}


async def test_an_embedder_that_is_away_is_a_miss_and_soon_not_even_asked(
    node: FakeNode, other: FakeNode, serve: Serve
) -> None:
    balancer = await serve(node, cache=semantic(other))
    other.die()
    assert await caches(balancer, *((chat(f"What is {n}?"),) for n in range(6))) == ["miss"] * 6
    assert balancer.counts("semantic_lookups") == {("unavailable",): 6}


async def test_an_embedder_that_is_too_late_is_a_miss(node: FakeNode, serve: Serve) -> None:
    async def say_nothing(node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with ScriptedNode(say_nothing) as silent:
        balancer = await serve(node, cache=semantic(node, embeddings_url=f"{silent.url}/v1", timeout_s=0.02))
        assert (await ask(balancer, chat(ASKED))).cache == "miss"
        assert balancer.counts("semantic_lookups") == {("late",): 1}


# -- verified, by nodes that are asked as well


def saying(text: str) -> bytes:
    """A node's answer to anything."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return ok(
        {"id": "a", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}
    )


async def test_verified_asks_the_node_until_its_answers_have_agreed_often_enough(other: FakeNode, serve: Serve) -> None:
    """With a bound of a half a handful of comparisons will do."""
    async with ScriptedNode(saying("Canberra")) as scripted:
        bounds = {"mode": "verified", "max_error_rate": 0.5, "observe_share": 0.0}
        balancer = await serve(scripted, cache=semantic(other, **bounds))
        found: list[str | None] = []
        for number in range(24):
            # One word more: the guards cannot say whether that makes a difference.
            asked = f"What is the usual price of a kilo of fresh apples in Province{number}?"
            about = chat(asked), chat(asked.replace("fresh", "fresh ripe"))
            await fill(balancer, about[0])
            found.append((await ask(balancer, about[1])).cache)
            await settled(balancer)
    learned = found.index("semantic")
    assert 0 < learned < 20
    assert set(found[:learned]) == {"miss"}
    assert set(found[learned:]) == {"semantic"}
    assert balancer.counts("semantic_comparisons") == {("right",): learned}


async def test_an_entry_whose_answer_was_wrong_is_not_served(other: FakeNode, serve: Serve) -> None:
    async with ScriptedNode(saying("Canberra"), saying("Sydney")) as scripted:
        balancer = await serve(scripted, cache=semantic(other, mode="verified", max_error_rate=0.99, observe_share=1.0))
        await fill(balancer, chat(ASKED), chat("What's the capital of Australia?"))
        assert balancer.counts("semantic_comparisons") == {("wrong",): 1}


# -- operators


async def admin(balancer: Balancer, method: str, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.request(method, balancer.ops_url + path) as response:
        return response.status, await response.json()


async def test_the_report_tells_what_was_found_and_a_kill_undoes_it(guarded: Balancer) -> None:
    await fill(guarded, chat(ASKED), chat(OTHER))
    assert (await ask(guarded, chat(REWORDED))).cache == "semantic"
    status, report = await admin(guarded, "GET", "/admin/cache/semantic")
    assert (status, report["enabled"], report["mode"], report["shadow"]) == (200, True, "guarded", False)
    assert report["lookups"]["served"] == 1
    assert report["hit_ratio"] == pytest.approx(1 / 3, abs=1e-4)
    assert (await ask(guarded, chat(ASKED))).cache == "hit"
    (hit,) = guarded.app.cache.top(1, requests=False)
    key_ = hit["key"]
    status, killed = await admin(guarded, "DELETE", f"/admin/cache/semantic/{key_}")
    assert (status, killed["killed"], killed["entries"], killed["answers"]) == (200, key_, 1, 1)
    assert (await admin(guarded, "DELETE", f"/admin/cache/semantic/{key_}"))[0] == 404
    assert (await admin(guarded, "DELETE", "/admin/cache/semantic/xyz"))[0] == 400
    assert (await ask(guarded, chat("Tell me the capital of Australia."))).cache == "miss"


async def test_a_cache_that_is_off_says_so(balancer: Balancer) -> None:
    assert await admin(balancer, "GET", "/admin/cache/semantic") == (200, {"enabled": False})
    assert (await admin(balancer, "DELETE", f"/admin/cache/semantic/{'0' * 64}"))[0] == 404


async def command(balancer: Balancer, *words: str) -> tuple[int | None, str]:
    ops = balancer.ops_url.removeprefix("http://")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "balancer", "cache", *words, "--ops", ops,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_the_commands_print_the_report_and_kill(node: FakeNode, other: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache=semantic(other, shadow=True))
    await fill(balancer, chat(ASKED), chat(REWORDED))
    code, said = await command(balancer, "report")
    assert code == 0
    assert "shadow: nothing is served" in said
    assert "WRONG" in said
    key_ = next(line for line in said.splitlines() if line.startswith("WRONG")).split()[3]
    code, said = await command(balancer, "kill", key_)
    assert (code, said.split(":")[0]) == (0, f"killed {key_}")
    assert (await command(balancer, "kill", key_))[0] == 1


@pytest.mark.real("vectors")
async def test_what_is_kept_in_redis_is_no_text_and_expires(
    node: FakeNode, other: FakeNode, serve: Serve, vectors: VectorServer
) -> None:
    balancer = await serve(node, cache=semantic(other), redis={"url": vectors.url, "timeout_s": 0.03})
    await fill(balancer, chat(ASKED))
    assert await caches(balancer, (chat(REWORDED),)) == ["semantic"]
    client = vectors.client()
    names = list(client.scan_iter())
    assert {name.split(b":")[2] for name in names} == {b"cache", b"sem"}
    assert all(client.ttl(name) > 0 for name in names)
    (vector_set,) = [name for name in names if b":sem:" in name]
    (element,) = client.execute_command("VRANDMEMBER", vector_set, 9)
    attributes = client.execute_command("VGETATTR", vector_set, element)
    assert b"australia" not in attributes.lower()
    assert b"capital" not in attributes.lower()


@pytest.fixture
def vectors() -> Iterator[VectorServer]:
    try:
        server = VectorServer()
    except Unavailable as error:
        pytest.skip(str(error))
    with server:
        yield server
