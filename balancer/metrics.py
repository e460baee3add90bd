"""Every metric, declared once. `docs/metrics.md` is tested against this file.

Counting happens on the data path, so a count is a plain addition here (0.1 µs; prometheus-client's own child takes
a lock, 0.4 µs). Exposition is prometheus-client's, through a collector.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Inference answers take from milliseconds to minutes: each step about 2 to 2.5 times the one before.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# What this program adds itself.
SHORT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class CounterChild:
    """One series of a counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self.value += amount


class Counter:
    """A counter; its name ends in `_total`."""

    __slots__ = ("_children", "help", "labels", "name")
    kind = "counter"

    def __init__(self, name: str, help_: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_
        self.labels = tuple(labels)
        self._children: dict[tuple[str, ...], CounterChild] = {}
        if not labels:
            self.of()

    def of(self, *values: str) -> CounterChild:
        """The series with these label values, in the order of `labels`; keep it where it is used often."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = CounterChild()
        return child

    def inc(self, amount: float = 1.0) -> None:
        """Add to the series without labels."""
        self._children[()].value += amount

    def children(self) -> Iterable[tuple[tuple[str, ...], CounterChild]]:
        """Every series with its label values."""
        return list(self._children.items())

    def forget(self, label: str, value: str) -> None:
        """Drop the series of something that is gone, so that labels stay bounded."""
        at = self.labels.index(label)
        self._children = {values: child for values, child in self._children.items() if values[at] != value}


class HistogramChild:
    """One series of a histogram."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram:
    """A histogram with fixed bounds."""

    __slots__ = ("_children", "bounds", "help", "labels", "name")
    kind = "histogram"

    def __init__(self, name: str, help_: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_
        self.bounds = tuple(bounds)
        self.labels = tuple(labels)
        self._children: dict[tuple[str, ...], HistogramChild] = {}
        if not labels:
            self.of()

    def of(self, *values: str) -> HistogramChild:
        """The series with these label values."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = HistogramChild(self.bounds)
        return child

    def observe(self, value: float) -> None:
        """Count one value in the series without labels."""
        self._children[()].observe(value)

    def children(self) -> Iterable[tuple[tuple[str, ...], HistogramChild]]:
        """Every series with its label values."""
        return list(self._children.items())


Reading = Callable[[], Iterable[tuple[tuple[str, ...], float]]]


class Gauge:
    """A value read when asked for: `read` gives label values and values."""

    __slots__ = ("help", "labels", "name", "read")
    kind = "gauge"

    def __init__(self, name: str, help_: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_
        self.labels = tuple(labels)
        self.read: Reading = lambda: ()


class Metrics:
    """All of them. Labels come from bounded sets: `model` is a known one or `other`."""

    def __init__(self) -> None:
        self.requests = Counter(
            "balancer_requests_total",
            "Requests answered, by status as sent and error code (also of an error event after a 200)",
            ("model", "endpoint", "status", "code"),
        )
        self.request_seconds = Histogram("balancer_request_seconds", "Whole time of a request", SECONDS, ("endpoint",))
        self.time_to_first_token = Histogram(
            "balancer_time_to_first_token_seconds", "From accept to the first content of a stream", SECONDS, ("model",)
        )
        self.inter_token = Histogram(
            "balancer_inter_token_seconds", "Mean gap between the tokens of a stream", SHORT_SECONDS, ("model",)
        )
        self.overhead = Histogram(
            "balancer_overhead_seconds",
            "Time from accept to the first attempt's request being written, without waiting in the queue",
            SHORT_SECONDS,
        )
        self.tokens = Counter("balancer_tokens_total", "Tokens as the nodes counted them", ("model", "kind"))
        self.attempts = Counter("balancer_attempts_total", "Attempts by how they ended", ("node", "outcome"))
        self.retries = Counter("balancer_retries_total", "Attempts after a failed one", ("reason",))
        self.retry_budget_exhausted = Counter(
            "balancer_retry_budget_exhausted_total", "Retries not made because the budget was spent"
        )
        self.hedges = Counter("balancer_hedges_total", "Second attempts started beside a slow first", ("won",))
        self.resumes = Counter(
            "balancer_resumes_total", "Streams that a node broke, by whether another continued them", ("outcome",)
        )
        self.poison_verdicts = Counter(
            "balancer_poison_verdicts_total", "Requests found to break the nodes they are sent to"
        )
        self.poison_refused = Counter(
            "balancer_poison_refused_total", "Requests refused because an equal one was found to break nodes"
        )
        self.node_requests_in_flight = Gauge("balancer_node_requests_in_flight", "Our requests at a node", ("node",))
        self.node_limit = Gauge("balancer_node_limit_requests", "Our requests that a node may have at once", ("node",))
        self.node_drift = Gauge(
            "balancer_node_in_flight_drift", "Our requests at a node less those its agent counts as ours", ("node",)
        )
        self.node_cost = Gauge("balancer_node_cost_seconds", "Predicted seconds of prompts queued there", ("node",))
        self.node_state = Gauge("balancer_node_state", "1 for the state that a node is in", ("node", "state"))
        self.probes = Counter(
            "balancer_probes_total", "Requests of one token that asked whether a node moves", ("outcome",)
        )
        self.breaker_state = Gauge("balancer_breaker_state", "0 closed, 1 half-open, 2 open", ("node",))
        self.report_age = Gauge("balancer_report_age_seconds", "Age of what a node's agent last said", ("node",))
        self.unmatched_reports = Counter(
            "balancer_unmatched_report_nodes_total", "Nodes in agents' reports that belong to no configured node"
        )
        self.queue_depth = Gauge("balancer_queue_depth", "Requests waiting for a slot", ("priority",))
        self.queue_seconds = Histogram("balancer_queue_seconds", "Time waited for a slot", SECONDS)
        self.shed = Counter("balancer_shed_total", "Requests refused early", ("reason",))
        self.cache_lookups = Counter("balancer_cache_lookups_total", "Requests by what the cache said", ("result",))
        self.cache_seconds = Histogram("balancer_cache_seconds", "Time of cache calls", SHORT_SECONDS, ("op",))
        self.cache_hits = Counter(
            "balancer_cache_hits_total", "Answers served from the cache, by where from", ("level",)
        )
        self.cache_entries_refused = Counter(
            "balancer_cache_entries_refused_total", "Entries of the shared store that were not taken", ("reason",)
        )
        self.cache_memory_bytes = Gauge("balancer_cache_memory_bytes", "Room that answers take in this process")
        self.cache_memory_entries = Gauge("balancer_cache_memory_entries", "Answers kept in this process")
        self.cache_memory_evictions = Counter(
            "balancer_cache_memory_evictions_total", "Answers that left this process for want of room"
        )
        self.semantic_lookups = Counter(
            "balancer_semantic_lookups_total", "Lookups of the semantic cache by how they ended", ("result",)
        )
        self.semantic_comparisons = Counter(
            "balancer_semantic_comparisons_total", "Stored answers compared with the node's own", ("verdict",)
        )
        self.store_errors = Counter("balancer_store_errors_total", "Store calls that failed or were given up", ("op",))
        self.redis_used = Gauge("balancer_redis_memory_used_bytes", "Memory that a Redis uses", ("server",))
        self.redis_peak = Gauge("balancer_redis_memory_peak_bytes", "The most it ever used", ("server",))
        self.redis_max = Gauge("balancer_redis_memory_max_bytes", "Its maxmemory; 0: no limit", ("server",))
        self.redis_policy = Gauge(
            "balancer_redis_eviction_policy", "1 for what it does when full", ("server", "policy")
        )
        self.redis_evicted = Counter("balancer_redis_evicted_keys_total", "Keys that a Redis dropped", ("server",))
        self.limits_unchecked = Counter(
            "balancer_limits_unchecked_total", "Rate limit checks made in this process because the store was away"
        )
        self.channel_messages = Counter(
            "balancer_channel_messages_total", "Messages between balancers, by what became of them", ("topic", "event")
        )
        self.peers = Gauge("balancer_peers", "Other balancers that share what they sent where")
        self.peer_age = Gauge("balancer_peer_age_seconds", "Since the longest silent of them said something")
        self.gpu_seconds_saved = Counter(
            "balancer_gpu_seconds_saved_total", "Node time not spent, by answers served from the cache"
        )
        self.calls_saved = Counter(
            "balancer_calls_saved_total", "Upstream calls not made because an equal one was in flight", ("where",)
        )
        self.event_loop_lag = Gauge("balancer_event_loop_lag_seconds", "How late the event loop ran its last timer")
        self.connections = Gauge("balancer_client_connections", "Open client connections")
        self.buffered = Gauge("balancer_buffered_bytes", "Bytes of request bodies held now")

    def all(self) -> list[Counter | Histogram | Gauge]:
        """Every metric, in the order of declaration."""
        return list(vars(self).values())

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's collector interface."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for metric in self.all():
            if isinstance(metric, Counter):
                counter = CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
                for values, child in metric.children():
                    counter.add_metric(values, child.value)
                yield counter
            elif isinstance(metric, Histogram):
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                for values, series in metric.children():
                    histogram.add_metric(values, _cumulative(metric.bounds, series.counts), series.sum)
                yield histogram
            else:
                gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
                for values, value in metric.read():
                    gauge.add_metric(values, value)
                yield gauge

    def exposition(self) -> bytes:
        """The Prometheus text of everything here and of the process."""
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        return generate_latest(registry)


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
