"""What balancers with one Redis tell each other at once: answers to forget, and prompts that break nodes.

A message that is lost costs little: a copy of a flushed answer ends within `cache.memory_ttl_s`, and who has not heard
of a verdict finds it in Redis when the prompt has broken its first node.
"""

from __future__ import annotations

import math
import re
from typing import Any

import orjson

from balancer.cache import ResponseCache
from balancer.store.channel import Channel
from balancer.verdicts import Verdicts

FLUSH, VERDICT = "flush", "verdict"

_MARK = re.compile(r"[0-9a-f]{64}")


class Gossip:
    """Says and hears it; owns the channel that others use too."""

    def __init__(self, channel: Channel, cache: ResponseCache, verdicts: Verdicts) -> None:
        self._channel = channel
        self._cache = cache
        self._verdicts = verdicts
        channel.subscribe(FLUSH, self._flushed)
        channel.subscribe(VERDICT, self._condemned)
        cache.on_delete = lambda *what: self._say(FLUSH, what)
        verdicts.on_condemned = lambda *what: self._say(VERDICT, what)

    async def start(self) -> None:
        """Connect, in the background."""
        self._channel.start()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._channel.close()

    def _say(self, topic: str, what: tuple[Any, ...]) -> None:
        self._channel.publish(topic, orjson.dumps(what))

    def _flushed(self, balancer: str, payload: bytes) -> bool:
        match _parsed(payload):
            case [str() | None as tenant, str() | None as model, str() | None as key, float() | None as before_wall_s]:
                self._cache.forget_local(tenant, model, key, before_wall_s)
                return True
        return False

    def _condemned(self, balancer: str, payload: bytes) -> bool:
        match _parsed(payload):
            case [str() as mark, float() as for_s] if _MARK.fullmatch(mark) and math.isfinite(for_s) and for_s > 0:
                self._verdicts.heard(mark, for_s)
                return True
        return False


def _parsed(payload: bytes) -> object:
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
