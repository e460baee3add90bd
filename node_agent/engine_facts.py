"""Reads the small JSON answers of each engine: version, models, limits; and tells an engine's kind by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from node_agent.engine_sample import EngineFacts, Model, whole

# What /v1/models says under `owned_by`, by engine.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "tensorrt_llm": "trtllm", "library": "ollama"}


class Ask(Protocol):
    """Fetches one path of the engine as JSON; None if there is no good answer."""

    async def __call__(self, path: str, *, method: str = "GET") -> Any: ...


async def facts(kind: str | None, ask: Ask) -> EngineFacts:
    """Ask for what changes rarely; whatever the engine does not answer stays None."""
    read = _READERS.get(kind or "", _openai)
    return await read(ask)


async def detect(ask: Ask) -> str | None:
    """Find out the kind of an engine whose metrics page does not tell it."""
    for model in _items(await ask("/v1/models"), "data"):
        if kind := _OWNERS.get(str(model.get("owned_by"))):
            return kind
    if _mapping(await ask("/v2")).get("name") == "triton":
        return "triton"
    if "max_concurrent_requests" in (info := _mapping(await ask("/info"))) or "max_total_tokens" in info:
        return "tgi"
    return "ollama" if "models" in _mapping(await ask("/api/ps")) else None


async def _openai(ask: Ask) -> EngineFacts:
    return EngineFacts(models=openai_models(await ask("/v1/models")))


async def _vllm(ask: Ask) -> EngineFacts:
    version = _text(_mapping(await ask("/version")), "version")
    return EngineFacts(version=version, models=openai_models(await ask("/v1/models")))


async def _sglang(ask: Ask) -> EngineFacts:
    info = _mapping(await ask("/server_info") or await ask("/get_server_info"))
    return EngineFacts(
        version=_text(info, "version"),
        models=openai_models(await ask("/v1/models")),
        slots=whole(info.get("max_running_requests")),
        kv_capacity_tokens=whole(info.get("max_total_num_tokens")),
        kv_block_tokens=whole(info.get("page_size")),
    )


async def _tgi(ask: Ask) -> EngineFacts:
    info = _mapping(await ask("/info"))
    name = _text(info, "model_id")
    model = Model(id=name, loaded=True, max_context_tokens=whole(info.get("max_total_tokens"))) if name else None
    return EngineFacts(
        version=_text(info, "version"),
        models=(model,) if model else None,
        slots=whole(info.get("max_concurrent_requests")),
        kv_capacity_tokens=whole(info.get("max_batch_total_tokens")),
    )


async def _llamacpp(ask: Ask) -> EngineFacts:
    props = _mapping(await ask("/props"))
    context = whole(_mapping(props.get("default_generation_settings")).get("n_ctx"))
    return EngineFacts(
        version=_text(props, "build_info"),
        models=openai_models(await ask("/v1/models"), context),
        slots=whole(props.get("total_slots")),
    )


async def _triton(ask: Ask) -> EngineFacts:
    server = _mapping(await ask("/v2"))
    index = await ask("/v2/repository/index", method="POST")
    models = tuple(
        Model(id=name, loaded=entry.get("state") == "READY")
        for entry in _items(index)
        if (name := _text(entry, "name"))
    )
    return EngineFacts(version=_text(server, "version"), models=models if isinstance(index, list) else None)


async def _ollama(ask: Ask) -> EngineFacts:
    """Every installed model; those in memory are the loaded ones."""
    version = _text(_mapping(await ask("/api/version")), "version")
    installed, loaded = await ask("/api/tags"), await ask("/api/ps")
    in_memory = {_text(entry, "name"): whole(entry.get("context_length")) for entry in _items(loaded, "models")}
    names = [name for entry in _items(installed, "models") if (name := _text(entry, "name"))]
    models = tuple(
        Model(id=name, loaded=name in in_memory if loaded is not None else None, max_context_tokens=in_memory.get(name))
        for name in names
    )
    return EngineFacts(version=version, models=models if installed is not None else None)


_READERS = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tgi": _tgi,
    "llamacpp": _llamacpp,
    "triton": _triton,
    "trtllm": _vllm,
    "ollama": _ollama,
}


def openai_models(answer: object, max_context_tokens: int | None = None) -> tuple[Model, ...] | None:
    """Read an OpenAI model list; None if it is none."""
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        return None
    return tuple(
        Model(
            id=name,
            loaded=True,
            max_context_tokens=_first(entry.get("max_model_len"), _mapping(entry.get("meta")).get("n_ctx"))
            or max_context_tokens,
        )
        for entry in _items(answer, "data")
        if (name := _text(entry, "id"))
    )


def _first(*values: object) -> int | None:
    return next((number for value in values if (number := whole(value)) is not None), None)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object, key: str | None = None) -> Iterator[Mapping[str, Any]]:
    items = _mapping(value).get(key) if key else value
    listed: Iterable[object] = items if isinstance(items, list) else ()
    return (item for item in listed if isinstance(item, dict))


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None
