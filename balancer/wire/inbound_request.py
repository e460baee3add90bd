"""One request on its connection, and the writing of its answer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from balancer.wire.framing import CHUNK_END, chunk

if TYPE_CHECKING:
    from balancer.wire.inbound import InboundConnection


class InboundRequest:
    """One framed request. `headers` has lower-case names; a repeated one is joined with a comma."""

    __slots__ = (
        "body",
        "buffered_bytes",
        "connection",
        "context",
        "flow",
        "headers",
        "is_first",
        "keep_alive",
        "left",
        "method",
        "on_left",
        "received_s",
        "responded",
        "target",
        "version",
        "work",
    )

    def __init__(self, connection: InboundConnection, received_s: float, *, is_first: bool = False) -> None:
        self.connection = connection
        self.is_first = is_first  # on its connection
        self.received_s = received_s
        self.method = b""
        self.target = b""
        self.version = "1.1"
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.buffered_bytes = 0
        self.keep_alive = True
        self.context: Any = None  # what `Service.accept_head` made of the head
        self.responded = False  # the head of an answer has been written
        self.left = False  # the client has gone
        self.on_left: Callable[[], None] | None = None
        self.flow: Flow | None = None
        self.work: Coroutine[Any, Any, None] | None = None  # what answers it in place of the task that began to

    # -- the answer; a client that has left is written to without effect

    def send(self, head: bytes, body: bytes) -> None:
        """A whole answer. `head` ends with the blank line."""
        self.responded = True
        self.connection.write(head + body if body else head)

    def begin(self, head: bytes) -> None:
        """The head of an answer whose body follows."""
        self.responded = True
        self.connection.write(head)

    def write(self, data: bytes) -> None:
        """More body, framed by a length that the head announced."""
        self.connection.write(data)

    def forget_body(self) -> None:
        """It is needed no longer: its memory is free for others."""
        self.body = b""
        self.connection.release(self)

    def end_chunks(self) -> None:
        """The end of a chunked body."""
        self.connection.write(CHUNK_END)

    def cut(self) -> None:
        """End a broken answer so that nobody takes it for a whole one."""
        self.keep_alive = False
        self.connection.abort()

    def begin_and_chunk(self, head: bytes, data: bytes) -> None:
        """The head and the first chunk in one write."""
        self.responded = True
        self.connection.write(head + chunk(data))

    def follow(self, flow: Flow) -> None:
        """From now on `flow` feeds the answer; it is told to wait where the client has not caught up."""
        self.flow = flow
        if self.connection.is_write_paused:
            flow.pause()


class Flow(Protocol):
    """Whatever feeds an answer: told to stop and go as the client reads."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
