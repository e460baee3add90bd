"""A fake node that takes no time, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fake_node_client import RawClient

from loadtest.fake_node import FakeNode


@pytest.fixture(autouse=True)
async def close_clients() -> AsyncIterator[None]:
    yield
    await RawClient.close_all()


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    async with FakeNode(instant=True) as fake:
        yield fake


@pytest.fixture
async def client(node: FakeNode) -> RawClient:
    return await RawClient.to(node)
