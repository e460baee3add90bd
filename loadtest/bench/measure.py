"""One measurement: a fresh backend, a fresh proxy, one load, and what the proxy used meanwhile."""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.bench import disturbance, processes, proxies, redis_server
from loadtest.bench.processes import Cores
from loadtest.bench.programs import Programs
from loadtest.bench.proxies import Place, Proxy
from loadtest.bench.rows import EVENTS_PER_S, Cell, Traffic

FIRST_IDLE_WITHIN_S = 120.0
PICKS_WITHIN_S = 300.0


class CellFailed(Exception):
    """This cell has no figure; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long each measurement warms up and lasts."""

    warmup_s: float = 1.5
    window_s: float = 2.5
    latency_window_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round of one cell: its figures by name, and `per_s` answers or events a second.

    `limits` and `by_others` are sentences: what bench or proxy could not do, and how other work disturbed it.
    """

    figures: Mapping[str, float]
    per_s: float | None = None
    limits: tuple[str, ...] = ()
    by_others: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stand:
    """Everything that runs during one measurement."""

    port: int
    proxy_pids: list[int]
    backend_pid: int
    redis: redis_server.RedisServer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measures cells, one after the other."""

    programs: Programs
    cores: Cores
    timing: Timing
    proxies: Mapping[str, Proxy]
    profile: bool = False

    def missing(self, cell: Cell) -> str | None:
        """Why this cell cannot be measured here, or None."""
        if cell.proxy == "routing":
            return None
        needed = 2 * cell.traffic.connections + 100
        if cell.proxy != "direct" and (reason := self.proxies[cell.proxy].missing()):
            return reason
        if cell.setup.redis and (reason := redis_server.missing()):
            return reason
        if (files := processes.open_files_limit()) < needed:
            return f"{needed:,} open files are needed, {files:,} are allowed (ulimit -Hn)"
        return None

    def measure(self, cell: Cell) -> Sample:
        """One round. Raises CellFailed, or ProxyFailed with the proxy's own words."""
        try:
            if cell.proxy == "routing":
                return self._picks(cell)
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-balancer-bench-"))
                return self._measure(cell, Path(folder), stack)
        except (OSError, subprocess.SubprocessError) as error:
            raise CellFailed(f"{type(error).__name__}: {error}") from error

    def _measure(self, cell: Cell, folder: Path, stack: contextlib.ExitStack) -> Sample:
        interval_us = int(1e6 / EVENTS_PER_S) if cell.traffic.mode == "stream" else 0
        words = [str(self.programs.backend), "--ports", str(cell.setup.nodes), "--interval-us", str(interval_us)]
        backend = stack.enter_context(processes.running(words, output=subprocess.PIPE))
        node_ports = _json_line(backend, within_s=10)["ports"]
        redis = stack.enter_context(redis_server.started(str(folder))) if cell.setup.redis else None
        if cell.proxy == "direct":
            stand = _Stand(port=node_ports[0], proxy_pids=[], backend_pid=backend.pid, redis=redis)
            return self._under_load(cell, stand)
        port = processes.free_port()
        place = Place(folder=folder, port=port, node_ports=node_ports, redis_port=redis.port if redis else None)
        proxy = proxies.started(self.proxies[cell.proxy], place, cell.setup, self.cores.proxy)
        pid, startup_s = stack.enter_context(proxy)
        if cell.traffic.mode == "startup":
            return Sample(figures={"startup_s": startup_s})
        if self.profile and cell.proxy == "balancer":
            print(
                f"profile: py-spy record --pid {pid} --duration {self.timing.window_s:.0f} -o profile.svg", flush=True
            )
        stand = _Stand(port=port, proxy_pids=processes.family(pid), backend_pid=backend.pid, redis=redis)
        try:
            return self._idle(cell, stand) if cell.traffic.mode == "idle" else self._under_load(cell, stand)
        except CellFailed as error:
            raise CellFailed(f"{error} | its log: {proxies.log_end(place)}") from error

    def _picks(self, cell: Cell) -> Sample:
        """The routing alone, in a process on the proxy's core."""
        words = [sys.executable, "-m", "loadtest.bench.picks", "--nodes", str(cell.setup.nodes)]
        words += ["--prompt-bytes", str(cell.traffic.body_bytes)]
        if cell.traffic.mode == "pick-memory":
            words += ["--memory", "--picks", "100000"]
        with processes.running(words, core=self.cores.proxy, output=subprocess.PIPE) as process:
            return Sample(figures=_json_line(process, PICKS_WITHIN_S))

    def _under_load(self, cell: Cell, stand: _Stand) -> Sample:
        traffic = cell.traffic
        seconds = self.timing.latency_window_s if traffic.mode == "open" else self.timing.window_s
        hits_before = stand.redis.hits() if stand.redis else 0
        watched = [*stand.proxy_pids, stand.backend_pid, *([stand.redis.pid] if stand.redis else [])]
        told = self._load(cell, stand.port, seconds, watched)
        if told["errors"]:
            raise CellFailed(f"{told['errors']:,} of {told['finished']:,} went wrong, first: {told['first_error']}")
        if min(told["watched_cpu_s"]) < 0:
            raise CellFailed("a process ended while it was measured")
        if traffic.repeated_bodies:
            from_redis = stand.redis.hits() - hits_before if stand.redis else None
            if reason := disturbance.not_hits(told, from_redis):
                raise CellFailed(reason)
        count = told["events"] if traffic.mode == "stream" else told["requests"]
        if not count:
            raise CellFailed("nothing was answered in the measured window")
        shares = _shares(told, len(stand.proxy_pids))
        per_s = count / told["wall_s"]
        name = "cpu_us_per_event" if traffic.mode == "stream" else "cpu_us_per_request"
        figures = {name: shares["proxy_cpu_s"] / count * 1e6}
        if traffic.mode == "open":
            figures |= {"p50_us": told["p50_us"], "p99_us": told["p99_us"]}
        told |= shares
        return Sample(
            figures=figures,
            per_s=per_s,
            limits=disturbance.limits(traffic, told, per_s),
            by_others=disturbance.by_others(traffic, told),
            details=told,
        )

    def _load(self, cell: Cell, port: int, seconds: float, watched: list[int]) -> dict[str, Any]:
        words = self._load_words(cell, port, seconds)
        for pid in watched:
            words += ["--watch", str(pid)]
        patience_s = self.timing.warmup_s + seconds + 60
        result = subprocess.run(words, capture_output=True, text=True, timeout=patience_s, check=False)
        if result.returncode:
            raise CellFailed(f"the load generator gave up: {result.stderr.strip()}")
        told: dict[str, Any] = json.loads(result.stdout)
        return told

    def _load_words(self, cell: Cell, port: int, seconds: float) -> list[str]:
        traffic = cell.traffic
        ramp_s = traffic.connections / traffic.rate
        tokens = int((ramp_s + self.timing.warmup_s + seconds + 2) * EVENTS_PER_S) if traffic.mode == "stream" else 256
        options = {
            "mode": traffic.mode,
            "port": port,
            "connections": traffic.connections,
            "seconds": seconds,
            "warmup": self.timing.warmup_s,
            "rate": traffic.rate,
            "body-bytes": traffic.body_bytes,
            "tokens": tokens,
            "distinct": traffic.repeated_bodies,
            "separators": "spaced" if traffic.spaced else "compact",
            "head": "openai" if traffic.openai_head else "plain",
            "key": proxies.KEY if cell.setup.keys else "",
            "proxy-core": self.cores.proxy,
            "load-core": self.cores.load,
        }
        words = [str(self.programs.load)]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        return words

    def _idle(self, cell: Cell, stand: _Stand) -> Sample:
        warm = Cell(label="warm", proxy=cell.proxy, traffic=Traffic(connections=16), setup=cell.setup)
        self._load(warm, stand.port, 0.2, [])
        before_kib = processes.rss_kib(stand.proxy_pids)
        words = self._load_words(cell, stand.port, 0)
        with processes.running(words, output=subprocess.PIPE) as load:
            told = _json_line(load, FIRST_IDLE_WITHIN_S)
            time.sleep(1.0)  # what is freed after a burst is freed by then
            grown_kib = processes.rss_kib(stand.proxy_pids) - before_kib
        if told["errors"] or told["ready"] != cell.traffic.connections:
            raise CellFailed(f"only {told['ready']:,} streams began: {told['first_error']}")
        details = told | {"rss_before_kib": before_kib, "rss_grown_kib": grown_kib}
        return Sample(figures={"kib_per_stream": grown_kib / cell.traffic.connections}, details=details)


def _shares(told: Mapping[str, Any], proxy_count: int) -> dict[str, float]:
    """CPU and waiting seconds of the two sides; the proxy's processes are the first that were watched."""
    made = {}
    for kind in ("cpu_s", "wait_s"):
        watched = told[f"watched_{kind}"]
        made[f"proxy_{kind}"] = sum(watched[:proxy_count])
        made[f"load_side_{kind}"] = told[f"load_{kind}"] + sum(watched[proxy_count:])
    return made


def _json_line(process: subprocess.Popen[bytes], within_s: float) -> dict[str, Any]:
    assert process.stdout
    if not select.select([process.stdout], [], [], within_s)[0]:
        raise CellFailed(f"backend or load generator said nothing for {within_s:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise CellFailed("backend or load generator gave up; its words are above")
    told: dict[str, Any] = json.loads(line)
    return told
