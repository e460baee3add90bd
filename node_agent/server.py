"""The agent port: the latest report, metrics, liveness, and the drain switch."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from node_agent.metrics import exposition
from node_agent.sampler import Sampler

log = structlog.get_logger()

# The agent is of no use when it made no report for so many intervals, and at least so long: let it be restarted.
STALLED_INTERVALS = 10
STALLED_S = 30.0


class AgentServer:
    """Answers from the latest report; nothing here waits for an engine or a GPU.

    A drain needs the token where one is set; without one only callers on this machine may ask for it.
    """

    def __init__(self, sampler: Sampler, metrics: CollectorRegistry, drain_token: str | None = None) -> None:
        self._sampler, self._metrics, self._drain_token = sampler, metrics, drain_token

    def app(self) -> web.Application:
        app = web.Application(middlewares=[_json_errors], client_max_size=64 * 1024)
        app.router.add_get("/v1/report", self.report)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_post("/v1/drain", self.drain)
        app.router.add_post("/v1/undrain", self.undrain)
        return app

    async def report(self, request: web.Request) -> web.Response:
        report = self._sampler.report()
        if report is None:
            return _answer({"error": "no report yet, the first look is under way"}, 503, {"Retry-After": "1"})
        return web.Response(body=report.to_json(), content_type="application/json")

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=exposition(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(self, request: web.Request) -> web.Response:
        silence_s = self._sampler.silence_s()
        if silence_s > max(STALLED_S, STALLED_INTERVALS * self._sampler.interval_s):
            return _answer({"status": "stalled", "silence_s": round(silence_s, 1)}, 503)
        return _answer({"status": "ok"})

    async def drain(self, request: web.Request) -> web.Response:
        return await self._switch(request, drain=True)

    async def undrain(self, request: web.Request) -> web.Response:
        return await self._switch(request, drain=False)

    async def _switch(self, request: web.Request, *, drain: bool) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        await self._sampler.set_drain(drain)
        return _answer({"drain": drain})

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self._drain_token is None:
            return (
                None
                if _is_loopback(request.remote)
                else _answer({"error": "without a drain_token only local callers may drain"}, 403)
            )
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._drain_token.encode()):
            return None
        return _answer({"error": "a drain needs the drain token"}, 401, {"WWW-Authenticate": "Bearer"})


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _answer(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, headers=headers, content_type="application/json")


@web.middleware
async def _json_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error is JSON; one of our own making is logged and tells no inside."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return _answer({"error": error.reason}, error.status, headers)
    except Exception:  # the edge of the server
        log.exception("request.failed", path=request.path)
        return _answer({"error": "internal error"}, 500)
