"""Which engine to watch: `URL[,id=NAME][,kind=NAME|auto][,advertise=URL][,gpus=0+1][,metrics=URL]`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# The kinds whose metrics the agent can read; `auto` finds out by asking the engine.
KINDS = ("vllm", "sglang", "tgi", "llamacpp", "triton", "trtllm", "ollama")
_ALIASES = {"llama.cpp": "llamacpp", "llama-cpp": "llamacpp", "tensorrt-llm": "trtllm", "trt-llm": "trtllm"}
_OPTIONS = ("id", "kind", "advertise", "gpus", "metrics")
_FIELDS = (*_OPTIONS, "url", "api_key", "api_key_file")


class SpecError(ValueError):
    """An engine SPEC that cannot be used; the text says which part and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine of this host. `gpus` None: all GPUs of the host if it is the only engine."""

    url: str
    id: str
    kind: str = "auto"
    advertise: str
    gpus: tuple[str, ...] | None = None
    metrics: str | None = None
    api_key: str | None = field(default=None, repr=False)


def parse(text: str) -> EngineSpec:
    """Read a SPEC as given on the command line; raises SpecError."""
    url, *rest = [part.strip() for part in text.strip().split(",")]
    options: dict[str, object] = {"url": url}
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise SpecError(f"engine {url!r}: {part!r} is not NAME=VALUE")
        if name not in _OPTIONS:
            raise SpecError(f"engine {url!r}: unknown option {name!r}{_suggestion(name, _OPTIONS)}")
        if name in options:
            raise SpecError(f"engine {url!r}: {name!r} is given twice")
        options[name] = value.split("+") if name == "gpus" else value
    return from_mapping(options)


def from_mapping(options: Mapping[str, object]) -> EngineSpec:
    """Read an engine as written in the settings file; raises SpecError."""
    for name in options:
        if name not in _FIELDS:
            raise SpecError(f"engine: unknown option {name!r}{_suggestion(name, _FIELDS)}")
    url = _url(options.get("url"), "its URL")
    advertise = _url(options["advertise"], "advertise") if options.get("advertise") else url
    return EngineSpec(
        url=url,
        id=_name(options.get("id")) or urlsplit(advertise).netloc,
        kind=_kind(options.get("kind", "auto"), url),
        advertise=advertise,
        gpus=_gpus(options.get("gpus"), url),
        metrics=_url(options["metrics"], "metrics") if options.get("metrics") else None,
        api_key=_secret(options, url),
    )


def all_from(value: object) -> tuple[EngineSpec, ...]:
    """Read every engine from text (SPECs apart by white space), or a list of SPECs and mappings; raises SpecError."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise SpecError("engines must be a list")
    specs = tuple(_one(item) for item in items)
    for spec in specs:
        if sum(other.id == spec.id for other in specs) > 1:
            raise SpecError(f"two engines have the id {spec.id!r}; give each its own id=NAME")
    return specs


def _one(item: object) -> EngineSpec:
    if isinstance(item, EngineSpec):
        return item
    if isinstance(item, str):
        return parse(item)
    if isinstance(item, Mapping):
        return from_mapping(item)
    raise SpecError(f"engine {item!r} is neither a SPEC nor a mapping")


def _url(value: object, what: str) -> str:
    text = str(value or "").rstrip("/")
    try:
        parts = urlsplit(text)
        port_is_good = parts.port != 0
    except ValueError:
        parts, port_is_good = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_good:
        raise SpecError(f"engine {str(value)!r}: {what} must look like http://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise SpecError(f"engine {parts.hostname!r}: {what} may carry no user, query or fragment")
    return text


def _name(value: object) -> str:
    return "" if value is None else str(value)


def _kind(value: object, url: str) -> str:
    kind = _ALIASES.get(str(value), str(value))
    if kind != "auto" and kind not in KINDS:
        raise SpecError(f"engine {url!r}: unknown kind {str(value)!r}; known: auto, {', '.join(KINDS)}")
    return kind


def _gpus(value: object, url: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(str(item) for item in value) if isinstance(value, list | tuple) else (str(value),)
    for name in names:
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            raise SpecError(f"engine {url!r}: gpus takes indices or UUIDs joined by '+', such as 0+1, not {name!r}")
    return names


def _secret(options: Mapping[str, object], url: str) -> str | None:
    path, value = options.get("api_key_file"), options.get("api_key")
    if path is not None and value is not None:
        raise SpecError(f"engine {url!r}: give api_key or api_key_file, not both")
    if path is None:
        return None if value is None else str(value)
    return read_secret(str(path), f"engine {url!r}: api_key_file")


def read_secret(path: str, what: str) -> str:
    """Return the secret in a file, without the line end; raises SpecError naming `what`."""
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SpecError(f"{what}: cannot read {path}: {reason}") from error
    if not secret:
        raise SpecError(f"{what}: {path} is empty")
    return secret


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
