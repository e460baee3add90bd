"""Which path speaks which dialect. The fake node answers what vLLM answers, and TGI's two paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.call import (
    ApiError,
    Call,
    Dialect,
    ErrorForm,
    ModelHost,
    anthropic_error,
    openai_error,
    parse_body,
    tgi_error,
)
from loadtest.connection import Request
from loadtest.engine_stats import render
from loadtest.openai_text import chat_completions, chat_wishes, completion_wishes, completions
from loadtest.other_answers import (
    classify,
    detokenize,
    embeddings,
    images,
    parse_form,
    pooling,
    rerank,
    score,
    speech,
    tokenize,
    transcribe,
)
from loadtest.other_text import (
    generate,
    generate_stream,
    message_wishes,
    messages,
    response_wishes,
    responses,
    tgi_wishes,
)
from loadtest.reply import Reply
from loadtest.writing import Wish, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path: its method, its dialect, how it refuses, and whether its body is a multipart form."""

    dialect: Dialect
    method: str = "POST"
    error_form: ErrorForm = openai_error
    form: bool = False


async def models(call: Call) -> None:
    """GET /v1/models."""
    cards = [_model_card(call.host, name) for name in call.host.models]
    await call.reply.json({"object": "list", "data": cards})


async def one_model(call: Call) -> None:
    """GET /v1/models/{id}."""
    name = call.request.path.removeprefix("/v1/models/")
    if name not in call.host.models:
        raise ApiError(404, f"The model `{name}` does not exist.", "NotFoundError", "model")
    await call.reply.json(_model_card(call.host, name))


async def health(call: Call) -> None:
    """GET /health: 200 and nothing else, as vLLM says it."""
    await call.reply.whole(b"", content_type="")


async def version(call: Call) -> None:
    """GET /version."""
    await call.reply.json({"version": "0.11.0"})


async def metrics(call: Call) -> None:
    """GET /metrics, in vLLM's names, with a mark that nothing real was measured."""
    model = call.host.engine.model
    text = render(call.host.models[0], model.stats, model.gauges())
    content_type = "text/plain; version=0.0.4; charset=utf-8"
    await call.reply.whole(text.encode(), content_type=content_type, headers=(("x-simulated", "1"),))


_MESSAGES = Route(dialect=messages, error_form=anthropic_error)
_RERANK, _SCORE = Route(dialect=rerank), Route(dialect=score)
_TRANSCRIBE = Route(dialect=transcribe, form=True)
ROUTES: Mapping[str, Route] = {
    "/v1/chat/completions": Route(dialect=chat_completions),
    "/v1/completions": Route(dialect=completions),
    "/v1/messages": _MESSAGES,
    "/v1/responses": Route(dialect=responses),
    "/generate": Route(dialect=generate, error_form=tgi_error),
    "/generate_stream": Route(dialect=generate_stream, error_form=tgi_error),
    "/v1/embeddings": Route(dialect=embeddings),
    "/v1/rerank": _RERANK,
    "/rerank": _RERANK,
    "/v1/score": _SCORE,
    "/score": _SCORE,
    "/pooling": Route(dialect=pooling),
    "/classify": Route(dialect=classify),
    "/tokenize": Route(dialect=tokenize),
    "/detokenize": Route(dialect=detokenize),
    "/v1/audio/transcriptions": _TRANSCRIBE,
    "/v1/audio/translations": _TRANSCRIBE,
    "/v1/audio/speech": Route(dialect=speech),
    "/v1/images/generations": Route(dialect=images),
    "/v1/models": Route(dialect=models, method="GET"),
    "/health": Route(dialect=health, method="GET"),
    "/version": Route(dialect=version, method="GET"),
    "/metrics": Route(dialect=metrics, method="GET"),
}
ONE_MODEL = Route(dialect=one_model, method="GET")


def is_check(request: Request) -> bool:
    """Whether a request only looks after the node: a health check, a scrape, a model list."""
    return request.method != "POST"


_WISHES: Mapping[str, Callable[[ModelHost, Mapping[str, Any]], list[Wish]]] = {
    "/v1/chat/completions": chat_wishes,
    "/v1/completions": completion_wishes,
    "/v1/messages": message_wishes,
    "/v1/responses": response_wishes,
    "/generate": tgi_wishes,
    "/generate_stream": tgi_wishes,
}


def expected_text(host: ModelHost, path: str, body: Mapping[str, Any]) -> str:
    """The text of the first choice that a healthy node answers, at once and without an engine."""
    return text_of(_WISHES[path](host, body)[0])


async def answer(host: ModelHost, request: Request, reply: Reply) -> None:
    """Answer one request in its dialect, or refuse it in that dialect's form."""
    route = ROUTES.get(request.path) or (ONE_MODEL if request.path.startswith("/v1/models/") else None)
    if route is None:
        await reply.json({"detail": "Not Found"}, status=404)
        return
    if request.method != route.method:
        await reply.json({"detail": "Method Not Allowed"}, status=405, headers=(("allow", route.method),))
        return
    if host.api_key and request.path.startswith("/v1") and request.header("authorization") != f"Bearer {host.api_key}":
        await reply.json({"error": "Unauthorized"}, status=401)
        return
    try:
        await route.dialect(Call(host=host, request=request, reply=reply, body=_body(route, request)))
    except ApiError as error:
        await reply.json(route.error_form(error), status=error.status)
    except (TypeError, ValueError, AttributeError) as error:
        if request.status:
            raise
        await reply.json(route.error_form(ApiError(400, f"Invalid request: {error}")), status=400)


def _body(route: Route, request: Request) -> Mapping[str, Any]:
    if route.method == "GET":
        return {}
    if route.form:
        return parse_form(request.header("content-type") or "", request.body)
    return parse_body(request)


def _model_card(host: ModelHost, name: str) -> dict[str, object]:
    card = {"id": name, "object": "model", "created": host.clock.unix_s(), "owned_by": host.owned_by, "root": name}
    return {**card, "parent": None, "max_model_len": host.max_context_tokens}
