"""What a pick of `predicted_cost` costs, and whether it keeps memory: `python -m loadtest.bench.picks --help`.

Runs the balancer's own routing in this process, on values alone. Everything but the picks is left out of the time.
"""

import argparse
import gc
import json
import time
import tracemalloc
from collections.abc import Sequence
from random import Random
from typing import Any

from balancer.core.books import Sent
from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.node import Node, NodeConfig
from balancer.core.outcome import Outcome
from balancer.core.request import Endpoint, InferenceRequest, NodeId, Tenant, TenantId, Wishes
from balancer.core.routing import PredictedRouting
from balancer.core.selection import Candidates

# Picked in one go, between which the others' answers come: about what waits at a busy node times the nodes.
BATCH = 64
# Conversations that come again and again: some are held by a node, none is new for ever.
CONVERSATIONS = 400
# Requests a second, so that what fades with time fades as it does at work.
RATE_PER_S = 500.0
CHAT = Endpoint(path="/v1/chat/completions", name="chat", streams=True, samples=True)
KIB = 1024


class Fleet:
    """Nodes, the routing in front of them, and requests to pick for."""

    def __init__(self, nodes: int, prompt_bytes: int) -> None:
        self._rng = Random(1)
        self._routing = PredictedRouting()
        breaker = BreakerPolicy()
        self._candidates = Candidates(
            nodes=tuple(
                Node(NodeConfig(url=f"http://10.0.0.1:{port}"), NodeId(f"n{port}"), Breaker(breaker, self._rng))
                for port in range(1, nodes + 1)
            ),
            panic=False,
            until_s=float("inf"),
            serving=nodes,
            blocked_until_s=None,
        )
        text = "0123456789abcde " * (prompt_bytes // 16)
        self._bodies = [
            {"model": "m", "messages": [{"role": "user", "content": f"{number} {text}"}], "max_tokens": 200}
            for number in range(CONVERSATIONS)
        ]
        self._under_way: list[tuple[Node, Sent | None, InferenceRequest]] = []
        self._now = 1000.0

    def pick(self, count: int) -> float:
        """Pick `count` times; CPU seconds of picking and booking it, without what comes before and after."""
        cpu_s = 0.0
        for _ in range(0, count, BATCH):
            requests = [self._request() for _ in range(BATCH)]
            began_s = time.thread_time()
            self._begin(requests)
            cpu_s += time.thread_time() - began_s
            self._end_oldest()
        return cpu_s

    def _request(self) -> InferenceRequest:
        parsed: dict[str, Any] = self._rng.choice(self._bodies)
        size = len(parsed["messages"][0]["content"]) + 80
        return InferenceRequest(
            id="r",
            endpoint=CHAT,
            tenant=_TENANT,
            wishes=_WISHES,
            forward=(),
            head_lines=b"",
            target=b"/v1/chat/completions",
            model="m",
            body=bytes(size),
            usage_body=None,
            parsed=parsed,
            is_exact=True,
            stream=True,
            wants_usage=True,
            accepted_s=self._now,
            deadline_s=self._now + 60.0,
            http10=False,
        )

    def _begin(self, requests: Sequence[InferenceRequest]) -> None:
        routing, candidates, now, rng, under_way = (
            self._routing,
            self._candidates,
            self._now,
            self._rng,
            self._under_way,
        )
        for request in requests:
            now += 1.0 / RATE_PER_S
            node = routing.pick(candidates, request, now, rng)
            assert node is not None
            under_way.append((node, routing.dispatched(node, request, now), request))
        self._now = now

    def _end_oldest(self) -> None:
        """Answers to all but the last batch; their first tokens came a while ago."""
        ending, self._under_way = self._under_way[:-BATCH], self._under_way[-BATCH:]
        for node, sent, request in ending:
            self._routing.first_token(node, sent, self._now)
            self._routing.ended(node, sent, request, Outcome.OK, (len(request.body) // 4, 200, None), self._now)


_TENANT = Tenant(id=TenantId("anonymous"))
_WISHES = Wishes()


def main() -> None:
    """Print `us_per_pick`, or with `--memory` `kib_grown`, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.picks", description=__doc__)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--prompt-bytes", type=int, default=0)
    parser.add_argument("--picks", type=int, default=20_000)
    parser.add_argument(
        "--memory", action="store_true", help="what picks add to memory (slow: every object is counted)"
    )
    options = parser.parse_args()
    fleet = Fleet(options.nodes, options.prompt_bytes)
    fleet.pick(5 * CONVERSATIONS)  # every node has a pace, every conversation a place
    if not options.memory:
        print(json.dumps({"us_per_pick": fleet.pick(options.picks) / options.picks * 1e6}))
        return
    tracemalloc.start()
    fleet.pick(options.picks // 5)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    fleet.pick(options.picks)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    print(json.dumps({"kib_grown": (after - before) / KIB}))


if __name__ == "__main__":
    main()
