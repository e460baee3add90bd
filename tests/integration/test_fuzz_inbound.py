"""Client bytes, mutated and split at will: the connection never raises, and how they are split changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.errors import BalancerError
from balancer.wire.inbound import Buffered, InboundConnection, InboundLimits
from balancer.wire.inbound_request import InboundRequest
from balancer.wire.timers import TimerWheel

SEEDS = [
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"GET /c HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
]
PIECES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b": ",
    b"Content-Length: 1\r\n",
    b"Transfer-Encoding: x\r\n",
    b"\xff",
    b"0",
]


class Service:
    """Answers everything at once and remembers what it saw."""

    revision = 0

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def accept_head(self, request: InboundRequest) -> None:
        pass

    def begin(self, request: InboundRequest) -> None:
        self.seen.append((request.method, request.target, request.body))
        request.send(b"ok", b"")

    def refuse(self, request: InboundRequest, error: BalancerError) -> bytes:
        self.seen.append((error.status, error.code))
        return b"no"


class Transport(asyncio.Transport):
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False


def read(parts: list[bytes]) -> list[tuple[Any, ...]]:
    """What the service sees of these reads."""
    loop = asyncio.new_event_loop()
    try:
        service, wheel = Service(), TimerWheel(lambda: 0.0, loop)
        connections: set[InboundConnection] = set()
        connection = InboundConnection(
            service,  # type: ignore[arg-type]
            InboundLimits(),
            wheel,
            lambda: 0.0,
            connections,
            Buffered(1 << 30),
            loop,
        )
        connection.connection_made(Transport())
        for part in parts:
            connection.data_received(part)
        connection.connection_lost(None)
        wheel.close()
        assert not connections
        return service.seen
    finally:
        loop.close()


@st.composite
def client_bytes(draw: st.DrawFn) -> bytes:
    data = b"".join(draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(PIECES)) + data[at + draw(st.integers(0, 3)) :]
    return data


@settings(max_examples=300, deadline=None, derandomize=True)
@given(client_bytes(), st.lists(st.integers(0, 200), max_size=6))
def test_any_bytes_in_any_pieces_are_read_alike_and_break_nothing(data: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    parts = [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]
    whole, split = read([data]), read(parts)
    assert [seen for seen in split if len(seen) == 3] == [seen for seen in whole if len(seen) == 3]
    assert [seen[0] for seen in split if len(seen) == 2] == [seen[0] for seen in whole if len(seen) == 2]


def test_a_request_is_refused_once_whatever_else_is_wrong_with_it() -> None:
    twice_wrong = b"POST /b HTTP/1.1\r\nTransfer-Encoding: x\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\r\n2\r\n"
    assert [seen[0] for seen in read([twice_wrong])] == [400]
