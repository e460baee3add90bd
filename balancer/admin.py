"""The admin API: what each call does. `ops.py` serves it, `gate.py` says to whom."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from balancer.clock import Clock
from balancer.core.cost import Explanation
from balancer.core.node import Node, NodeConfig
from balancer.core.request import NodeId
from balancer.errors import BadRequest, ClientError, NotFound
from balancer.explain import Ring, priced
from balancer.health_feed import HealthFeed
from balancer.registry import Registry
from balancer.settings import SettingsError

if TYPE_CHECKING:
    from aiohttp import web

# A node's id goes into response headers and labels.
_ID = re.compile(r"[!-~]{1,128}")
_NODE = TypeAdapter(tuple[NodeConfig], config=ConfigDict(extra="forbid"))  # a dataclass alone takes no config
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CACHE_FILTERS = ("tenant", "model", "key")
# Answers told of at once, at most.
MOST_TOLD = 1000
# A caller whose body does not come would hold its call for ever.
BODY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call answers: data for JSON."""

    data: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


# What a nominal request would cost at nodes, by the routing in force.
Prices = Callable[[Sequence[Node], float], Sequence[Explanation]]
Handler = Callable[["web.Request"], Awaitable[Reply]]


class CacheAdmin(Protocol):
    """The part of the response cache that operators may see and change."""

    async def stats(self) -> dict[str, Any]:
        """Hit figures."""

    def top(self, count: int, *, requests: bool) -> list[dict[str, Any]]:
        """The answers hit most, in order."""

    async def delete(
        self, *, tenant: str | None, model: str | None, key: str | None, older_than_s: float | None
    ) -> int:
        """Remove what matches all that is given; how many answers went."""


class SemanticAdmin(Protocol):
    """The part of the semantic cache that operators may see and change."""

    def report(self) -> dict[str, Any]:
        """What was looked for and found, and how far it can be trusted."""

    async def kill(self, id_: str) -> dict[str, int]:
        """Remove an answer, and trust its neighbours less; what went. Raises BalancerError."""


