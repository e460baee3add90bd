"""structlog set-up: console on a terminal, JSON lines elsewhere; always on stderr."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal

import orjson
import structlog

# Lines wait at most this long for company: one write a line would cost more than making the line.
FLUSH_S = 0.1
FLUSH_BYTES = 64 * 1024

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
EventWriter = Callable[[str, float, dict[str, Any]], None]
LogFormat = Literal["auto", "console", "json"]


class BufferedLines:
    """A structlog logger that collects lines and writes them together; warnings and worse go out at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._bytes = 0
        self._handle: asyncio.TimerHandle | None = None
        self._millisecond = -1
        self._text = ""

    def info(self, line: bytes) -> None:
        """Write soon."""
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes > FLUSH_BYTES:
            self.flush()
        elif self._handle is None:
            try:
                self._handle = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
            except RuntimeError:  # no loop runs: start-up and shutdown
                self.flush()

    debug = info

    def warning(self, line: bytes) -> None:
        """Write now."""
        self._lines.append(line)
        self.flush()

    error = critical = exception = warning

    def event(self, event: str, wall_s: float, facts: dict[str, Any]) -> None:
        """One info line without structlog's processors, which cost 10 µs: for the one line that every request has."""
        facts["event"] = event
        facts["level"] = "info"
        facts["timestamp"] = self._timestamp(wall_s)
        self.info(orjson.dumps(facts))

    def _timestamp(self, wall_s: float) -> str:
        millisecond = int(wall_s * 1000.0)
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            moment = datetime.fromtimestamp(millisecond / 1000.0, UTC)
            self._text = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return self._text

    def flush(self) -> None:
        """Write everything collected so far."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._lines:
            lines, self._lines, self._bytes = self._lines, [], 0
            try:
                self._stream.write(b"\n".join(lines) + b"\n")
                self._stream.flush()
            except OSError:
                pass  # whoever read our stderr is gone; serving matters more


def _to_json(event: dict[str, Any], **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def set_up(level: str, format_: LogFormat) -> BufferedLines | None:
    """Configure structlog for this process; returns what has to be flushed at the end, if anything."""
    minimum = structlog.make_filtering_bound_logger(LEVELS[level])
    if format_ == "console" or (format_ == "auto" and sys.stderr.isatty()):
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                structlog.dev.ConsoleRenderer(
                    colors=sys.stderr.isatty(),
                    exception_formatter=structlog.dev.plain_traceback,  # rich would print locals: prompts and keys
                ),
            ],
            wrapper_class=minimum,
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=True,
        )
        return None
    lines = BufferedLines(sys.stderr.buffer)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=minimum,
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    return lines


def event_writer(level: str, lines: BufferedLines | None) -> EventWriter | None:
    """How `request.finished` is written: straight into JSON lines, through structlog on a console, None when off."""
    if LEVELS[level] > LEVELS["info"]:
        return None
    if lines is not None:
        return lines.event
    logger = get_logger()
    return lambda event, wall_s, facts: logger.info(event, **facts)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger, set up or not yet."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
