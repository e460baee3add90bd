"""Waits for Xid errors in a thread of its own, and keeps the recent ones per GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from node_agent.clock import Clock
from node_agent.gpu import Xid
from node_agent.nvml import NvmlUnavailable

log = structlog.get_logger()

# How long one wait lasts before the thread looks whether to stop, and its pause after a wait that failed.
WAIT_MS = 1000
PAUSE_S = 1.0
# Kept per GPU: one that reports more has told enough.
KEPT = 32


class XidSource(Protocol):
    """A subscription to Xid errors; `next` raises NvmlUnavailable when a wait fails."""

    @property
    def indices(self) -> frozenset[int]: ...

    def next(self, timeout_ms: int) -> tuple[int | None, int] | None: ...


class XidWatch:
    """Collects Xid errors from when it is started until `stop` is set."""

    def __init__(
        self,
        subscribe: Callable[[], XidSource | None],
        clock: Clock,
        stop: threading.Event,
        *,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._subscribe, self._clock, self._stop, self._pause_s = subscribe, clock, stop, pause_s
        self._lock = threading.Lock()
        self._heard: dict[int, tuple[Xid, ...]] = {}

    def start(self) -> None:
        threading.Thread(target=self._run, name="nvml-xid", daemon=True).start()

    def heard(self) -> Mapping[int, tuple[Xid, ...]]:
        """Return the errors by GPU index; a GPU that is absent reports none, so that nothing is known of it."""
        with self._lock:
            return dict(self._heard)

    def _run(self) -> None:
        try:
            source = self._subscribe()
            if source is None:
                log.info("xid.not_supported")
                return
            with self._lock:
                self._heard = dict.fromkeys(source.indices, ())
            self._listen(source)
        except Exception:  # the edge of a background loop
            log.exception("xid.watch_ended")

    def _listen(self, source: XidSource) -> None:
        failing: str | None = None
        while not self._stop.is_set():
            try:
                event, failure = source.next(WAIT_MS), None
            except NvmlUnavailable as error:  # a GPU fell off the bus: the others go on
                event, failure = None, str(error)
                self._stop.wait(self._pause_s)
            if failure and failure != failing:
                log.warning("xid.wait_failed", reason=failure)
            failing = failure
            if event:
                self._keep(*event)

    def _keep(self, index: int | None, code: int) -> None:
        log.warning("xid.reported", gpu=index, xid=code)
        if index is not None:
            with self._lock:
                self._heard[index] = (*self._heard.get(index, ()), Xid(code, self._clock.now()))[-KEPT:]
