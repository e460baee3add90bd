"""Connections to each node, and the credentials that it is asked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from balancer.core.node import Node
from balancer.core.request import NodeId
from balancer.wire.outbound import NodePool


class Pools:
    """A pool for each node, made when the node is first asked."""

    def __init__(self, max_connections: int, now: Callable[[], float]) -> None:
        self._max_connections = max_connections
        self._now = now
        self._pools: dict[NodeId, tuple[str, NodePool, bytes]] = {}  # URL, connections, credentials

    def of(self, node: Node) -> tuple[NodePool, bytes]:
        """A node's connections, and the header line with its key (empty where it has none)."""
        kept = self._pools.get(node.id)
        if kept is not None and kept[0] == node.config.url:
            return kept[1], kept[2]
        if kept is not None:
            kept[1].close()
        pool = NodePool(node.config.url, max_connections=self._max_connections, now=self._now)
        credentials = _credentials(node)
        self._pools[node.id] = (node.config.url, pool, credentials)
        return pool, credentials

    def follow(self, keep: Mapping[NodeId, Node]) -> None:
        """Nodes came or went: idle connections of those that are gone are closed, credentials are read again."""
        for id_ in list(self._pools):
            if id_ not in keep:
                self._pools.pop(id_)[1].close()
            else:
                url, pool, _ = self._pools[id_]
                self._pools[id_] = (url, pool, _credentials(keep[id_]))

    def sweep(self, now: float) -> None:
        """Close connections that have been idle too long."""
        for _, pool, _ in self._pools.values():
            pool.sweep(now)

    def close(self) -> None:
        """Close what lies idle."""
        for _, pool, _ in self._pools.values():
            pool.close()


def _credentials(node: Node) -> bytes:
    key = node.config.api_key
    return b"authorization: Bearer %b\r\n" % key.encode() if key else b""
