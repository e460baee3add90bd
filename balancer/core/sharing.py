"""What balancers tell each other of routing: the message, what is worth saying now, and what is believed of it.

A balancer that knows only its own picks sends to nodes that the others have filled. So each says what it has at each
node (`Outstanding`) and which prompt prefixes it placed where. Figures are absolute, never differences: a message
that is lost costs freshness and nothing else, because each figure above zero is said again within `REFRESH_S`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from balancer.core.books import OTHERS_DECAY_S, Outstanding
from balancer.core.request import NodeId

VERSION = 1
# A figure that has not changed is said again after this long, and something is said even by who has nothing to say.
REFRESH_S = 1.0
# Later than this a figure is believed less and less, as `Books` believes less and less of what it was told.
FRESH_S = 1.5 * REFRESH_S
# Two repetitions were missed: the balancer is gone, and the nodes have dropped its requests with its connections.
FORGET_S = 3.0
# One message, at most: about 60 KiB. What does not fit of the figures is said the next time, oldest first; of the
# placements the newest are kept. 3,000 blocks every 200 ms are 250 prompts of 60 blocks (15,000 tokens) a second.
MAX_NODES = 512
MAX_PLACEMENTS = 512
MAX_BLOCKS = 3000
# What is kept of others, at most: enough for any fleet, and no way for junk to fill memory.
MAX_PEERS = 64
# The largest count: what JSON's readers hold exactly.
MOST = 2**53 - 1

# A node as messages name it; see `node_key`.
NodeKey = str
# Which node was sent a prompt, and the prompt's blocks.
Placement = tuple[NodeId, tuple[int, ...]]

_BLOCK_BYTES = 8
_KEY_CHARS = 16
_NOTHING = Outstanding()


def node_key(id_: NodeId, url: str) -> NodeKey:
    """One name for the same server everywhere. A node that was given another URL is another server."""
    return hashlib.blake2b(f"{id_}\0{url.rstrip('/')}".encode(), digest_size=_KEY_CHARS // 2).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One message: figures that changed or were due again, prefixes placed since the last one, or a farewell."""

    figures: Sequence[tuple[NodeKey, Outstanding]] = ()
    placed: Sequence[tuple[NodeKey, tuple[int, ...]]] = ()
    leaving: bool = False


def encode(said: Said) -> bytes:
    """The message as JSON; figures in whole numbers, blocks as base64 of 64-bit little-endian integers."""
    return orjson.dumps(
        {
            "v": VERSION,
            "nodes": [
                [key, round(o.tokens), round(o.context), round(o.requests), round(o.read)] for key, o in said.figures
            ],
            "placed": [[key, _packed(blocks)] for key, blocks in said.placed],
            "leaving": said.leaving,
        }
    )


def decode(payload: bytes) -> Said | None:
    """The message, or None for anything that `encode` of this version would not have written.

    Fields that are not known are ignored, so that a later version may add some.
    """
    try:
        message = orjson.loads(payload)
        if type(message) is not dict or message["v"] != VERSION or type(message["leaving"]) is not bool:
            return None
        nodes, placed = message["nodes"], message["placed"]
        if type(nodes) is not list or type(placed) is not list:
            return None
        if len(nodes) > MAX_NODES or len(placed) > MAX_PLACEMENTS:
            return None
        return Said(
            figures=[_figure(*entry) for entry in nodes],
            placed=[_placement(*entry) for entry in placed],
            leaving=message["leaving"],
        )
    except (KeyError, TypeError, ValueError, struct.error, binascii.Error):
        return None


def _figure(key: Any, tokens: Any, context: Any, requests: Any, read: Any) -> tuple[NodeKey, Outstanding]:
    for value in (tokens, context, requests, read):
        if type(value) is not int or not 0 <= value <= MOST:
            raise ValueError("not a count")
    return _key(key), Outstanding(tokens=tokens, context=context, requests=requests, read=read)


def _placement(key: Any, packed: Any) -> tuple[NodeKey, tuple[int, ...]]:
    raw = base64.b64decode(packed, validate=True)
    count = len(raw) // _BLOCK_BYTES
    if not 0 < count <= MAX_BLOCKS:
        raise ValueError("no blocks, or too many")
    return _key(key), struct.unpack(f"<{count}Q", raw)


def _key(key: Any) -> NodeKey:
    if type(key) is not str or len(key) != _KEY_CHARS:
        raise ValueError("not a node's key")
    return key


