"""Balancers that share a Redis tell each other what they have at each node, and which prompts they placed where.

A message every interval, over `store.channel`; core/sharing.py says what is in it and what is believed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from balancer.clock import Clock
from balancer.core.node import Node
from balancer.core.routing import Routing
from balancer.core.sharing import NodeKey, Peers, Said, Teller, decode, encode, node_key
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.schedule import Periodic
from balancer.store.channel import Channel

TOPIC = "routing"

log = get_logger()


class Sharing:
    """Says what changed, takes in what others say, forgets who fell silent. Idle unless the policy learns."""

    def __init__(
        self,
        channel: Channel,
        registry: Registry,
        routing: Callable[[], Routing],
        metrics: Metrics,
        *,
        interval_s: float,
        clock: Clock,
        rng: Random,
    ) -> None:
        self._channel = channel
        self._registry = registry
        self._routing = routing
        self._clock = clock
        self._teller = Teller()
        self._peers = Peers()
        self._nodes: dict[NodeKey, Node] = {}
        self._periodic = Periodic(
            "sharing", lambda: (TOPIC,), self._share, interval_s=interval_s, clock=clock, rng=rng, at_once=1
        )
        channel.subscribe(TOPIC, self._heard)
        metrics.peers.read = lambda: [((), float(len(self._peers)))]
        metrics.peer_age.read = self._ages

    def __repr__(self) -> str:
        return f"<Sharing {self._peers!r} {self._channel!r}>"

    async def start(self) -> None:
        """Begin."""
        self._periodic.start()

    async def close(self) -> None:
        """Say farewell and stop."""
        await self._periodic.close()
        if self._channel.connected:
            self._channel.publish(TOPIC, encode(Said(leaving=True)))

    def _share(self, _: str) -> None:
        """One period."""
        routing, now = self._routing(), self._clock.now()
        placed = routing.take_placements()
        if placed is None:
            return
        self._follow_fleet()
        figures = {}
        for key, node in self._nodes.items():
            if node.books.n or node.books.read_tokens:
                figures[key] = node.books.outstanding(now)
        keys = {node.id: key for key, node in self._nodes.items()} if placed else {}
        said = self._teller.next(figures, [(keys[id_], blocks) for id_, blocks in placed if id_ in keys], now)
        if said is not None and not self._channel.publish(TOPIC, encode(said)):
            self._teller = Teller()  # nobody heard it: all of it is news once somebody can
        silent = self._peers.forget_silent(now)
        for balancer in silent:
            log.warning("peer.lost", balancer=balancer)
        if silent or self._peers:
            self._believe(routing, self._nodes, now)

    def _heard(self, balancer: str, payload: bytes) -> bool:
        """One message of another balancer; False when it is none."""
        said = decode(payload)
        if said is None:
            return False
        routing, now, nodes = self._routing(), self._clock.now(), self._nodes
        if said.leaving:
            if self._peers.left(balancer):
                log.info("peer.left", balancer=balancer)
                self._believe(routing, nodes, now)
            return True
        ours = [(key, figure) for key, figure in said.figures if key in nodes]
        if self._peers.heard(balancer, ours, now):
            log.info("peer.joined", balancer=balancer)
        self._believe(routing, [key for key, _ in ours], now)
        for key, blocks in said.placed:
            if (node := nodes.get(key)) is not None:
                routing.placed(node, blocks, now)
        return True

    def _believe(self, routing: Routing, keys: Iterable[NodeKey], now: float) -> None:
        for key in keys:
            routing.others(self._nodes[key], self._peers.together(key, now), now)

    def _follow_fleet(self) -> None:
        nodes = self._registry.nodes
        if len(nodes) == len(self._nodes) and all(nodes.get(node.id) is node for node in self._nodes.values()):
            return
        self._nodes = {node_key(node.id, node.config.url): node for node in nodes.values()}
        self._peers.keep(self._nodes)

    def _ages(self) -> list[tuple[tuple[str, ...], float]]:
        ages = self._peers.silence_s(self._clock.now())
        return [((), max(ages.values()))] if ages else []
