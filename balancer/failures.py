"""What a client is told when no node gave a good answer. Names no node and no address."""

from __future__ import annotations

from balancer.core.outcome import MISCONFIGURED_STATUS, Outcome
from balancer.core.selection import Candidates
from balancer.errors import (
    BadAnswer,
    BalancerError,
    DeadlineExceeded,
    FirstTokenTimeout,
    NoEligibleNode,
    NotFound,
    RateLimited,
    Truncated,
    Unreachable,
)
from balancer.registry import Registry

# When no node may be asked, a client is told to come back after this long: health checks look every second.
NO_NODE_RETRY_S = 1.0

# A misconfigured node's answers that a client may see, when every node says so. Not 401, 403 or 407: the key they
# speak of is ours; and no redirect, which would name an inside address.
SHOWN_STATUS = MISCONFIGURED_STATUS - {401, 403, 407}

_NOT_THERE = (Outcome.MISCONFIGURED, Outcome.UNKNOWN_MODEL)
_REFUSALS = frozenset({Outcome.REFUSED.label, Outcome.CONNECT_TIMEOUT.label})
_TRUNCATIONS = frozenset(
    {
        Outcome.RESET_AFTER_HEAD,
        Outcome.TRUNCATED,
        Outcome.NO_FINISH_REASON,
        Outcome.NO_GOOD_END,
        Outcome.IDLE_TIMEOUT,
        Outcome.WEDGED,
    }
)


def no_node(candidates: Candidates, model: str, registry: Registry, now: float) -> BalancerError:
    """The error where no attempt could be made."""
    if candidates.serving == 0 and registry.model_unknown(model):
        return NotFound(f"no node serves the model {model}", code="unknown_model", param="model")
    if candidates.blocked_until_s is not None:
        return _pushed_back(model, registry, now)
    return NoEligibleNode("no node can take this request just now", retry_after_s=NO_NODE_RETRY_S)


def is_shown(outcome: Outcome, status: int) -> bool:
    """Whether a failed attempt's answer goes to the client as it is, once every node has said the same."""
    return outcome in _NOT_THERE and status in SHOWN_STATUS


def after_all(
    outcome: Outcome, message: str | None, met: set[str], model: str, registry: Registry, now: float
) -> BalancerError:
    """The error after the last of several attempts; `met`: the labels of how each of them ended."""
    if outcome is Outcome.BACK_PRESSURE:
        if met == {outcome.label}:
            return _pushed_back(model, registry, now)
        return NoEligibleNode("no node could take this request just now", retry_after_s=NO_NODE_RETRY_S)
    if outcome.label in _REFUSALS and met <= _REFUSALS:
        return NoEligibleNode("no node accepts connections just now", retry_after_s=NO_NODE_RETRY_S)
    return failure_of(outcome, message)


def failure_of(outcome: Outcome, message: str | None = None) -> BalancerError:
    """The error that a failed attempt is to the client."""
    if outcome is Outcome.DEADLINE:
        return DeadlineExceeded("the deadline passed before the answer was complete")
    if outcome is Outcome.FIRST_BYTE_TIMEOUT:
        return FirstTokenTimeout("the node sent nothing in time")
    if outcome is Outcome.UNARY_TIMEOUT:
        return FirstTokenTimeout("the node did not answer in time")
    if outcome in (Outcome.RESET_BEFORE_HEAD, Outcome.STALE_CONNECTION) or outcome.label in _REFUSALS:
        return Unreachable("the node could not be reached, or closed the connection before it answered")
    if outcome in _TRUNCATIONS:
        return Truncated("the answer broke off")
    told = f": {message}" if message else ""
    return BadAnswer(f"the node did not give a good answer ({outcome.label}){told}")


def _pushed_back(model: str, registry: Registry, now: float) -> BalancerError:
    """Every node said so: with 429 alone it is the client's to slow down, else there is no room."""
    resting = [node for node in registry.serving(model) if node.blocked_until_s > now]
    wait_s = min((node.blocked_until_s - now for node in resting), default=NO_NODE_RETRY_S)
    if resting and all(node.blocked_by == 429 for node in resting):
        return RateLimited("every node asks for fewer requests", retry_after_s=wait_s)
    return NoEligibleNode("every node is out of room", retry_after_s=wait_s)
