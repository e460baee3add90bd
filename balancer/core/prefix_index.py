"""Which nodes already hold which prompt prefix. INTERFACE STAGE: names and signatures are final; bodies follow."""

from __future__ import annotations

from collections.abc import Sequence

from balancer.core.request import NodeId


class PrefixIndex:
    """Block hash -> nodes, an LRU per node of 0.9 x its KV blocks."""

    def placed(self, node: NodeId, blocks: Sequence[int], now: float) -> None:
        """A prompt with these blocks was sent to the node (by us or by another balancer)."""

    def held(self, blocks: Sequence[int]) -> dict[NodeId, int]:
        """Leading blocks held, per node that holds any."""
        raise NotImplementedError

    def resize(self, node: NodeId, kv_blocks: float) -> None:
        """The node's KV cache holds this many blocks (kv_tokens / block_tokens); 0.9 of it is believed."""

    def forget(self, node: NodeId) -> None:
        """The engine restarted, its cache was reset, or the node is gone."""
