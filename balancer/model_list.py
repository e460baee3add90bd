"""Which node serves which model, and what engine it is: asks the nodes of which that is not configured."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from random import Random
from typing import TYPE_CHECKING, Any

import orjson

from balancer.ask import NoAnswer, OpenSession, ask, open_session
from balancer.clock import Clock
from balancer.core.node import Node
from balancer.registry import Registry
from balancer.schedule import Periodic

if TYPE_CHECKING:
    import aiohttp

REFRESH_S = 10.0
# A node that gave no answer is asked again after this long.
RETRY_S = 1.0
TIMEOUT_S = 2.0
# A gateway with a thousand models answers with some 200 KiB.
MAX_BYTES = 1024 * 1024


# What engines write as the owner of their models.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "tensorrt_llm": "trtllm", "library": "ollama"}


def model_ids(body: bytes) -> frozenset[str] | None:
    """The ids in an answer to GET /v1/models; None when it is no such answer."""
    models = _models(body)
    return None if models is None else frozenset(model["id"] for model in models if isinstance(model.get("id"), str))


def engine_of(body: bytes) -> str | None:
    """The engine that an answer to GET /v1/models is from; None where its models do not say, or not the same."""
    owners = {str(model.get("owned_by")) for model in _models(body) or ()}
    return _OWNERS.get(owners.pop()) if len(owners) == 1 else None


def _models(body: bytes) -> list[dict[str, Any]] | None:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    models = data.get("data") if isinstance(data, dict) else None
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else None


class ModelLister:
    """Keeps the registry's model lists fresh. A list is asked for when a node joins and when it recovers, too."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        rng: Random,
        *,
        refresh_s: float = REFRESH_S,
        session_factory: OpenSession = open_session,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._refresh_s = refresh_s
        self._session_factory = session_factory
        self._session: aiohttp.ClientSession | None = None
        self._heard_s: dict[Node, float] = {}  # when it last answered
        self._periodic = Periodic(
            "model_list", self._nodes, self._refresh, interval_s=min(RETRY_S, refresh_s), clock=clock, rng=rng
        )

    async def start(self) -> None:
        """Begin asking."""
        self._session = self._session_factory()
        self._periodic.start()

    async def close(self) -> None:
        """Stop asking; lists stay as they are."""
        await self._periodic.close()
        if self._session is not None:
            await self._session.close()

    def _nodes(self) -> Iterable[Node]:
        nodes = [node for node in self._registry.nodes.values() if node.models is None or node.config.engine is None]
        self._heard_s = {node: self._heard_s.get(node, float("-inf")) for node in nodes}
        return nodes

    def _refresh(self, node: Node) -> Coroutine[Any, Any, None] | None:
        if node.check_up is False:
            return None  # it is asked when it is there again
        heard_s = self._heard_s[node]
        if self._clock.now() - heard_s < self._refresh_s and heard_s >= node.ramp_from_s:
            return None
        return self._ask(node)

    async def _ask(self, node: Node) -> None:
        """Learn one node's list; without an answer the last one known stays."""
        assert self._session is not None
        asked_s = self._clock.now()
        url = node.config.url.rstrip("/") + "/v1/models"
        try:
            answer = await ask(
                self._session, url, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES, api_key=node.config.api_key
            )
        except NoAnswer:
            return
        models = model_ids(answer.body) if answer.is_good else None
        if self._registry.nodes.get(node.id) is not node or (models is None and not answer.is_missing):
            return
        self._heard_s[node] = asked_s
        self._registry.engine_told(node, engine_of(answer.body) if answer.is_good else None)
        if node.models is None:
            self._registry.listed(node, models)
