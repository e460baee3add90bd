"""How the agent logs: one event a line, on stderr; for people on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Literal

import structlog
from pydantic import ConfigDict


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPolicy:
    """What is logged, and in which form: `auto` is the console form on a terminal, else JSON."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


def configure(policy: LogPolicy) -> None:
    """Set structlog up for the whole process; events are `noun.past_verb`, facts are keys with units."""
    console = policy.format == "console" or (policy.format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if console
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, policy.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
