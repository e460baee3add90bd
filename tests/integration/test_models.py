"""Which models there are, who may see them, and what becomes of a request that names one, none or a wrong one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, get
from tests.integration.scripted_node import ScriptedNode, ok

SLASHED = "org/model-7B"


@pytest.fixture
async def second() -> AsyncIterator[FakeNode]:
    async with FakeNode(instant=True, models=(SLASHED, MODEL)) as node:
        yield node


async def asking(serve: Serve, *nodes: FakeNode, **settings: Any) -> Balancer:
    """A balancer that asks its nodes for their models, once it has heard from all that are there."""
    balancer = await serve(*({"url": node.url} for node in nodes), **settings)
    await balancer.wait_for(lambda: all(n.known_models is not None for n in balancer.app.registry.nodes.values()))
    return balancer


async def listed(balancer: Balancer, path: str = "/v1/models", *lines: str) -> Answer:
    return await (await Wire.to(balancer)).ask(get(path, *lines))


def ids(answer: Answer) -> list[str]:
    assert (answer.status, answer.json["object"]) == (200, "list")
    for card in answer.json["data"]:
        assert card["object"] == "model"
        assert isinstance(card["created"], int)
        assert isinstance(card["owned_by"], str)
    return [card["id"] for card in answer.json["data"]]


def allowed(*models: str) -> dict[str, Any]:
    digest = hashlib.sha256(b"k").hexdigest()
    return {"auth": {"keys": [{"tenant": "t", "sha256": digest, "models": list(models)}]}}


# -- the list


async def test_the_list_is_the_models_of_all_nodes_each_once(node: FakeNode, second: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, second)
    assert ids(await listed(balancer)) == [SLASHED, MODEL]
    assert ids(await listed(balancer, "/v1/models?limit=1")) == [SLASHED, MODEL]
    assert node.requests == second.requests == []


async def test_one_model_is_found_by_its_name_as_it_is(node: FakeNode, second: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, second)
    for name in (MODEL, SLASHED):
        answer = await listed(balancer, f"/v1/models/{name}")
        assert (answer.status, answer.json["id"], answer.json["object"]) == (200, name, "model")
    for name in ("none", "sim-model/", "SIM-MODEL", "sim%2Dmodel"):
        answer = await listed(balancer, f"/v1/models/{name}")
        assert (answer.status, answer.code) == (404, "unknown_model")


async def test_a_key_sees_the_models_it_may_use(node: FakeNode, second: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, second, **allowed(MODEL, "absent"))
    key = "Authorization: Bearer k"
    assert ids(await listed(balancer, "/v1/models", key)) == [MODEL]
    assert (await listed(balancer, f"/v1/models/{MODEL}", key)).status == 200
    answer = await listed(balancer, f"/v1/models/{SLASHED}", key)
    assert answer.status in (403, 404)


async def test_an_alias_is_listed_while_its_model_is_there(node: FakeNode, serve: Serve) -> None:
    rules = [{"name": MODEL, "aliases": ["nice"]}, {"name": "absent", "aliases": ["ghost"]}]
    balancer = await asking(serve, node, models=rules)
    assert ids(await listed(balancer)) == ["nice", MODEL]
    assert (await listed(balancer, "/v1/models/nice")).json["id"] == "nice"


async def test_a_key_sees_the_aliases_of_the_models_it_may_use(node: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, models=[{"name": MODEL, "aliases": ["nice"]}], **allowed(MODEL))
    assert ids(await listed(balancer, "/v1/models", "Authorization: Bearer k")) == ["nice", MODEL]


# -- where a model goes


async def test_a_model_goes_to_a_node_that_serves_it(node: FakeNode, second: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, second)
    for number in range(6):
        assert (await ask(balancer, chat(str(number), model=SLASHED))).status == 200
    assert (len(node.requests), len(second.requests)) == (0, 6)


@pytest.mark.parametrize("name", ["none", "", "SIM-MODEL", "sim-model ", "*", "sim-model\0"])
async def test_a_model_that_no_node_lists_is_404_and_sent_to_none(
    balancer: Balancer, node: FakeNode, name: str
) -> None:
    answer = await ask(balancer, chat(model=name))
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (404, "unknown_model", "model")
    assert node.requests == []


async def test_while_a_nodes_list_is_unknown_a_model_may_be_there(node: FakeNode, serve: Serve) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL]}, {"url": dead_url()})
    answer = await ask(balancer, chat(model="maybe"))
    assert (answer.status, answer.code) == (503, "no_eligible_node")
    assert int(answer.header("retry-after") or 0) >= 1
    assert (await ask(balancer, chat())).status == 200
    assert len(node.requests) == 1


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_node_without_a_list_serves_any_model(node: FakeNode, serve: Serve, status: int) -> None:
    node.faults.add(Fault("status", status=status, path="/v1/models"))
    balancer = await asking(serve, node)
    answer = await ask(balancer, chat(model=MODEL))
    assert answer.status == 200
    assert ids(await listed(balancer)) == []
    answer = await ask(balancer, chat(model="whatever"))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, 404)  # the node's own word
    assert len(node.requests) == 2


async def test_made_up_names_open_no_breaker_where_nodes_have_no_list(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("status", status=404, path="/v1/models"))
    balancer = await asking(serve, node)
    for number in range(12):
        assert (await ask(balancer, chat(model=f"made-up-{number}"))).status == 404
    live = balancer.node(node.url[7:])
    assert (live.breaker.state, live.load.failure) == ("closed", 0.0)
    assert balancer.counts("attempts") == {(live.id, "unknown_model"): 12}
    assert (await ask(balancer, chat(model=MODEL))).status == 200
    node.faults.add(Fault("status", status=404))
    for number in range(5):
        assert (await ask(balancer, chat(f"{number}", model=MODEL))).status == 404
    assert live.breaker.state == "open", "it answered for this one before"


# -- aliases


REWRITTEN = [
    (
        '{"model":"nice","messages":[]}',
        '{"model":"sim-model","messages":[]}',
    ),
    (
        '{ "messages" : [ {"model":"nice","x":"\\"model\\":\\"nice\\""} ],\r\n\t"model" :\n "nice" , "x":1.0 }\n',
        '{ "messages" : [ {"model":"nice","x":"\\"model\\":\\"nice\\""} ],\r\n\t"model" :\n "sim-model" , "x":1.0 }\n',
    ),
    (
        '{"a":{"model":"nice"},"mod\\u0065l":"ni\\u0063e","é":"🙂\\ud83d\\ude42","n":18446744073709551617}',
        '{"a":{"model":"nice"},"mod\\u0065l":"sim-model","é":"🙂\\ud83d\\ude42","n":18446744073709551617}',
    ),
    (
        '{"metadata":["}",{"k":"]"}],"model":"nice"}',
        '{"metadata":["}",{"k":"]"}],"model":"sim-model"}',
    ),
]


@pytest.mark.parametrize(("sent", "reached"), REWRITTEN)
async def test_an_alias_is_replaced_and_every_other_byte_stays(serve: Serve, sent: str, reached: str) -> None:
    async with ScriptedNode(ok({"id": "x", "choices": []})) as node:
        balancer = await serve(node, models=[{"name": MODEL, "aliases": ["nice"]}])
        assert (await ask(balancer, sent.encode())).status == 200
        assert node.requests[0].body.decode() == reached


async def test_an_alias_of_a_stream_is_replaced_and_usage_asked_for(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, models=[{"name": MODEL, "aliases": ["nice"]}])
    answer = await ask(balancer, chat(model="nice", stream=True))
    assert answer.events[-1] == "[DONE]"
    assert node.requests[0].json() == chat(stream=True, stream_options={"include_usage": True})
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert balancer.requests[0]["model"] == MODEL


async def test_an_alias_in_an_upload_is_replaced(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, models=[{"name": MODEL, "aliases": ["nice"]}])
    parts = b'--B\r\nContent-Disposition: form-data; name="%b\r\n\r\n%b\r\n'
    file = parts % (b'file"; filename="a.wav"', b"nice sound")
    kind = "Content-Type: multipart/form-data; boundary=B"
    sent = parts % (b'model"', b"nice") + file + b"--B--\r\n"
    answer = await ask(balancer, sent, "/v1/audio/transcriptions", kind)
    assert answer.status == 200, answer.body
    assert node.requests[0].body == parts % (b'model"', MODEL.encode()) + file + b"--B--\r\n"


@pytest.mark.parametrize("quote", ['"', ""], ids=["quoted", "bare"])
@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("names", [(MODEL, SLASHED), (SLASHED, MODEL)])
async def test_an_upload_that_names_two_models_is_refused(
    second: FakeNode, serve: Serve, names: tuple[str, str], size: int, quote: str
) -> None:
    balancer = await serve({"url": second.url, "models": [MODEL, SLASHED]}, **allowed(MODEL))
    parts = [
        f'name="model"\r\n\r\n{names[0]}',
        f'name="file"; filename="f"\r\n\r\n{"x" * size}',
        f"name={quote}model{quote}\r\n\r\n{names[1]}",
    ]
    body = "".join(f"--B\r\nContent-Disposition: form-data; {part}\r\n" for part in parts) + "--B--\r\n"
    lines = ("Content-Type: multipart/form-data; boundary=B", "Authorization: Bearer k")
    answer = await ask(balancer, body.encode(), "/v1/audio/transcriptions", *lines)
    assert answer.status in (400, 403)
    assert second.requests == []


# -- no model


async def test_without_a_model_it_is_the_only_one_and_the_body_stays(node: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node)
    body = b'{"messages":[{"role":"user","content":"x"}] }'
    assert (await ask(balancer, body)).status == 200
    assert (await ask(balancer, body.replace(b" }", b',"model":null}'))).status == 200
    assert node.requests[0].body == body
    await balancer.wait_for(lambda: len(balancer.requests) == 2)
    assert [facts["model"] for facts in balancer.requests] == [MODEL, MODEL]


async def test_without_a_model_and_with_several_here_it_is_400(node: FakeNode, second: FakeNode, serve: Serve) -> None:
    balancer = await asking(serve, node, second)
    answer = await ask(balancer, {"messages": [{"role": "user", "content": "x"}]})
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", "model")
    assert node.requests == second.requests == []


# -- what leans on one node's memory


@pytest.mark.parametrize("field", [{"previous_response_id": "r"}, {"conversation": "c"}, {"background": True}])
async def test_a_response_that_leans_on_a_nodes_memory_needs_it_to_be_the_only_node(
    node: FakeNode, other: FakeNode, serve: Serve, field: dict[str, Any]
) -> None:
    body = {"model": MODEL, "input": "x", **field}
    answer = await ask(await serve(node, other), body, "/v1/responses")
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", next(iter(field)))
    assert node.requests == other.requests == []
    await ask(await serve(node), body, "/v1/responses")
    assert [request.json() for request in node.requests] == [body]
    unset = {"model": MODEL, "input": "x", "previous_response_id": None, "conversation": None, "background": False}
    assert (await ask(await serve(node, other), unset, "/v1/responses")).status == 200


@pytest.mark.parametrize("fault", [Fault("reset"), Fault("status", status=500), Fault("truncated")])
async def test_a_response_to_be_stored_is_not_sent_twice(
    node: FakeNode, other: FakeNode, serve: Serve, fault: Fault
) -> None:
    for one in (node, other):
        one.faults.add(fault)
    body = {"model": MODEL, "input": "x", "store": True, "temperature": 0}
    answer = await ask(await serve(node, other), body, "/v1/responses")
    assert (answer.status, answer.cache) == (502, "bypass")
    assert len(node.requests) + len(other.requests) == 1
    assert (await ask(await serve(node, other), chat(), CHAT)).status == 502
    assert len(node.requests) + len(other.requests) == 3
