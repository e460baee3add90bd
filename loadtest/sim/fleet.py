"""Which engines there are, and what befalls them: `8xh100-70b`, `2xh100-8b+4xa100-8b+2xl4-8b`, `4xa100-8b/2`.

A fault: `slow:NODE@FROM[-UNTIL]x3`, `hang:NODE@FROM[-UNTIL]`, `crash:NODE@FROM-UNTIL`, `fail:NODE@FROM[-UNTIL]`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Literal

from balancer.core.cost import CostPolicy
from loadtest.sim.profiles import PROFILES, EngineProfile, slower

FaultKind = Literal["slow", "hang", "crash", "fail"]


class SpecError(Exception):
    """A fleet or a fault that cannot be understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One node's trouble.

    slow: all its times are `factor` longer. hang: it takes requests and moves nothing. crash: everything there is
    lost, connections are refused, and it comes back empty. fail: new requests get a 500 in 5 ms (a black hole), running
    ones end well.
    """

    kind: FaultKind
    node: int
    from_s: float
    until_s: float = math.inf
    factor: float = 1.0


def parse_fleet(spec: str) -> list[EngineProfile]:
    """One profile a node, in the order of the spec. Raises SpecError."""
    found: list[EngineProfile] = []
    for part in re.split(r"[+,]", spec):
        match = re.fullmatch(r"\s*(?:(\d+)x)?([a-z0-9-]+?)(?:/(\d+(?:\.\d+)?))?\s*", part)
        if match is None or match[2] not in PROFILES:
            raise SpecError(f"{part!r}: want [COUNTx]PROFILE[/SLOWER], PROFILE one of {', '.join(PROFILES)}")
        profile = PROFILES[match[2]]
        if match[3]:
            profile = slower(profile, float(match[3]))
        found += [profile] * int(match[1] or 1)
    if not found:
        raise SpecError(f"{spec!r}: no nodes")
    return found


def parse_cost(spec: str) -> CostPolicy:
    """Weights of predicted_cost, `decode=0.2,waste=1`; the others stay at their defaults. Raises SpecError."""
    try:
        pairs = [part.split("=") for part in spec.split(",") if part]
        return replace(CostPolicy(), **{name.strip(): float(value) for name, value in pairs})
    except (TypeError, ValueError):
        names = ", ".join(weight.name for weight in fields(CostPolicy))
        raise SpecError(f"{spec!r}: want NAME=VALUE,..., NAME one of {names}") from None


def parse_fault(spec: str, nodes: int) -> Fault:
    """Raises SpecError."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(slow|hang|crash|fail):(\d+)@{number}(?:-{number})?(?:x{number})?", spec)
    if match is None:
        raise SpecError(f"{spec!r}: want KIND:NODE@FROM[-UNTIL][xFACTOR], KIND one of slow, hang, crash, fail")
    if int(match[2]) >= nodes:
        raise SpecError(f"{spec!r}: there are only nodes 0 to {nodes - 1}")
    if (match[1] == "slow") != (match[5] is not None):
        raise SpecError(f"{spec!r}: a factor belongs to slow, and to slow alone")
    until_s = float(match[4]) if match[4] else math.inf
    kinds: dict[str, FaultKind] = {"slow": "slow", "hang": "hang", "crash": "crash", "fail": "fail"}
    return Fault(
        kind=kinds[match[1]],
        node=int(match[2]),
        from_s=float(match[3]),
        until_s=until_s,
        factor=float(match[5] or 1.0),
    )
