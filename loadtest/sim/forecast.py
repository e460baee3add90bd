"""What an engine will do, found by letting a copy of it run: the oracle's eyes."""

from __future__ import annotations

from collections import deque

from loadtest.sim.arrival import Arrival
from loadtest.sim.engine import NEVER_S, Engine
from loadtest.sim.sequence import Sequence


def clone(engine: Engine) -> Engine:
    """A copy that shares nothing that changes."""
    other = Engine.__new__(Engine)
    other.__dict__.update(engine.__dict__)
    copies = {sequence: sequence.clone() for sequence in (*engine.running, *engine.waiting)}
    other.pool = engine.pool.clone()
    other.waiting = deque(copies[sequence] for sequence in engine.waiting)
    other.running = {copies[sequence]: None for sequence in engine.running}
    other.prefilling = {copies[sequence]: None for sequence in engine.prefilling}
    other.decoding = {copies[sequence]: since for sequence, since in engine.decoding.items()}
    other._ends = [
        (step, order, copies[sequence]) for step, order, sequence in engine._ends if sequence in engine.decoding
    ]
    other._ends.sort()
    if engine._chunks is not None:
        other._chunks = [(copies[sequence], chunk) for sequence, chunk in engine._chunks if sequence in copies]
    return other


def finish_s(engine: Engine, arrival: Arrival, now: float, give_up_s: float = NEVER_S) -> float:
    """When the request would be done if it went there now; infinite if later than `give_up_s`, or never."""
    if not engine.accepts(arrival):
        return NEVER_S
    copy = clone(engine)
    mine = Sequence(-1, arrival)
    copy.submit(mine, now)
    while copy.stage_end_s < give_up_s:
        end_s = copy.stage_end_s
        _, done = copy.end_stage()
        if mine in done:
            return end_s
    return NEVER_S
