"""What makes a measurement say less than it seems to: the load was the limit, others were at work, hits were none."""

from collections.abc import Mapping
from typing import Any

from loadtest.bench.rows import EVENTS_PER_S, Traffic

LIMIT_RATIO = 0.95  # a core busier than this has nothing left to give
KEPT_UP_RATIO = 0.97  # of what was offered; random arrivals alone vary by a percent or two
HITS_RATIO = 0.99
# Seconds ready to run while something else ran, per second of own CPU. Seen on a quiet machine: up to 0.06 for a proxy
# alone on its core, up to 0.35 for load and backend, which wait for each other.
PROXY_WAIT_RATIO = 0.10
LOAD_WAIT_RATIO = 0.60
TAKEN_RATIO = 0.10  # of a core, by /proc/stat, which is no finer


def limits(traffic: Traffic, told: Mapping[str, Any], per_s: float) -> tuple[str, ...]:
    """What the bench itself could not do, or the proxy could not; sentences for the report."""
    found = []
    proxy_ratio, load_ratio = told["proxy_cpu_s"] / told["wall_s"], told["load_side_cpu_s"] / told["wall_s"]
    if traffic.mode == "closed" and load_ratio >= LIMIT_RATIO:
        found.append(
            f"load and backend were the limit: {load_ratio:.0%} of their core (proxy {proxy_ratio:.0%} of its)"
        )
    offered = _offered_per_s(traffic)
    if offered and per_s < KEPT_UP_RATIO * offered:
        found.append(f"could not keep up: {per_s:,.0f}/s of {offered:,.0f}/s (proxy's core {proxy_ratio:.0%} busy)")
    if told["reconnects"]:
        found.append(f"{told['reconnects']:,} connections were closed between requests and opened again")
    return tuple(found)


def by_others(traffic: Traffic, told: Mapping[str, Any]) -> tuple[str, ...]:
    """What other work on the two cores did to the measurement; sentences for the report, empty on a quiet machine."""
    found = []
    waited = _ratio(told["proxy_wait_s"], told["proxy_cpu_s"])
    if waited > PROXY_WAIT_RATIO:
        found.append(f"the proxy waited {waited:.2f} s for its core per second of CPU")
    if traffic.mode == "closed":  # keeps its core busy, so that /proc/stat can be believed; timers fire in step with it
        taken = told["core_busy"][1] - told["load_side_cpu_s"] / told["wall_s"]
        if taken > TAKEN_RATIO:
            found.append(f"{taken:.0%} of the load's core went elsewhere")
    elif (waited := _ratio(told["load_side_wait_s"], told["load_side_cpu_s"])) > LOAD_WAIT_RATIO:
        found.append(f"load and backend waited {waited:.2f} s for their core per second of CPU")
    if (steal := max(told["core_steal"])) > TAKEN_RATIO:
        found.append(f"the hypervisor took {steal:.0%} of a core")
    return tuple(found)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def not_hits(told: Mapping[str, Any], from_redis: int | None) -> str | None:
    """Why this was no measurement of cache hits, or None. `from_redis` counts the warm-up too."""
    wanted = HITS_RATIO * told["requests"]
    if told["cache_hits"] < wanted:
        return f"{told['cache_hits']:,} of {told['requests']:,} answers said X-Balancer-Cache: hit"
    if from_redis is not None and from_redis < wanted:
        return f"Redis served {from_redis:,} of {told['requests']:,} hits: they came from memory"
    return None


def _offered_per_s(traffic: Traffic) -> float | None:
    if traffic.mode == "open":
        return traffic.rate
    return traffic.connections * EVENTS_PER_S if traffic.mode == "stream" else None