class Admin:
    """The calls under /admin. What changes the fleet or the settings goes through the callbacks."""

    def __init__(
        self,
        *,
        registry: Registry,
        clock: Clock,
        ring: Ring,
        feed: HealthFeed,
        cache: CacheAdmin,
        tenants: Callable[[], Mapping[str, Any]],
        settings_view: Callable[[], Mapping[str, Any]],
        reload: Callable[[], Awaitable[list[str]]],
        put_node: Callable[[NodeConfig], object],
        remove_node: Callable[[NodeId], object],
        prices: Prices,
        semantic: SemanticAdmin | None = None,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._ring = ring
        self._feed = feed
        self._cache = cache
        self._tenants = tenants
        self._settings_view = settings_view
        self._reload = reload
        self._put_node = put_node
        self._remove_node = remove_node
        self._prices = prices
        self._semantic = semantic

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and what it calls."""
        return [
            ("GET", "/admin/nodes", self._nodes),
            ("GET", "/admin/nodes/{id}", self._node),
            ("PUT", "/admin/nodes/{id}", self._put),
            ("DELETE", "/admin/nodes/{id}", self._remove),
            ("POST", "/admin/nodes/{id}/drain", self._drain),
            ("POST", "/admin/nodes/{id}/undrain", self._undrain),
            ("GET", "/admin/requests/{id}", self._request),
            ("GET", "/admin/cache", self._cache_stats),
            ("GET", "/admin/cache/top", self._cache_top),
            ("DELETE", "/admin/cache", self._cache_delete),
            ("GET", "/admin/cache/semantic", self._semantic_report),
            ("DELETE", "/admin/cache/semantic/{key}", self._semantic_kill),
            ("GET", "/admin/tenants", self._show_tenants),
            ("GET", "/admin/config", self._show_config),
            ("POST", "/admin/reload", self._reload_settings),
        ]

    # -- nodes

    async def _nodes(self, request: web.Request) -> Reply:
        now = self._clock.now()
        nodes = list(self._registry.nodes.values())
        return Reply(data={"nodes": self._describe(nodes, now), "unmatched": self._feed.unmatched})

    async def _node(self, request: web.Request) -> Reply:
        return self._described(self._find(request))

    async def _put(self, request: web.Request) -> Reply:
        config = node_config(request.match_info["id"], await json_body(request))
        id_ = NodeId(request.match_info["id"])
        status = 200 if id_ in self._registry.nodes else 201
        self._put_node(config)
        return self._described(self._registry.nodes[id_], status)

    async def _remove(self, request: web.Request) -> Reply:
        node = self._find(request)
        self._remove_node(node.id)
        return Reply(data={"removed": node.id})

    async def _drain(self, request: web.Request) -> Reply:
        return self._set_drained(request, True)

    async def _undrain(self, request: web.Request) -> Reply:
        return self._set_drained(request, False)

    def _set_drained(self, request: web.Request, drained: bool) -> Reply:
        node = self._find(request)
        self._registry.drain(node.id, drained=drained)
        return self._described(node)

    def _find(self, request: web.Request) -> Node:
        node = self._registry.nodes.get(NodeId(request.match_info["id"]))
        if node is None:
            raise NotFound("there is no such node", param="id")
        return node

    def _described(self, node: Node, status: int = 200) -> Reply:
        return Reply(data=self._describe([node], self._clock.now())[0], status=status)

    def _describe(self, nodes: Sequence[Node], now: float) -> list[dict[str, Any]]:
        prices = {explanation.node: priced(explanation) for explanation in self._prices(nodes, now)}
        return [{**self._registry.describe(node, now), "prices": prices.get(node.id)} for node in nodes]

    # -- the rest

    async def _request(self, request: web.Request) -> Reply:
        call = self._ring.get(request.match_info["id"])
        if call is None:
            raise NotFound("this request is not, or no longer, remembered", param="request_id")
        return Reply(data=call.as_dict(self._registry.nodes))

    async def _cache_stats(self, request: web.Request) -> Reply:
        return Reply(data=await self._cache.stats())

    async def _cache_top(self, request: web.Request) -> Reply:
        query = _single(request, ("count", "requests"))
        count, requests = query.get("count", "20"), query.get("requests", "false")
        if not count.isdigit() or not 1 <= int(count) <= MOST_TOLD:
            raise BadRequest(f"count: must be 1 to {MOST_TOLD}", param="count")
        if requests not in ("true", "false"):
            raise BadRequest("requests: must be true or false", param="requests")
        return Reply(data={"top": self._cache.top(int(count), requests=requests == "true")})

    async def _cache_delete(self, request: web.Request) -> Reply:
        query = _single(request, (*_CACHE_FILTERS, "older_than_s"))
        tenant, model, key = (query.get(name) or None for name in _CACHE_FILTERS)
        older_than_s = _seconds(query["older_than_s"]) if query.get("older_than_s") else None
        if tenant is None and model is None and key is None and older_than_s is None:
            raise BadRequest("say what to remove: tenant, model, key or older_than_s")
        gone = await self._cache.delete(tenant=tenant, model=model, key=key, older_than_s=older_than_s)
        return Reply(data={"deleted": gone})

    async def _semantic_report(self, request: web.Request) -> Reply:
        return Reply(
            data={"enabled": False} if self._semantic is None else {"enabled": True, **self._semantic.report()}
        )

    async def _semantic_kill(self, request: web.Request) -> Reply:
        key = request.match_info["key"]
        if not _DIGEST.fullmatch(key):
            raise BadRequest("key: must be the 64 hexadecimal digits of an entry", param="key")
        if self._semantic is None:
            raise NotFound("the semantic cache is off")
        killed = await self._semantic.kill(key)
        if not any(killed.values()):
            raise NotFound("there is no such entry", param="key")
        return Reply(data={"killed": key, **killed})

    async def _show_tenants(self, request: web.Request) -> Reply:
        return Reply(data=self._tenants())

    async def _show_config(self, request: web.Request) -> Reply:
        return Reply(data=self._settings_view())

    async def _reload_settings(self, request: web.Request) -> Reply:
        try:
            return Reply(data={"reloaded": True, "needs_restart": await self._reload()})
        except SettingsError as error:
            raise BadRequest(str(error)) from error


def _single(request: web.Request, known: Sequence[str]) -> Mapping[str, str]:
    """The query's fields, each there at most once. Raises BadRequest."""
    query = request.query
    for name in query:
        if name not in known or len(query.getall(name)) > 1:
            raise BadRequest(f"{name}: is unknown or there twice", param=name)
    return query


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise BadRequest("older_than_s: must be a number of seconds", param="older_than_s")
    return seconds


async def json_body(request: web.Request) -> Any:
    """The request's JSON. Raises BadRequest, and 408 when it does not come within BODY_S."""
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
        return orjson.loads(body)
    except TimeoutError as error:
        raise ClientError("the body did not come in time", status=408, code="request_timeout") from error
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="invalid_json") from error


def node_config(id_: str, data: Any) -> NodeConfig:
    """The node that a PUT asks for. Raises BadRequest with the field's name."""
    if not _ID.fullmatch(id_):
        raise BadRequest("id: must be up to 128 visible ASCII characters", param="id")
    try:
        (config,) = _NODE.validate_python((data,))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        unknown = first["type"] == "unexpected_keyword_argument"
        reason = "there is no such field" if unknown else first["msg"].removeprefix("Value error, ")
        raise BadRequest(f"{name}: {reason}" if name else "the body must be an object", param=name or None) from error
    if config.id not in (None, id_):
        raise BadRequest("id: differs from the one in the path", param="id")
    if config.api_key_file is not None:
        raise BadRequest("api_key_file: only the settings file may name files", param="api_key_file")
    return dataclasses.replace(config, id=id_)
