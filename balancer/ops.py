"""The operations port: health, metrics, the admin API and pushed reports."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from balancer.admin import Admin, CacheAdmin, Handler, Prices, Reply, SemanticAdmin, json_body
from balancer.clock import Clock
from balancer.core.node import NodeConfig
from balancer.core.request import Dialect, NodeId
from balancer.errors import BalancerError, ClientError, MethodNotAllowed, NotFound, TooLarge
from balancer.explain import Ring
from balancer.gate import Gate
from balancer.health_feed import MAX_BYTES, HealthFeed
from balancer.listener import address_of, listen
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.settings import OpsConfig
from balancer.wire.refusal import error_body

if TYPE_CHECKING:
    from aiohttp import web

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Connections that the kernel holds for us.
BACKLOG = 128
# What still runs when the port closes gets this long.
CLOSE_S = 1.0
# How soon to ask again when not ready: a health check's interval.
RETRY_AFTER_S = 1

log = get_logger()


class OpsServer:
    """Listens for operators, Prometheus, Kubernetes and pushing agents; aiohttp comes in with `start`."""

    def __init__(
        self,
        address: str,
        *,
        registry: Registry,
        metrics: Metrics,
        clock: Clock,
        ring: Ring,
        feed: HealthFeed,
        cache: CacheAdmin,
        tenants: Callable[[], Mapping[str, Any]],
        settings_view: Callable[[], Mapping[str, Any]],
        reload: Callable[[], Awaitable[list[str]]],
        drain_state: Callable[[], bool],
        ops_config: OpsConfig,
        put_node: Callable[[NodeConfig], object] | None = None,
        remove_node: Callable[[NodeId], object] | None = None,
        prices: Prices = lambda nodes, now: (),
        semantic: SemanticAdmin | None = None,
    ) -> None:
        self._listen = address
        self.address = address  # host:port, once it serves as listened on
        self._socket: socket.socket | None = None
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._feed = feed
        self._drain_state = drain_state
        self._admin_gate = Gate("admin key", ops_config.admin_key_sha256)
        self._agent_gate = Gate("agent token", ops_config.agent_token_sha256)
        self._admin = Admin(
            registry=registry,
            clock=clock,
            ring=ring,
            feed=feed,
            cache=cache,
            tenants=tenants,
            settings_view=settings_view,
            reload=reload,
            put_node=put_node or registry.put,
            remove_node=remove_node or registry.remove,
            prices=prices,
            semantic=semantic,
        )
        self._runner: web.AppRunner | None = None

    def bind(self) -> None:
        """Take the address. Raises OSError with a message for people when it cannot be had."""
        self._socket = listen("ops_listen", self._listen, backlog=BACKLOG)

    async def start(self) -> None:
        """Serve what comes to the address, which is taken now if it was not before."""
        from aiohttp import web

        if self._socket is None:
            self.bind()
        assert self._socket is not None
        runner = web.AppRunner(self._application(), access_log=None, handle_signals=False, shutdown_timeout=CLOSE_S)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        self.address = address_of(self._socket)
        self._runner = runner

    async def close(self) -> None:
        """Stop listening; what runs gets CLOSE_S seconds."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # -- routing

    def _application(self) -> web.Application:
        from aiohttp import web

        @web.middleware
        async def answer(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            try:
                return await handler(request)
            except BalancerError as error:
                return _refusal(error)
            except web.HTTPException as error:
                return _refusal(_of_aiohttp(error))
            except Exception:
                log.exception("call.crashed", method=request.method, path=request.path)
                return _refusal(BalancerError("an internal error; the log says more"))

        app = web.Application(middlewares=[answer], client_max_size=MAX_BYTES)
        app.router.add_get("/healthz", _open(self._health))
        app.router.add_get("/readyz", _open(self._ready))
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_post("/agent/v1/report", _behind(self._agent_gate, self._report))
        for method, path, handler in self._admin.routes():
            if method == "GET":  # answers HEAD too
                app.router.add_get(path, _behind(self._admin_gate, handler))
            else:
                app.router.add_route(method, path, _behind(self._admin_gate, handler))
        return app

    # -- calls

    async def _health(self, request: web.Request) -> Reply:
        return Reply(data={"status": "ok"})

    async def _ready(self, request: web.Request) -> Reply:
        reason = "draining" if self._drain_state() else self._registry.ready(self._clock.now())
        if reason is None:
            return Reply(data={"status": "ready", "reason": None})
        return Reply(
            data={"status": "not_ready", "reason": reason}, status=503, headers={"Retry-After": str(RETRY_AFTER_S)}
        )

    async def _show_metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": METRICS_TYPE})

    async def _report(self, request: web.Request) -> Reply:
        return Reply(data={"matched": self._feed.accept_push(await json_body(request))})


def _behind(gate: Gate, handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def call(request: web.Request) -> web.Response:
        peer = request.transport.get_extra_info("peername") if request.transport else None
        gate.admit(request.headers, peer[0] if isinstance(peer, tuple) else None)
        return _json(await handler(request))

    return call


def _open(handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def call(request: web.Request) -> web.Response:
        return _json(await handler(request))

    return call


def _json(reply: Reply) -> web.Response:
    body = orjson.dumps(reply.data, default=str, option=orjson.OPT_NON_STR_KEYS)
    return _response(body, reply.status, reply.headers)


def _refusal(error: BalancerError) -> web.Response:
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    return _response(error_body(error, Dialect.OPENAI), error.status, headers)


def _response(body: bytes, status: int, headers: Mapping[str, str]) -> web.Response:
    from aiohttp import web

    common = {"Content-Type": "application/json", "Cache-Control": "no-store", "Server": "gpu-balancer"}
    return web.Response(body=body, status=status, headers={**common, **headers})


def _of_aiohttp(error: web.HTTPException) -> BalancerError:
    """What aiohttp refuses by itself, in our words."""
    from aiohttp import web

    if isinstance(error, web.HTTPMethodNotAllowed):
        allow = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{error.method} is not for this path", allow=allow)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return TooLarge(f"the body must not be larger than {MAX_BYTES} bytes")
    if error.status == 404:
        return NotFound("there is no such path here")
    return ClientError(error.reason, status=error.status)
