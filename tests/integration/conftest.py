"""Whole balancers on real sockets, on the event loop that they have in production."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop

from balancer import embeddings, meeting
from balancer.store.redis import RedisStore
from loadtest.fake_node import FakeNode
from tests.harness import Balancer, running
from tests.integration.raw_http import MODEL, Wire
from tests.integration.scripted_node import ScriptedNode

# One check, with all the time it needs: how slow this machine is just now says nothing about a node.
PATIENT = {"interval_s": 1000.0, "timeout_s": 1000.0}

Serve = Callable[..., Awaitable[Balancer]]


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
async def cut_wires() -> AsyncIterator[None]:
    yield
    await Wire.cut_all()


@pytest.fixture
def patient_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine does not make a Redis look slow that is there."""
    made = RedisStore.__init__

    def patient(self: RedisStore, url: str, **settings: Any) -> None:
        made(self, url, **{**settings, "timeout_s": 5.0})

    monkeypatch.setattr(RedisStore, "__init__", patient)
    monkeypatch.setattr(meeting, "STORE_S", 5.0)
    monkeypatch.setattr(embeddings, "STORE_S", 5.0)


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    """A node that takes no time."""
    async with FakeNode(instant=True) as fake:
        yield fake


@pytest.fixture
async def other() -> AsyncIterator[FakeNode]:
    """A second node."""
    async with FakeNode(instant=True, seed=1) as fake:
        yield fake


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts balancers: nodes (fake, scripted, or their settings), then settings, section by section."""
    async with AsyncExitStack() as stack:

        async def start(*nodes: FakeNode | ScriptedNode | Mapping[str, Any], **settings: Any) -> Balancer:
            settings = {"health": PATIENT, **settings}
            return await stack.enter_async_context(running(*map(node_settings, nodes), **settings))

        yield start


def node_settings(node: FakeNode | ScriptedNode | Mapping[str, Any]) -> Mapping[str, Any]:
    """A node as the settings name it; what it serves is told, so that a test need not wait until it was asked."""
    return node if isinstance(node, Mapping) else {"url": node.url, "models": [MODEL]}


@pytest.fixture
async def balancer(node: FakeNode, serve: Serve) -> Balancer:
    """A balancer with default settings in front of one node."""
    return await serve(node)
