"""What node agents measure: polled from each agent, or pushed by it; matched to nodes and handed to the registry."""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import orjson

from balancer.ask import NoAnswer, OpenSession, ask, open_session
from balancer.clock import Clock
from balancer.core.health import HostReport, NodeReport, parse_report
from balancer.core.node import Node
from balancer.errors import BadRequest
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.schedule import Periodic
from balancer.settings import AgentsConfig

if TYPE_CHECKING:
    import aiohttp

# A host with eight GPUs and as many engines reports some 10 KiB.
MAX_BYTES = 1024 * 1024
# Sources with reports of unknown nodes that are kept for people to see, nodes of each, and characters of a name.
UNMATCHED_SOURCES = 256
UNMATCHED_NODES = 64
NAME_CHARS = 256
_NEVER = float("-inf")

log = get_logger()


@dataclass(frozen=True, slots=True)
class Matched:
    """Which configured node each part of a report speaks of, and the parts that speak of none."""

    pairs: tuple[tuple[Node, NodeReport], ...]
    unmatched: tuple[NodeReport, ...]


def match(reports: Sequence[NodeReport], own: Collection[Node], others: Collection[Node] = ()) -> Matched:
    """Find the node of each report: by id, else by URL, else, with one on both sides, that one.

    `own` are the nodes that name this agent, `others` those that name none: found by id or URL only.
    """
    pairs: dict[Node, NodeReport] = {}
    by_id: dict[str, Node] = {node.id: node for node in (*others, *own)}
    by_url = {_plain(node.config.url): node for node in (*others, *own)}
    left = _take_found(pairs, [(report, by_id.get(report.id)) for report in reports])
    left = _take_found(pairs, [(report, by_url.get(_plain(report.url))) for report in left])
    if left and len(reports) == 1 and len(own) == 1:
        pairs[next(iter(own))] = left.pop()
    return Matched(tuple(pairs.items()), tuple(left))


def _take_found(pairs: dict[Node, NodeReport], found: Iterable[tuple[NodeReport, Node | None]]) -> list[NodeReport]:
    """Add to `pairs` where a node was found that has no report yet; return the reports that are left."""
    left = []
    for report, node in found:
        if node is None or node in pairs:
            left.append(report)
        else:
            pairs[node] = report
    return left


def _plain(url: str) -> str:
    return url.rstrip("/")


