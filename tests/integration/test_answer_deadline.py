"""A deadline that is moved on moves nothing else: the phase an answer is in keeps its own limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from balancer.wire.answer import Answer, AnswerLimits
from balancer.wire.buffered import Buffered
from balancer.wire.timers import TimerWheel
from tests.fakes import ManualClock


class Node:
    """The connection underneath."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def drop(self) -> None: ...


@pytest.fixture
async def wheel() -> Iterator[TimerWheel]:
    wheel = TimerWheel(ManualClock().now, asyncio.get_running_loop())
    yield wheel
    wheel.close()


@pytest.mark.parametrize(
    ("streaming", "unary_s", "extended_s", "due_s"),
    [(True, None, 3600.0, 60.0), (False, None, 3600.0, 3600.0), (False, 30.0, 3600.0, 30.0), (True, None, 20.0, 20.0)],
)
async def test_a_longer_deadline(
    wheel: TimerWheel, streaming: bool, unary_s: float | None, extended_s: float, due_s: float
) -> None:
    clock = ManualClock()
    limits = AnswerLimits(
        first_byte_s=60.0, idle_s=30.0, unary_s=unary_s, commit_s=2.0, check_bytes=1000, buffered=Buffered(1 << 20)
    )
    now = clock.now()
    answer = Answer(
        clock, wheel, limits, None, streaming=streaming, object_only=True, json_only=True, deadline_s=now + 5.0
    )
    answer.begin(Node(), now)
    assert answer.due_s == now + 5.0
    answer.extend(now + extended_s)
    assert answer.due_s == now + due_s