def _packed(blocks: Sequence[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(blocks)}Q", *blocks)).decode()


def _is_over(figure: Outstanding) -> bool:
    return not (figure.tokens or figure.context or figure.requests)


class Teller:
    """Decides what to say: figures that changed since they were last said, and those due again."""

    def __init__(self) -> None:
        self._told: dict[NodeKey, tuple[Outstanding, float]] = {}  # figure, when it was said
        self._said_s = -math.inf

    def __repr__(self) -> str:
        return f"<Teller nodes={len(self._told)}>"

    def next(
        self,
        figures: Mapping[NodeKey, Outstanding],
        placed: Sequence[tuple[NodeKey, tuple[int, ...]]],
        now: float,
    ) -> Said | None:
        """What to say now; None: nothing new, and something was said less than REFRESH_S ago.

        `figures` names every node that was ever sent something; one that is not named has left. `placed` is in the
        order of time.
        """
        changed = self._due(figures, now)
        fitting = _newest(placed)
        if not changed and not fitting and now - self._said_s < REFRESH_S:
            return None
        for key, figure in changed:
            if key in figures:
                self._told[key] = (figure, now)
            else:
                del self._told[key]
        self._said_s = now
        return Said(figures=changed, placed=fitting)

    def _due(self, figures: Mapping[NodeKey, Outstanding], now: float) -> list[tuple[NodeKey, Outstanding]]:
        found: list[tuple[float, NodeKey, Outstanding]] = []
        for key, figure in figures.items():
            told, told_s = self._told.get(key, (_NOTHING, -math.inf))
            if figure != told or (now - told_s >= REFRESH_S and not _is_over(figure)):
                found.append((told_s, key, figure))
        for key, (_, told_s) in self._told.items():
            if key not in figures:
                found.append((told_s, key, _NOTHING))
        if len(found) > MAX_NODES:
            found.sort(key=lambda entry: entry[0])
            del found[MAX_NODES:]
        return [(key, figure) for _, key, figure in found]


def _newest(placed: Sequence[tuple[NodeKey, tuple[int, ...]]]) -> list[tuple[NodeKey, tuple[int, ...]]]:
    """The last placements that fit into one message, in the order of time."""
    kept: list[tuple[NodeKey, tuple[int, ...]]] = []
    room = MAX_BLOCKS
    for key, blocks in reversed(placed[-MAX_PLACEMENTS:]):
        if len(blocks) > room:
            break
        room -= len(blocks)
        kept.append((key, blocks))
    kept.reverse()
    return kept


class _Peer:
    __slots__ = ("figures", "heard_s", "read")

    def __init__(self) -> None:
        self.figures: dict[NodeKey, tuple[Outstanding, float]] = {}  # of what is not over
        self.read: dict[NodeKey, float] = {}  # as it last said
        self.heard_s = -math.inf


class Peers:
    """The other balancers, and what each last said it has at each node."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}
        self._read: dict[NodeKey, float] = {}  # by all of them since each was first heard of

    def __repr__(self) -> str:
        return f"<Peers {len(self._peers)}>"

    def __len__(self) -> int:
        return len(self._peers)

    def heard(self, balancer: str, figures: Iterable[tuple[NodeKey, Outstanding]], now: float) -> bool:
        """Take one message in; True when this balancer was not known. Beyond MAX_PEERS no new one is taken."""
        peer = self._peers.get(balancer)
        is_new = peer is None
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                return False
            peer = self._peers[balancer] = _Peer()
        peer.heard_s = now
        for key, figure in figures:
            if _is_over(figure):
                peer.figures.pop(key, None)
            else:
                peer.figures[key] = (figure, now)
            more = figure.read - peer.read.get(key, figure.read)
            peer.read[key] = figure.read
            self._read[key] = self._read.get(key, 0.0) + max(0.0, more)
        return is_new

    def left(self, balancer: str) -> bool:
        """It said farewell, and has nothing anywhere any more; True when it was known."""
        return self._peers.pop(balancer, None) is not None

    def keep(self, keys: Container[NodeKey]) -> None:
        """Drop what is known of all other nodes: they are gone."""
        for kept in (self._read, *(mine for peer in self._peers.values() for mine in (peer.figures, peer.read))):
            for key in [key for key in kept if key not in keys]:
                del kept[key]

    def forget_silent(self, now: float) -> list[str]:
        """Drop who was not heard for FORGET_S, and figures that were not repeated; who went is returned."""
        silent = [name for name, peer in self._peers.items() if now - peer.heard_s > FORGET_S]
        for name in silent:
            del self._peers[name]
        for peer in self._peers.values():
            for key in [key for key, (_, at_s) in peer.figures.items() if now - at_s > FORGET_S]:
                del peer.figures[key]
        return silent

    def together(self, key: NodeKey, now: float) -> Outstanding:
        """What all of them have at a node, each figure faded by its age once it is older than FRESH_S.

        `read` only grows, whoever comes and goes.
        """
        tokens = context = requests = 0.0
        for peer in self._peers.values():
            entry = peer.figures.get(key)
            if entry is not None:
                figure, at_s = entry
                late_s = now - at_s - FRESH_S
                share = math.exp(-late_s / OTHERS_DECAY_S) if late_s > 0.0 else 1.0
                tokens += share * figure.tokens
                context += share * figure.context
                requests += share * figure.requests
        return Outstanding(tokens=tokens, context=context, requests=requests, read=self._read.get(key, 0.0))

    def silence_s(self, now: float) -> dict[str, float]:
        """For each balancer, the seconds since it last said anything."""
        return {name: now - peer.heard_s for name, peer in self._peers.items()}
