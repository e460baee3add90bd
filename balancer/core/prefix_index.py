"""Which nodes already hold which prompt prefix: block hash -> set of nodes, and an LRU for each node.

Blocks are chained: one stands for itself and all before it, so a node holds a prefix when it holds its last block.
Sets are bits of an integer, one lane a node: walking a prompt is one look-up and one `&` a block, and stops at the
first block that nobody holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from balancer.core.request import NodeId

# Share of a node's KV blocks believed to hold prefixes: the rest is under running requests. Believing more predicts
# hits that turn out to be evicted.
KEPT_SHARE = 0.9
# Blocks kept for a node whose capacity is not known: 400,000 tokens of KV cache in blocks of 256, as an 80 GB GPU has
# with an 8B model.
DEFAULT_KV_BLOCKS = 1600.0
# A capacity beyond this is cut: 32 million tokens of blocks of 256 are more than any engine's GPU memory holds.
MOST_KV_BLOCKS = 131072.0
# What an engine's own count says of the blocks believed to be held moves the limit: down by a share when they were
# gone, up by a share of the capacity when they were there. One miss in seven holds it where it is.
MISSED_KEEP = 0.9
FOUND_GROWTH = 1 / 64
# The oldest blocks go in batches of this share, which makes a plain dict a fast LRU.
BATCH_SHARE = 1 / 32


class _Lane:
    """One node's blocks, the longest unused first."""

    __slots__ = ("bit", "blocks", "capacity", "limit", "position")

    def __init__(self, position: int) -> None:
        self.position = position
        self.bit = 1 << position
        self.blocks: dict[int, None] = {}
        self.limit = self.capacity = _limit(DEFAULT_KV_BLOCKS)


def _limit(kv_blocks: float) -> int:
    return max(1, int(KEPT_SHARE * min(kv_blocks, MOST_KV_BLOCKS)))


class PrefixIndex:
    """What each node is believed to hold. Memory is bounded by the lanes' limits."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # block -> lanes' bits
        self._lanes: dict[NodeId, _Lane] = {}
        self._names: list[NodeId | None] = []  # by lane position
        self.bits: dict[NodeId, int] = {}  # node -> its lane's bit; for reading only

    def __repr__(self) -> str:
        return f"<PrefixIndex nodes={len(self._lanes)} blocks={len(self._holders)}>"

    def __len__(self) -> int:
        """Different blocks held anywhere."""
        return len(self._holders)

    def blocks_of(self, node: NodeId) -> int:
        """How many blocks a node is believed to hold."""
        lane = self._lanes.get(node)
        return 0 if lane is None else len(lane.blocks)

    # -- asking

    def levels(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Who holds how much of a prompt: (lanes that hold at least this, blocks), deepest last, shrinking sets."""
        found: list[tuple[int, int]] = []
        if not blocks:
            return found
        holders = self._holders.get
        lanes = holders(blocks[0], 0)
        depth = 0
        for block in blocks:
            still = holders(block, 0) & lanes
            if still != lanes:
                if depth:
                    found.append((lanes, depth))
                lanes = still
            if not lanes:
                return found
            depth += 1
        if depth and lanes:
            found.append((lanes, depth))
        return found

    def held(self, blocks: Sequence[int]) -> dict[NodeId, int]:
        """Leading blocks held, for each node that holds any."""
        found: dict[NodeId, int] = {}
        for lanes, depth in self.levels(blocks):
            for name in self._named(lanes):
                found[name] = depth
        return found

    def deepest(self, levels: Sequence[tuple[int, int]], limit: int, turn: float) -> list[NodeId]:
        """Up to `limit` nodes that hold the most.

        `turn` (0..1, drawn by the caller) says where to begin among equals, so that not always the same are named.
        """
        found: list[NodeId] = []
        taken = 0
        shift = int(turn * len(self._names))
        below = (1 << shift) - 1
        for lanes, _ in reversed(levels):
            fresh = lanes & ~taken
            taken |= lanes
            for half in (fresh & ~below, fresh & below):
                for name in self._named(half):
                    found.append(name)
                    if len(found) == limit:
                        return found
        return found

    def _named(self, lanes: int) -> Iterator[NodeId]:
        names = self._names
        while lanes:
            low = lanes & -lanes
            lanes ^= low
            name = names[low.bit_length() - 1]
            assert name is not None
            yield name

    # -- telling

    def placed(self, node: NodeId, blocks: Sequence[int], now: float) -> None:
        """A prompt with these blocks was sent to the node, by us or by another balancer.

        Its head becomes the last to be dropped: engines let go of a sequence from its end. `now` is when; order of
        calls is what counts.
        """
        if not blocks:
            return
        lane = self._lanes.get(node) or self._new_lane(node)
        own, holders, bit, limit = lane.blocks, self._holders, lane.bit, lane.limit
        if len(blocks) > limit:
            blocks = blocks[:limit]
        for block in reversed(blocks):
            if block in own:
                del own[block]
            else:
                holders[block] = holders.get(block, 0) | bit
            own[block] = None
        if len(own) > limit:
            batch = len(own) - limit + int(BATCH_SHARE * limit)
            self._drop_oldest(lane, min(batch, len(own) - len(blocks)))

    def resize(self, node: NodeId, kv_blocks: float) -> None:
        """The node's KV cache is worth this many blocks (capacity / tokens of a block)."""
        lane = self._lanes.get(node) or self._new_lane(node)
        capacity = _limit(kv_blocks)
        lane.limit = max(1, round(lane.limit * capacity / lane.capacity))  # what its engine's counts taught stays
        lane.capacity = capacity
        if len(lane.blocks) > lane.limit:
            self._drop_oldest(lane, len(lane.blocks) - lane.limit)

    def checked(self, node: NodeId, *, found: bool) -> None:
        """An engine counted what it held of a prompt that the node was believed to hold blocks of.

        Where they were gone it drops blocks sooner than its capacity says (or shares no prefixes at all): fewer are
        believed from now on, until it shows that it has them.
        """
        lane = self._lanes.get(node)
        if lane is None:
            return
        if found:
            lane.limit = min(lane.capacity, lane.limit + max(1, int(FOUND_GROWTH * lane.capacity)))
        else:
            lane.limit = max(1, int(MISSED_KEEP * lane.limit))
            if len(lane.blocks) > lane.limit:
                self._drop_oldest(lane, len(lane.blocks) - lane.limit)

    def forget(self, node: NodeId) -> None:
        """It holds nothing any more: the engine restarted, its cache was reset, or the node is gone."""
        lane = self._lanes.pop(node, None)
        if lane is not None:
            self._drop_oldest(lane, len(lane.blocks))
            self._names[lane.position] = None
            del self.bits[node]
            while self._names and self._names[-1] is None:
                self._names.pop()

    def _new_lane(self, node: NodeId) -> _Lane:
        try:
            position = self._names.index(None)
            self._names[position] = node
        except ValueError:
            position = len(self._names)
            self._names.append(node)
        lane = self._lanes[node] = _Lane(position)
        self.bits[node] = lane.bit
        return lane

    def _drop_oldest(self, lane: _Lane, count: int) -> None:
        own, holders, others = lane.blocks, self._holders, ~lane.bit
        for block in list(islice(own, count)):
            del own[block]
            left = holders[block] & others
            if left:
                holders[block] = left
            else:
                del holders[block]
