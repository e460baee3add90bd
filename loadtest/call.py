"""What all dialects share: the call with its model, prompt and sampling, and how a refusal looks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson

from loadtest.clock import Clock
from loadtest.connection import Request
from loadtest.engine import Engine
from loadtest.generation import Generation
from loadtest.reply import Reply
from loadtest.text import count_tokens
from loadtest.writing import Wish

# Fields of a body that do not change the text of an answer, or whose part in it is named by itself.
NEUTRAL_FIELDS = frozenset(
    (
        *("model", "messages", "prompt", "input", "inputs", "system", "instructions", "stream", "stream_options"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of", "stop"),
        *("stop_sequences", "seed", "temperature", "parameters", "user", "metadata", "store", "background", "priority"),
        *("continue_final_message", "add_generation_prompt", "prefix", "echo", "ignore_eos", "request_id"),
        *("logprobs", "top_logprobs", "return_token_ids", "previous_response_id", "conversation"),
    )
)


class ApiError(Exception):
    """A refusal with a status; `form` of the dialect makes the body of it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHost:
    """What a dialect needs to know of its node."""

    models: tuple[str, ...]
    owned_by: str  # what it says of its models, by which balancers know its engine
    max_context_tokens: int  # prompt and answer together
    answer_words: tuple[int, int]
    embedding_dimensions: int
    api_key: str | None
    engine: Engine
    clock: Clock
    rng: Random

    def model(self, body: Mapping[str, Any]) -> str:
        """The model a body names; the node's first where it names none."""
        return str(body.get("model") or self.models[0])

    def salt(self, body: Mapping[str, Any], choice: int = 0) -> str:
        """Whatever else decides the text. Without `seed`, a temperature above 0 makes every answer another one."""
        rest = {name: value for name, value in body.items() if name not in NEUTRAL_FIELDS and value is not None}
        temperature = body.get("temperature") or 0
        luck = self.rng.random() if temperature and body.get("seed") is None else body.get("seed")
        decisive = [self.model(body), choice, temperature, luck, rest]
        return orjson.dumps(decisive, option=orjson.OPT_SORT_KEYS).decode()

    def wish(self, body: Mapping[str, Any], prompt: str, asked_tokens: int | None, choice: int = 0) -> Wish:
        """What an answer to a prompt shall be; raises ApiError 400 when prompt and answer do not fit the context."""
        shortest, longest = self.answer_words
        return Wish(
            prompt=prompt,
            salt=self.salt(body, choice),
            max_tokens=self._room(prompt, asked_tokens),
            min_tokens=int(body.get("min_tokens") or 0),
            stop=_stops(body),
            ignore_eos=bool(body.get("ignore_eos")),
            shortest=shortest,
            longest=longest,
        )

    def _room(self, prompt: str, asked_tokens: int | None) -> int:
        limit = self.max_context_tokens
        prompt_tokens = count_tokens(prompt)
        if asked_tokens is not None and asked_tokens < 1:
            raise ApiError(400, f"max_tokens must be at least 1, got {asked_tokens}.", param="max_tokens")
        if prompt_tokens + (asked_tokens or 1) > limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{asked_tokens or 0} output tokens and your prompt contains {prompt_tokens} input tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens."
            )
            raise ApiError(400, message, param="input_tokens")
        return asked_tokens if asked_tokens is not None else limit - prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to one dialect. `body` is its JSON object, empty where there is none."""

    host: ModelHost
    request: Request
    reply: Reply
    body: Mapping[str, Any]

    @property
    def model(self) -> str:
        return self.host.model(self.body)

    def new_id(self, prefix: str) -> str:
        """An id as engines make them."""
        return f"{prefix}{self.host.rng.getrandbits(128):032x}"

    def check_model(self) -> None:
        """Raise ApiError 404 for a model that is not here."""
        if self.model not in self.host.models:
            raise ApiError(404, f"The model `{self.model}` does not exist.", "NotFoundError", "model")

    def generations(self, wishes: Iterable[Wish]) -> list[Generation]:
        """The answers that are wished for."""
        return [Generation(self.host.engine, wish, self.reply.slow_factor) for wish in wishes]


Dialect = Callable[[Call], Awaitable[None]]
ErrorForm = Callable[[ApiError], object]


def openai_error(error: ApiError) -> object:
    """The body of a refusal as OpenAI's API and vLLM write it."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}}


def anthropic_error(error: ApiError) -> object:
    """The body of a refusal as Anthropic's API writes it."""
    kind = "not_found_error" if error.status == 404 else "invalid_request_error"
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def tgi_error(error: ApiError) -> object:
    """The body of a refusal as TGI writes it."""
    return {"error": error.message, "error_type": "validation"}


def parse_body(request: Request) -> Mapping[str, Any]:
    """The JSON object of a request; raises ApiError 400 when it is none."""
    try:
        value = request.json()
    except ValueError as error:
        raise ApiError(400, f"JSON decode error: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "Input should be a valid dictionary")
    return value


def content_text(content: object) -> str:
    """The text of a message's content; other parts by a short mark that depends on them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        parts.append(text if isinstance(text, str) else f"<|part:{orjson.dumps(part).decode()}|>")
    return "".join(parts)


def render(messages: list[Mapping[str, Any]], *, continue_final: bool) -> str:
    """Messages as the model reads them. With `continue_final` the last one is left open, so that it is gone on with."""
    parts = []
    for message in messages:
        extra = {name: value for name, value in message.items() if name not in ("role", "content", "prefix")}
        tail = f"<|{orjson.dumps(extra).decode()}|>" if extra else ""
        parts.append(f"<|{message.get('role')}|>\n{content_text(message.get('content'))}{tail}<|end|>\n")
    if continue_final:
        return "".join(parts).removesuffix("<|end|>\n")
    return "".join((*parts, "<|assistant|>\n"))


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or body.get("stop_sequences") or ()
    return (stop,) if isinstance(stop, str) else tuple(str(one) for one in stop if one)