class HealthFeed:
    """Takes in reports. A silent agent makes its nodes unknown, never down; a report never adds a node."""

    def __init__(
        self,
        registry: Registry,
        agents: AgentsConfig,
        clock: Clock,
        rng: Random,
        metrics: Metrics,
        session_factory: OpenSession = open_session,
    ) -> None:
        self._registry = registry
        self._stale_s = agents.stale_s
        self._timeout_s = min(1.0, agents.interval_s)
        self._clock = clock
        self._metrics = metrics
        self._session_factory = session_factory
        self._session: aiohttp.ClientSession | None = None
        self._reached_s: dict[str, float | None] = {}  # per agent in reach: when it last answered; None: lost
        self._seen: dict[Node, tuple[str, int]] = {}  # boot_id and seq of what each node was last judged by
        self._unmatched: dict[str, list[dict[str, str]]] = {}  # by source
        interval_s = agents.interval_s
        self._polls = Periodic("agent_poll", self._agents, self._poll, interval_s=interval_s, clock=clock, rng=rng)
        self._ageing = Periodic("agent_age", self._nodes, self._age, interval_s=interval_s, clock=clock, rng=rng)

    async def start(self) -> None:
        """Begin polling."""
        self._session = self._session_factory()
        self._polls.start()
        self._ageing.start()

    async def close(self) -> None:
        """Stop polling."""
        await self._polls.close()
        await self._ageing.close()
        if self._session is not None:
            await self._session.close()

    @property
    def unmatched(self) -> list[dict[str, str]]:
        """What the last reports said of nodes that are not configured: source, host, id and URL of each."""
        return [entry for entries in self._unmatched.values() for entry in entries]

    def accept_push(self, data: object) -> int:
        """Take a report that an agent sent by itself; how many nodes it spoke of. Raises BadRequest."""
        host = parse_report(data)
        return self._take(host, match(host.nodes, self._registry.nodes.values()), f"push from {host.host[:NAME_CHARS]}")

    # -- polling

    def _agents(self) -> Iterable[str]:
        urls = {_plain(node.config.agent) for node in self._registry.nodes.values() if node.config.agent}
        for gone in self._reached_s.keys() - urls:
            del self._reached_s[gone]
            self._unmatched.pop(gone, None)
        return urls

    def _poll(self, agent: str) -> Coroutine[Any, Any, None]:
        return self._ask(agent)

    async def _ask(self, agent: str) -> None:
        assert self._session is not None
        url = agent + "/v1/report"
        try:
            answer = await ask(self._session, url, timeout_s=self._timeout_s, max_bytes=MAX_BYTES)
            if not answer.is_good:
                return self._missed(agent, f"status_{answer.status}")
            host = parse_report(orjson.loads(answer.body))
        except NoAnswer as error:
            return self._missed(agent, error.reason)
        except (BadRequest, orjson.JSONDecodeError) as error:
            return self._missed(agent, f"bad_report: {error}")
        self._reached(agent, host)
        nodes = self._registry.nodes.values()
        own = [node for node in nodes if node.config.agent and _plain(node.config.agent) == agent]
        others = [node for node in nodes if not node.config.agent]
        self._take(host, match(host.nodes, own, others), agent)
        return None

    def _reached(self, agent: str, host: HostReport) -> None:
        if self._reached_s.get(agent) is None:
            log.info("agent.reached", agent=agent, host=host.host, nodes=len(host.nodes))
        self._reached_s[agent] = self._clock.now()

    def _missed(self, agent: str, reason: str) -> None:
        """One poll without a report; said when none has ever come, or when the last one has become too old."""
        reached_s = self._reached_s.get(agent, _NEVER)
        if reached_s is None or self._clock.now() - reached_s <= self._stale_s:
            return
        log.warning("agent.unreachable" if reached_s == _NEVER else "agent.lost", agent=agent, reason=reason)
        self._reached_s[agent] = None

    # -- taking in

    def _take(self, host: HostReport, matched: Matched, source: str) -> int:
        now = self._clock.now()
        for node, report in matched.pairs:
            if self._is_news(node, host):
                self._registry.observe(node, host, report, now)
        self._show(source, host, matched.unmatched)
        return len(matched.pairs)

    def _is_news(self, node: Node, host: HostReport) -> bool:
        """Note the report, unless the node was judged by it, or by a later one of the same agent's life, already."""
        boot_id, seq = self._seen.get(node, ("", 0))
        if host.boot_id and host.boot_id == boot_id and host.seq <= seq:
            return False
        self._seen[node] = (host.boot_id, host.seq)
        return True

    def _show(self, source: str, host: HostReport, unmatched: Sequence[NodeReport]) -> None:
        self._unmatched.pop(source, None)
        if not unmatched:
            return
        self._metrics.unmatched_reports.inc(len(unmatched))
        self._unmatched[source] = [
            {
                "source": source,
                "host": host.host[:NAME_CHARS],
                "id": report.id[:NAME_CHARS],
                "url": report.url[:NAME_CHARS],
            }
            for report in unmatched[:UNMATCHED_NODES]
        ]
        if len(self._unmatched) > UNMATCHED_SOURCES:
            del self._unmatched[next(iter(self._unmatched))]

    # -- growing old

    def _nodes(self) -> Iterable[Node]:
        nodes = self._registry.nodes.values()
        self._seen = {node: self._seen[node] for node in nodes if node in self._seen}
        return nodes

    def _age(self, node: Node) -> None:
        self._registry.lose_report(node, self._clock.now())
