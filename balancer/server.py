"""The data port: which path is what, and the one place where errors become answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from balancer.clock import Clock
from balancer.core.request import Dialect, Endpoint
from balancer.errors import BalancerError, Draining, MethodNotAllowed, NotFound
from balancer.explain import Call
from balancer.intake import Head, Intake, given_id
from balancer.listener import address_of, listen
from balancer.log import get_logger
from balancer.proxy import Journal, Proxy
from balancer.registry import Registry
from balancer.wire.buffered import Buffered
from balancer.wire.framing import SAFE_VALUE, DateHeader, status_line
from balancer.wire.inbound import InboundConnection, InboundLimits
from balancer.wire.inbound_request import InboundRequest
from balancer.wire.refusal import error_body, retry_after
from balancer.wire.timers import TimerWheel

log = get_logger()

_OPENAI: dict[str, Any] = {"dialect": Dialect.OPENAI, "streams": True, "samples": True}
_ENDPOINTS = (
    Endpoint(path="/v1/chat/completions", name="chat", **_OPENAI),
    Endpoint(path="/v1/completions", name="completions", **_OPENAI),
    Endpoint(path="/v1/embeddings", name="embeddings"),
    Endpoint(path="/v1/responses", name="responses", dialect=Dialect.RESPONSES, streams=True, samples=True),
    Endpoint(path="/v1/messages", name="messages", dialect=Dialect.ANTHROPIC, streams=True, samples=True),
    Endpoint(path="/v1/rerank", name="rerank", object_only=False),
    Endpoint(path="/rerank", name="rerank", object_only=False),
    Endpoint(path="/v1/score", name="score", object_only=False),
    Endpoint(path="/score", name="score", object_only=False),
    Endpoint(path="/pooling", name="pooling", object_only=False),
    Endpoint(path="/classify", name="classify", object_only=False),
    Endpoint(path="/tokenize", name="tokenize", engine=False, object_only=False),
    Endpoint(path="/detokenize", name="detokenize", engine=False, object_only=False),
    Endpoint(path="/generate", name="generate", dialect=Dialect.TGI, streams=True, samples=True, object_only=False),
    Endpoint(path="/generate_stream", name="generate_stream", dialect=Dialect.TGI, always_streams=True, samples=True),
    Endpoint(path="/v1/audio/transcriptions", name="transcriptions", multipart=True, binary=True, streams=True),
    Endpoint(path="/v1/audio/translations", name="translations", multipart=True, binary=True, streams=True),
    Endpoint(path="/v1/audio/speech", name="speech", binary=True, cacheable=False),
    Endpoint(path="/v1/images/generations", name="images", samples=True),
)
ENDPOINTS = {endpoint.path.encode(): endpoint for endpoint in _ENDPOINTS}
# Connections that the kernel holds for us while the loop is busy.
BACKLOG = 4096
# Larger bodies are understood in a thread.
LARGE_BODY_BYTES = 1024 * 1024
# The status in logs and metrics of a request whose client left before anything was sent (nginx's number for it).
CLIENT_LEFT = 499
# Answered here, by GET and HEAD.
_MODELS = Endpoint(path="/v1/models", name="models", cacheable=False)
_HEALTH = Endpoint(path="/healthz", name="healthz", cacheable=False)
_MODELS_PREFIX = b"/v1/models/"


class DataPort:
    """Accepts client connections and turns requests into answers. `wire.inbound.Service` is its other face."""

    def __init__(
        self,
        *,
        address: str,
        intake: Intake,
        proxy: Proxy,
        journal: Journal,
        registry: Registry,
        limits: InboundLimits,
        buffered: Buffered,
        wheel: TimerWheel,
        clock: Clock,
        date: DateHeader,
        origins: frozenset[bytes],
    ) -> None:
        self._listen = address
        self._intake = intake
        self._proxy = proxy
        self._journal = journal
        self._registry = registry
        self._limits = limits
        self._wheel = wheel
        self._clock = clock
        self._date = date
        self._origins = origins
        self._id_prefix = secrets.token_hex(10)  # of ids for requests that bring none: unique, not secret
        self._id_count = 0
        self.revision = 0  # of what heads are judged by; a reload changes it
        self._socket: socket.socket | None = None
        self.address = address  # host:port, once it serves as listened on
        self._server: asyncio.Server | None = None
        self._accepting: set[asyncio.Task[Any]] = set()
        self._connections: set[InboundConnection] = set()
        self.buffered = buffered
        self.draining = False  # health says 503, requests are served
        self.closing = False  # the listener is closed, new requests get 503

    # -- the listener

    def bind(self) -> None:
        """Take the address. Raises OSError with a message for people when it cannot be had."""
        self._socket = listen("listen", self._listen, backlog=BACKLOG)

    async def start(self) -> None:
        """Serve what comes to the address."""
        loop = asyncio.get_running_loop()
        assert self._socket is not None  # bind() comes first
        self._server = await loop.create_server(self._connection(loop), sock=self._socket, backlog=BACKLOG)
        self.address = address_of(self._server.sockets[0])

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._connections)

    def begin_drain(self) -> None:
        """Health says 503 from now on, and every answer is its connection's last."""
        self.draining = True
        for request in self.working():
            request.connection.close_after(request)

    def close_listener(self) -> None:
        """Take no more connections; those that are kept alive are told 503 `draining`."""
        self.closing = True
        if self._server is not None:
            self._accept_rest()
            self._server.close()

    def _accept_rest(self) -> None:
        """Take what the kernel has accepted for us: closing the listener would reset it."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # there is no more
            while True:
                accepted, _ = self._socket.accept()
                task = loop.create_task(loop.connect_accepted_socket(self._connection(loop), accepted))
                self._accepting.add(task)
                task.add_done_callback(self._accepting.discard)

    def close_connections(self) -> None:
        """Close what is left."""
        for connection in list(self._connections):
            connection.close()

    def working(self) -> list[InboundRequest]:
        """Requests being answered."""
        return [connection.working for connection in self._connections if connection.working is not None]

    def cut_all(self) -> list[asyncio.Task[None]]:
        """End what is still being answered with its error, now; the tasks that write it."""
        return [task for connection in self._connections if (task := connection.cut_work()) is not None]

    def _connection(self, loop: asyncio.AbstractEventLoop) -> Callable[[], InboundConnection]:
        return lambda: InboundConnection(
            self, self._limits, self._wheel, self._clock.now, self._connections, self.buffered, loop
        )

    # -- wire.inbound.Service

    def accept_head(self, request: InboundRequest) -> None:
        """Judge a request by its head: path, method, key, headers. Raises BalancerError."""
        path, _, _ = request.target.partition(b"?")
        endpoint = ENDPOINTS.get(path)
        allow = "POST"
        if endpoint is None:
            allow = "GET, HEAD"
            if path == b"/v1/models" or (path.startswith(_MODELS_PREFIX) and len(path) > len(_MODELS_PREFIX)):
                endpoint = _MODELS
            elif path == b"/healthz":
                endpoint = _HEALTH
            else:
                raise NotFound("there is no such path here")
        id_ = given_id(request.headers)
        if request.method == b"OPTIONS" and self._origins and request.headers.get(b"origin") in self._origins:
            request.context = _Preflight(allow)
            return
        if request.method.decode() not in allow.split(", "):
            raise MethodNotAllowed(f"{request.method.decode()} is not for this path", allow=allow)
        if endpoint is _HEALTH:
            request.context = _Local(endpoint)
            return
        self._refuse_when_closing(request)
        head = self._intake.head(endpoint, request, id_)
        head.cors = self._cors(request)
        request.context = head

    def begin(self, request: InboundRequest) -> Coroutine[Any, Any, None] | None:
        """Answer a whole request at once where that can be done (None), else return the work for a task."""
        head = request.context
        if self.draining:
            request.connection.close_after(request)
        if not isinstance(head, Head) or head.endpoint is _MODELS:
            self._serve_local(request)
            return None
        call = Call(head.given_id or self._next_id(), head.endpoint.name, request.received_s)
        call.tenant = head.tenant.id
        try:
            self._refuse_when_closing(request)
            if len(request.body) > LARGE_BODY_BYTES:
                return self.finish(request, call, self._serve_large(request, call))
            inference = self._intake.understand(request, call.id)
            call.model, call.stream = inference.model, inference.stream
            work = self._proxy.begin(inference, request, call)
        except BalancerError as error:
            call.failed(error)
            request.send(self._error(request, error, call.id), b"")
        except Exception:  # noqa: BLE001 - an edge; logged with its traceback
            self._crashed(request, call)
        else:
            if work is not None:
                return self.finish(request, call, work)
        self._journal.close(call)
        return None

    def _refuse_when_closing(self, request: InboundRequest) -> None:
        """A connection's first request came before the listener closed, if only just; later ones did not."""
        if self.closing and not request.is_first:
            raise Draining("this balancer is shutting down", retry_after_s=1.0)

    async def _serve_large(self, request: InboundRequest, call: Call) -> None:
        """Parse and hash a large body in a thread, so that small requests need not wait for it."""
        loop = asyncio.get_running_loop()
        inference = await loop.run_in_executor(None, self._intake.understand, request, call.id)
        call.model, call.stream = inference.model, inference.stream
        plan = await loop.run_in_executor(None, self._proxy.plan, inference)
        await self._proxy.serve(inference, plan, request, call)

    async def finish(self, request: InboundRequest, call: Call, work: Coroutine[Any, Any, None]) -> None:
        """Carry a request to its end; never raises, but for a cancellation that is not ours.

        Where other work has taken the request over meanwhile, its end is that one's business.
        """
        try:
            await work
        except BalancerError as error:
            call.failed(error)
            request.send(self._error(request, error, call.id), b"")
        except asyncio.CancelledError:
            if request.left:
                call.status = call.status or CLIENT_LEFT
                call.code = "client_left"
            elif not self.closing:
                raise
        except Exception:  # noqa: BLE001 - an edge; logged with its traceback
            self._crashed(request, call)
        finally:
            if request.work is None or request.work is work:
                self._journal.close(call)
                request.connection.finished(request)

    def _next_id(self) -> str:
        self._id_count += 1
        return f"{self._id_prefix}{self._id_count:012x}"

    def _serve_local(self, request: InboundRequest) -> None:
        """Health, models, preflights."""
        id_ = _echoed(request) or self._next_id()
        try:
            request.send(*self._local(request, id_))
        except BalancerError as error:
            request.send(self._error(request, error, id_), b"")

    def refuse(self, request: InboundRequest, error: BalancerError) -> bytes:
        """The whole answer to a request that ends before `serve`; it is counted here."""
        call = Call(_echoed(request) or self._next_id(), "other", request.received_s)
        call.failed(error)
        self._journal.close(call)
        return self._error(request, error, call.id)

    # -- inside

    def _local(self, request: InboundRequest, id_: str) -> tuple[bytes, bytes]:
        """What is answered here: health, the merged model list, preflights."""
        context = request.context
        if isinstance(context, _Preflight):
            return self._preflight(request, context), b""
        status, body = 200, b'{"status":"ok"}'
        if context.endpoint is _HEALTH:
            if self.draining or self.closing:
                status, body = 503, b'{"status":"draining"}'
        else:
            body = orjson.dumps(self._models(request.target.partition(b"?")[0], context))
        head = self._head(request, status, b"", body, id_)
        return head, b"" if request.method == b"HEAD" else body

    def _error(self, request: InboundRequest, error: BalancerError, id_: str) -> bytes:
        endpoint = ENDPOINTS.get(request.target.partition(b"?")[0])
        dialect = endpoint.dialect if endpoint is not None else Dialect.PLAIN
        body = error_body(error, dialect)
        lines = retry_after(error)
        if isinstance(error, MethodNotAllowed):
            lines += b"allow: %b\r\n" % error.allow.encode()
        if error.status == 401:
            lines += b"www-authenticate: Bearer\r\n"
        return self._head(request, error.status, lines, body, id_) + (b"" if request.method == b"HEAD" else body)

    def _models(self, path: bytes, head: Head) -> dict[str, Any]:
        permitted = head.tenant.models
        served = {name: name for name in self._registry.models()}
        for rule in self._intake.rules.values():
            if rule.name in served:
                served.update(dict.fromkeys(rule.aliases, rule.name))
        created = int(self._clock.wall())
        cards = [
            {"id": name, "object": "model", "created": created, "owned_by": "gpu-balancer"}
            for name in sorted(served)
            if permitted is None or served[name] in permitted
        ]
        if path == b"/v1/models":
            return {"object": "list", "data": cards}
        wanted = path[len(_MODELS_PREFIX) :].decode("utf-8", "replace")
        for card in cards:
            if card["id"] == wanted:
                return card
        raise NotFound(f"no node serves the model {wanted}", code="unknown_model", param="model")

    def _head(self, request: InboundRequest, status: int, lines: bytes, body: bytes, id_: str) -> bytes:
        keep = b"" if request.keep_alive else b"connection: close\r\n"
        return b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b%b\r\n" % (
            status_line(status),
            self._date.line(self._clock.wall()),
            len(body),
            id_.encode(),
            lines,
            self._cors(request),
            keep,
        )

    def _cors(self, request: InboundRequest) -> bytes:
        origin = request.headers.get(b"origin") if self._origins else None
        if origin is None or origin not in self._origins:
            return b""
        return b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origin

    def _preflight(self, request: InboundRequest, context: _Preflight) -> bytes:
        return (
            b"%baccess-control-allow-methods: %b\r\naccess-control-allow-headers: %b\r\n%bcontent-length: 0\r\n\r\n"
            % (
                status_line(204),
                context.allow.encode(),
                request.headers.get(b"access-control-request-headers", b"authorization, content-type"),
                self._cors(request),
            )
        )

    def _crashed(self, request: InboundRequest, call: Call) -> None:
        log.exception("request.crashed", request_id=call.id)
        error = BalancerError("an internal error; the log has the request's id")
        call.failed(error)
        if request.responded:
            request.cut()
        else:
            request.send(self._error(request, error, call.id), b"")


class _Local:
    """A request that is answered here and needs no key."""

    __slots__ = ("endpoint",)

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint


class _Preflight:
    """A CORS preflight from an allowed origin."""

    __slots__ = ("allow",)

    def __init__(self, allow: str) -> None:
        self.allow = allow


def _echoed(request: InboundRequest) -> str | None:
    """The client's request id, where it can be echoed."""
    given = request.headers.get(b"x-request-id", b"")
    return given.decode("ascii") if SAFE_VALUE.fullmatch(given) else None
