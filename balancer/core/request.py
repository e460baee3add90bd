"""What a request is, once it is understood: who asks, for which model, how long there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from balancer.core.books import Work
    from balancer.core.poison import Account
    from balancer.core.prompt_blocks import Prompt
    from balancer.core.routing import Pick

TenantId = NewType("TenantId", str)
NodeId = NewType("NodeId", str)

ANONYMOUS = TenantId("anonymous")

# Generated tokens expected of a request that does not say: the prior until the model's own mean is known.
EXPECTED_OUTPUT_TOKENS = 256
# Bytes of JSON text that make one prompt token: English averages near 4 with GPT-like vocabularies.
BYTES_PER_TOKEN = 4.0


class Priority(Enum):
    """Who goes first when there is a queue; lower goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class CacheMode(Enum):
    """What `X-Balancer-Cache` asks for."""

    DEFAULT = "default"
    BYPASS = "bypass"
    REFRESH = "refresh"
    ONLY = "only"
    EXACT = "exact"


class Dialect(Enum):
    """How an endpoint streams: its good end, its error event, its first content (contract, "Dialects")."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    RESPONSES = "responses"
    TGI = "tgi"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One path of the data port and what may be done with its requests."""

    path: str
    name: str
    dialect: Dialect = Dialect.PLAIN
    streams: bool = False  # `stream: true` in the body asks for a stream
    always_streams: bool = False  # the path itself does
    samples: bool = False  # has a temperature: only deterministic requests are cacheable by default
    cacheable: bool = True
    multipart: bool = False
    binary: bool = False  # a good answer need not be JSON
    engine: bool = True  # answered by the engine, not by its front end alone
    object_only: bool = True  # a good answer is a JSON object, never an array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tenant:
    """Who pays: the identity behind one key, and what it may use. Limits of None fall back to the defaults."""

    id: TenantId
    requests_per_minute: float | None = None
    burst: float | None = None
    tokens_per_minute: float | None = None
    max_in_flight: int | None = None
    models: frozenset[str] | None = None
    prefer: tuple[tuple[str, str], ...] = ()  # labels that its nodes had better carry


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a caller asks of us in `X-Balancer-*` headers; most ask nothing."""

    timeout_s: float | None = None
    priority: Priority = Priority.NORMAL
    session: str | None = None
    cache_mode: CacheMode = CacheMode.DEFAULT
    cache_ttl_s: float | None = None
    comments: bool = True  # may come while a stream waits


NO_WISHES = Wishes()


@dataclass(slots=True)
class InferenceRequest:
    """One understood request. Only `tried` changes, and what a shared flight moves on; the body is let go of after
    the commit point."""

    id: str
    endpoint: Endpoint
    tenant: Tenant
    wishes: Wishes
    forward: tuple[tuple[bytes, bytes], ...]  # client headers that may go to a node
    head_lines: bytes  # the same as they stand in a head, and what we add for every node
    target: bytes  # path and query as the client sent them
    model: str  # after alias
    body: bytes  # the client's, byte for byte, unless an alias had to change it
    usage_body: bytes | None  # the same with usage asked for, where the client did not
    parsed: dict[str, Any] | None  # the JSON body; None for multipart
    is_exact: bool  # `parsed` is all of `body` (core.cache_key)
    stream: bool
    wants_usage: bool  # the client's stream is to carry usage
    accepted_s: float
    deadline_s: float
    http10: bool
    tried: set[NodeId] = field(default_factory=set)
    prompt: Prompt | None = None  # what there is to read in it, and
    work: Work | None = None  # what it asks of a node: both made by the routing that uses them
    extend: Callable[[float], None] | None = None  # gives the attempt under way a later deadline
    held_blocks: int = 0  # leading blocks of its prompt that the node picked last holds
    picked: Pick | None = None  # what the last pick had before it
    account: Account | None = None  # nodes' failures under it (core/poison.py); None while there were none
    mark: str = ""  # its fingerprint, once it was needed

    @property
    def query(self) -> bytes:
        """What stands behind the path's question mark."""
        return self.target.partition(b"?")[2]

    @property
    def choices(self) -> int:
        """How many choices a stream has to finish: n, times the prompts of a completions batch."""
        parsed = self.parsed
        if parsed is None:
            return 1
        n, prompt = parsed.get("n"), parsed.get("prompt")
        choices = n if type(n) is int and n > 0 else 1
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            choices *= len(prompt)
        return choices

    @property
    def replayable(self) -> bool:
        """Whether it may be sent a second time: not where a node keeps what it made of it."""
        stored = self.endpoint.dialect is Dialect.RESPONSES and self.parsed is not None and self.parsed.get("store")
        return not stored

    def forget_body(self) -> None:
        """It is sent and will not be sent again: a long stream need not hold its prompt."""
        self.body = b""
        self.usage_body = self.parsed = self.picked = None

    def prompt_tokens(self) -> float:
        """Prompt tokens estimated from the body's bytes."""
        return max(1.0, len(self.body) / BYTES_PER_TOKEN)

    def max_tokens(self) -> int:
        """Tokens that may be generated: what the body allows, else the prior."""
        return self.asked_tokens() or EXPECTED_OUTPUT_TOKENS

    def asked_tokens(self) -> int | None:
        """The most tokens that the body lets a node generate; None where it does not say."""
        parsed = self.parsed
        if parsed is not None:
            for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
                value = parsed.get(name)
                if type(value) is int and value > 0:
                    return value
        return None
