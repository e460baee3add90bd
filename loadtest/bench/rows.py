"""What is measured, and what must hold: one row per question, one cell per proxy or setting compared in it."""

from dataclasses import dataclass
from typing import Literal

# `pick` and `pick-memory` ask the routing alone, in a process of its own: there is no proxy and no load.
Mode = Literal["closed", "open", "stream", "idle", "startup", "pick", "pick-memory"]
EVENTS_PER_S = 20.0  # of one stream: 50 ms between tokens, a busy 7B to 70B model
KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What one measurement asks of a proxy."""

    nodes: int = 2
    keys: bool = False  # an API key with request and token limits
    redis: bool = False  # answers are kept in Redis, and not in memory
    patient: bool = False  # streams may be silent for minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The load of one cell. `rate` is requests/s when open, streams begun per second otherwise."""

    mode: Mode = "closed"
    connections: int = 64
    body_bytes: int = KIB
    rate: float = 1000.0
    repeated_bodies: int = 0  # 0: every body is new and misses the cache
    openai_head: bool = False  # the fifteen header fields of the openai client instead of six
    spaced: bool = False  # `", "` and `": "` in the body, as Python's json.dumps writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One proxy under one load."""

    label: str
    proxy: Literal["direct", "nginx", "balancer", "routing"]
    traffic: Traffic = Traffic()
    setup: Setup = Setup()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`figure` of the cell `of`, divided by that of `over` if there is one, should be at most `at_most`.

    `at_most` None compares without judging; `moonshot` is told beside the verdict.
    """

    figure: str
    of: str
    over: str | None = "nginx"
    at_most: float | None = None
    moonshot: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Cells measured in turn, so that what disturbs one disturbs its neighbour too."""

    name: str
    title: str
    figures: tuple[str, ...]  # names in FIGURES
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...] = ()
    above: str | None = None  # figures are told as what they add to this cell's
    rounds_at_least: int = 1
    rounds_at_most: int | None = None


# Unit and decimals of every figure a measurement may give.
FIGURES = {
    "cpu_us_per_request": ("µs CPU/request", 1),
    "cpu_us_per_event": ("µs CPU/event", 2),
    "p50_us": ("µs p50", 0),
    "p99_us": ("µs p99", 0),
    "kib_per_stream": ("KiB/stream", 2),
    "startup_s": ("s to first answer", 3),
    "us_per_pick": ("µs CPU/pick", 1),
    "kib_grown": ("KiB kept of 100,000 picks", 0),
}


def _beside_nginx(traffic: Traffic, setup: Setup = Setup(), nginx_traffic: Traffic | None = None) -> tuple[Cell, ...]:
    return (
        Cell(label="nginx", proxy="nginx", traffic=nginx_traffic or traffic, setup=Setup(patient=setup.patient)),
        Cell(label="balancer", proxy="balancer", traffic=traffic, setup=setup),
    )


def _per_request(
    name: str, title: str, cells: tuple[Cell, ...], at_most: float | None = None, moonshot: float | None = None
) -> Row:
    target = Target(figure="cpu_us_per_request", of="balancer", at_most=at_most, moonshot=moonshot)
    return Row(name=name, title=title, figures=("cpu_us_per_request",), cells=cells, targets=(target,))


def _unary() -> list[Row]:
    rows = []
    for kib, at_most, moonshot in ((1, 3.0, 2.0), (32, 4.0, None)):
        for connections in (64, 256):
            cells = _beside_nginx(Traffic(connections=connections, body_bytes=kib * KIB))
            title = f"unary, {kib} KB bodies, {connections} connections"
            rows.append(_per_request(f"unary-{kib}k-{connections}", title, cells, at_most, moonshot))
    openai, spaced = Traffic(openai_head=True), Traffic(spaced=True)
    keyed, large = Setup(keys=True), Traffic(body_bytes=32 * KIB)
    return [
        *rows,
        _per_request("unary-openai", "unary, 1 KB, the openai client's header fields", _beside_nginx(openai)),
        _per_request("unary-spaced", "unary, 1 KB, bodies with json.dumps' spaces", _beside_nginx(spaced), 3.0),
        _per_request("keys-1k", "unary, 1 KB, with keys and limits", _beside_nginx(Traffic(), keyed), 3.5),
        _per_request("keys-32k", "unary, 32 KB, with keys and limits", _beside_nginx(large, keyed)),
    ]


