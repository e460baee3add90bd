"""OpenAI's own client through the balancer: what it asks, it gets, in the form that it reads."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import running

pytestmark = pytest.mark.real("openai")

MODEL = "sim-model"
KEY = "gb-test-key"
# Every healthy node gives the same answer to this.
CHAT: Mapping[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 12,
    "temperature": 0,
}
# The client builds its types when they are first needed, and holds this process up meanwhile, balancer and all.
PATIENT = {"timeout_s": 10.0}
Connect = Callable[..., Awaitable[Any]]


@pytest.fixture
def openai() -> Any:
    return pytest.importorskip("openai", reason="the package openai is not installed")


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    async with FakeNode(instant=True) as fake:
        yield fake


@pytest.fixture
async def connect(openai: Any, node: FakeNode) -> AsyncIterator[Connect]:
    """Makes clients: each of a balancer of its own in front of one node, with these settings and this key."""
    async with AsyncExitStack() as stack:

        async def to(served: FakeNode = node, *, api_key: str = "none", **settings: Any) -> Any:
            node_settings = {"url": served.url, "models": [MODEL]}
            balancer = await stack.enter_async_context(running(node_settings, health=PATIENT, **settings))
            client = openai.AsyncOpenAI(base_url=f"{balancer.url}/v1", api_key=api_key, max_retries=0)
            return await stack.enter_async_context(client)

        yield to


@pytest.fixture
async def client(connect: Connect) -> Any:
    return await connect()


async def test_chat_is_answered_whole(client: Any, node: FakeNode) -> None:
    answer = await client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == node.expected_text(CHAT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer._request_id


async def test_stream_that_asks_for_usage_ends_with_it(client: Any, node: FakeNode) -> None:
    stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == node.expected_text(CHAT)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


async def test_stream_that_does_not_ask_for_usage_gets_none(client: Any, node: FakeNode) -> None:
    chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == node.expected_text(CHAT)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_completions_come_whole_and_as_a_stream(client: Any, node: FakeNode) -> None:
    ask = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 9, "temperature": 0}
    expected = node.expected_text(ask, "/v1/completions")
    whole = await client.completions.create(**ask)
    stream = await client.completions.create(**ask, stream=True)
    assert whole.choices[0].text == expected
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected


async def test_embeddings_are_vectors(client: Any, node: FakeNode) -> None:
    answer = await client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [node.spec.embedding_dimensions] * 2
    assert answer.data[0].embedding != answer.data[1].embedding
    again = await client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [item.embedding for item in again.data] == [item.embedding for item in answer.data]


async def test_responses_come_whole_and_as_events(client: Any) -> None:
    whole = await client.responses.create(model=MODEL, input="hello", temperature=0)
    events = [
        event async for event in await client.responses.create(model=MODEL, input="hello", temperature=0, stream=True)
    ]
    assert (whole.status, events[-1].type) == ("completed", "response.completed")
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == whole.output_text == events[-1].response.output_text != ""


async def test_models_are_listed_and_looked_up(client: Any, openai: Any) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        await client.models.retrieve("other")
    assert refused.value.code == "unknown_model"


async def test_unknown_model_is_not_found(client: Any, openai: Any) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(**{**CHAT, "model": "other"})
    assert (refused.value.status_code, refused.value.code, refused.value.param) == (404, "unknown_model", "model")
    assert "other" in refused.value.message
    assert refused.value.request_id


async def test_key_is_asked_for_where_keys_are_set(connect: Connect, openai: Any, node: FakeNode) -> None:
    keys = {"keys": [{"tenant": "acme", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}
    let_in = await connect(api_key=KEY, auth=keys)
    assert (await let_in.chat.completions.create(**CHAT)).choices[0].message.content
    stranger = await connect(api_key="somebody-else", auth=keys)
    with pytest.raises(openai.AuthenticationError) as refused:
        await stranger.chat.completions.create(**CHAT)
    assert refused.value.code == "unauthenticated"
    assert len(node.requests) == 1


async def test_deadline_of_the_caller_s_is_kept(client: Any, openai: Any, node: FakeNode) -> None:
    node.faults.add(Fault("hang"))
    with pytest.raises(openai.APIStatusError) as refused:
        await client.chat.completions.create(**CHAT, extra_headers={"X-Balancer-Timeout-S": "0.2"})
    assert (refused.value.status_code, refused.value.code) == (504, "deadline_exceeded")


async def test_rate_limit_is_told_with_the_time_to_wait(connect: Connect, openai: Any) -> None:
    client = await connect(limits={"requests_per_minute": 1, "burst": 1}, cache={"enabled": False})
    await client.chat.completions.create(**CHAT)
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**CHAT)
    assert refused.value.code == "rate_limited"
    assert int(refused.value.response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("kind", ["reset", "cut", "error_event"])
async def test_stream_that_breaks_off_raises_what_the_client_has_for_it(
    openai: Any, connect: Connect, kind: Any
) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.005) as paced:  # what comes in one read is no stream yet
        paced.faults.add(Fault(kind, after_events=8))
        client = await connect(paced)
        stream = await client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError) as broken:
            [chunk async for chunk in stream]
    assert not isinstance(broken.value, openai.APIConnectionError)
    assert broken.value.code in ("upstream_truncated", "upstream_bad_answer")
