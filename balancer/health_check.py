"""Active checks: asks every node that nobody else heard from lately whether it is there."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from balancer.ask import Answer, NoAnswer, OpenSession, ask, open_session
from balancer.clock import Clock
from balancer.core.health import HealthPolicy
from balancer.core.node import Node
from balancer.registry import Registry
from balancer.schedule import Periodic

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True, slots=True)
class CheckState:
    """What a node's checks have said so far. A value: each check makes the next one."""

    up: bool | None = None  # the verdict; None before the first check
    good: bool | None = None  # the last check
    in_a_row: int = 0  # how many checks said the same, the last one included

    def next(self, good: bool, policy: HealthPolicy, *, decisive: bool = True) -> CheckState:
        """The state after one more check: the first decides, then it takes `fall` bad or `rise` good in a row.

        A first check that is not decisive (nothing came in time) decides nothing alone: it takes `fall` of them.
        """
        in_a_row = self.in_a_row + 1 if good is self.good else 1
        needed = 1 if self.up is None and (good or decisive) else policy.rise if good else policy.fall
        return CheckState(good if in_a_row >= needed else self.up, good, in_a_row)

    def turned_good(self, before: CheckState) -> bool:
        """Whether a node that failed its check before is there again."""
        return self.up is True and self.good is True and before.good is False


def judge(answer: Answer) -> tuple[bool, str]:
    """Whether an answer is a good one, and why: a node without such a path answers, so it is there."""
    if answer.is_good or answer.is_missing:
        return True, ""
    return False, f"status_{answer.status}"


def needs_check(node: Node, policy: HealthPolicy, now: float) -> bool:
    """False while requests show that the node is well: 500 busy nodes need no checks."""
    trusted = node.check_up is not False and node.breaker.is_closed
    return not trusted or now - node.answered_s > policy.interval_s


class HealthChecker:
    """Checks nodes and tells the registry. A node's first check comes at once, whenever it joins."""

    def __init__(
        self,
        registry: Registry,
        policy: HealthPolicy,
        clock: Clock,
        rng: Random,
        session_factory: OpenSession = open_session,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._clock = clock
        self._session_factory = session_factory
        self._session: aiohttp.ClientSession | None = None
        self._states: dict[Node, CheckState] = {}
        self._periodic = Periodic(
            "health_check", self._nodes, self._check, interval_s=policy.interval_s, clock=clock, rng=rng
        )

    async def start(self) -> None:
        """Begin checking."""
        self._session = self._session_factory()
        self._periodic.start()

    async def close(self) -> None:
        """Stop checking; verdicts stay as they are."""
        await self._periodic.close()
        if self._session is not None:
            await self._session.close()

    def _nodes(self) -> Iterable[Node]:
        self._states = {node: self._states.get(node, CheckState()) for node in self._registry.nodes.values()}
        return self._states

    def _check(self, node: Node) -> Coroutine[Any, Any, None] | None:
        if needs_check(node, self._policy, self._clock.now()):
            return self._ask(node)
        self._note(node, True, "")
        return None

    async def _ask(self, node: Node) -> None:
        assert self._session is not None
        url = node.config.url.rstrip("/") + self._policy.path
        try:
            answer = await ask(self._session, url, timeout_s=self._policy.timeout_s, api_key=node.config.api_key)
            good, reason = judge(answer)
        except NoAnswer as error:
            good, reason = False, error.reason
        self._note(node, good, reason, decisive=reason != "timeout")

    def _note(self, node: Node, good: bool, reason: str, *, decisive: bool = True) -> None:
        if self._registry.nodes.get(node.id) is not node:
            return  # it left while it was asked
        before = self._states.get(node, CheckState())
        state = self._states[node] = before.next(good, self._policy, decisive=decisive)
        self._registry.checked(node, state.up, reason, self._clock.now())
        if state.turned_good(before) and node.breaker.nudge():
            self._registry.touch()