def _streams(idle_streams: int) -> list[Row]:
    busy = Traffic(mode="stream", connections=1000, rate=1000)
    idle = Traffic(mode="idle", connections=idle_streams, rate=1000)
    event = Target(figure="cpu_us_per_event", of="balancer", at_most=1.25)
    memory = Target(figure="kib_per_stream", of="balancer", over=None, at_most=16.0)
    return [
        Row(
            name="sse",
            title="1,000 streams, 20,000 events/s together",
            figures=("cpu_us_per_event",),
            cells=_beside_nginx(busy),
            targets=(event,),
        ),
        Row(
            name="idle",
            title=f"{idle_streams:,} streams, silent after their first event",
            figures=("kib_per_stream",),
            cells=_beside_nginx(idle, Setup(patient=True)),
            targets=(memory,),
        ),
    ]


def _latency(rate: int) -> Row:
    traffic = Traffic(mode="open", rate=rate)
    return Row(
        name=f"latency-{rate}",
        title=f"added latency at {rate:,} requests/s (open loop, 1 KB)",
        figures=("p50_us", "p99_us"),
        cells=(Cell(label="direct", proxy="direct", traffic=traffic), *_beside_nginx(traffic)),
        targets=(Target(figure="p50_us", of="balancer"), Target(figure="p99_us", of="balancer")),
        above="direct",
    )


def _cache() -> list[Row]:
    hits = Traffic(repeated_bodies=100)
    return [
        _per_request("cache-memory", "hits from memory, 1 KB", _beside_nginx(hits, Setup(), Traffic()), 2.0),
        _per_request("cache-redis", "hits from Redis, 1 KB", _beside_nginx(hits, Setup(redis=True), Traffic()), 8.0),
    ]


def _nodes() -> Row:
    counts = (2, 16, 50, 500)
    figure = "cpu_us_per_request"
    fleets = [Cell(label=f"{count} nodes", proxy="balancer", setup=Setup(nodes=count)) for count in counts]
    return Row(
        name="nodes",
        title="unary, 1 KB, by number of nodes (nginx: 2)",
        figures=(figure,),
        cells=(Cell(label="nginx", proxy="nginx"), *fleets),
        targets=(
            *(Target(figure=figure, of=cell.label) for cell in fleets),
            Target(figure=figure, of="500 nodes", over="16 nodes", at_most=1.3),
        ),
    )


def _picks() -> list[Row]:
    """`predicted_cost` alone: the pick and its booking, with the prompt's hashes where it is long enough for any."""

    def cell(label: str, nodes: int, body_bytes: int, mode: Mode = "pick") -> Cell:
        return Cell(
            label=label, proxy="routing", traffic=Traffic(mode=mode, body_bytes=body_bytes), setup=Setup(nodes=nodes)
        )

    def at_most(label: str, limit: float, moonshot: float | None = None) -> Target:
        return Target(figure="us_per_pick", of=label, over=None, at_most=limit, moonshot=moonshot)

    sizes = Row(
        name="pick",
        title="a pick of predicted_cost, and its booking",
        figures=("us_per_pick",),
        cells=(
            cell("8 nodes", 8, 0),
            cell("8, 10 KB", 8, 10 * KIB),
            cell("50 nodes", 50, 0),
            cell("1000 nodes", 1000, 0),
        ),
        targets=(
            at_most("8 nodes", 25, 12),
            at_most("8, 10 KB", 40),
            at_most("50 nodes", 60),
            at_most("1000 nodes", 60),
        ),
    )
    memory = Row(
        name="pick-memory",
        title="what 100,000 picks of predicted_cost leave behind (8 nodes, 10 KB)",
        figures=("kib_grown",),
        cells=(cell("routing", 8, 10 * KIB, "pick-memory"),),
        rounds_at_most=1,  # a minute, in which nothing is left to chance
        targets=(Target(figure="kib_grown", of="routing", over=None, at_most=256),),
    )
    return [sizes, memory]


def all_rows(idle_streams: int = 5000) -> list[Row]:
    """Every row, in the order they are measured."""
    startup = Row(
        name="startup",
        title="spawn to first answer",
        figures=("startup_s",),
        cells=_beside_nginx(Traffic(mode="startup")),
        targets=(Target(figure="startup_s", of="balancer", over=None, at_most=1.0),),
        rounds_at_least=5,
    )
    return [*_unary(), *_streams(idle_streams), _latency(200), _latency(1000), *_cache(), _nodes(), *_picks(), startup]
