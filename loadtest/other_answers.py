"""Dialects whose answers are no text: embeddings, scores, token numbers, audio, images."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from loadtest.call import ApiError, Call
from loadtest.embedding import embed, likeness
from loadtest.generation import prefill
from loadtest.openai_text import chat_prompt, finish_all
from loadtest.text import count_tokens, from_token_ids, to_token_ids

_AUDIO_TYPES = {"mp3": "audio/mpeg", "wav": "audio/wav", "opus": "audio/ogg", "flac": "audio/flac", "aac": "audio/aac"}
# Bytes of speech for each token of text, and bytes written at once.
SPEECH_BYTES_PER_TOKEN = 2048
SPEECH_CHUNK_BYTES = 4096


async def embeddings(call: Call) -> None:
    """POST /v1/embeddings: floats, or base64 of little-endian 32-bit floats."""
    call.check_model()
    texts = _texts(call.body.get("input"), "input")
    tokens = await _read(call, texts)
    in_base64 = call.body.get("encoding_format") == "base64"
    data = []
    for index, text in enumerate(texts):
        vector = _vector(call, text)
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if in_base64 else vector
        data.append({"index": index, "object": "embedding", "embedding": packed})
    await call.reply.json({**_list_base(call, "embd-"), "data": data, "usage": _usage(tokens)})


async def pooling(call: Call) -> None:
    """POST /pooling: one vector for each token."""
    call.check_model()
    texts = _texts(call.body.get("input"), "input")
    tokens = await _read(call, texts)
    data = [
        {"index": index, "object": "pooling", "data": [_vector(call, str(token)) for token in to_token_ids(text)]}
        for index, text in enumerate(texts)
    ]
    await call.reply.json({**_list_base(call, "pool-"), "data": data, "usage": _usage(tokens)})


async def classify(call: Call) -> None:
    """POST /classify: two classes."""
    call.check_model()
    texts = _texts(call.body.get("input"), "input")
    tokens = await _read(call, texts)
    data = []
    for index, text in enumerate(texts):
        share = _digest(call.model, text)[0] / 255.0
        label = "LABEL_0" if share >= 0.5 else "LABEL_1"
        data.append({"index": index, "label": label, "probs": [share, 1.0 - share], "num_classes": 2})
    await call.reply.json({**_list_base(call, "classify-"), "data": data, "usage": _usage(tokens)})


async def rerank(call: Call) -> None:
    """POST /rerank and /v1/rerank: the best documents first."""
    call.check_model()
    query = _texts(call.body.get("query"), "query")[0]
    documents = _texts(call.body.get("documents"), "documents")
    tokens = await _read(call, [query, *documents])
    wanted = _vector(call, query)
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": likeness(wanted, _vector(call, text))}
        for index, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    top = results[: call.body.get("top_n") or len(results)]
    usage = {"total_tokens": tokens}
    await call.reply.json({"id": call.new_id("rerank-"), "model": call.model, "usage": usage, "results": top})


async def score(call: Call) -> None:
    """POST /score and /v1/score: one text against each of several, or pairs."""
    call.check_model()
    left = _texts(call.body.get("text_1") or call.body.get("queries"), "text_1")
    right = _texts(call.body.get("text_2") or call.body.get("documents"), "text_2")
    if len(left) not in (1, len(right)):
        raise ApiError(400, "Input lengths must be either 1:1, 1:N or N:N")
    tokens = await _read(call, [*left, *right])
    pairs = zip(left * len(right) if len(left) == 1 else left, right, strict=True)
    data = [
        {"index": index, "object": "score", "score": likeness(_vector(call, one), _vector(call, other))}
        for index, (one, other) in enumerate(pairs)
    ]
    await call.reply.json({**_list_base(call, "score-"), "data": data, "usage": _usage(tokens)})


async def tokenize(call: Call) -> None:
    """POST /tokenize: of a prompt, or of messages as the model reads them."""
    call.check_model()
    prompt = call.body.get("prompt")
    text = prompt if isinstance(prompt, str) else chat_prompt(call.host, call.body)
    ids = to_token_ids(text)
    limit = call.host.max_context_tokens
    await call.reply.json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None})


async def detokenize(call: Call) -> None:
    """POST /detokenize."""
    call.check_model()
    tokens = call.body.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise ApiError(400, "tokens: a list of token ids is required", param="tokens")
    await call.reply.json({"prompt": from_token_ids(tokens)})


async def transcribe(call: Call) -> None:
    """POST /v1/audio/transcriptions and /v1/audio/translations: a multipart form in, a text out."""
    call.check_model()
    audio = call.body.get("file")
    if not isinstance(audio, bytes):
        raise ApiError(400, "file: Field required", param="file")
    settings = {name: value for name, value in call.body.items() if isinstance(value, str) and name != "temperature"}
    prompt = f"<|audio:{blake2b(audio, digest_size=8).hexdigest()}:{call.request.path}|>\n"
    (answer,) = await finish_all(call.generations([call.host.wish(settings, prompt, None)]))
    if call.body.get("response_format") == "text":
        await call.reply.whole(answer.text.encode(), content_type="text/plain; charset=utf-8")
        return
    # 16 bit, 16 kHz, one channel.
    usage = {"type": "duration", "seconds": max(1, len(audio) // 32_000)}
    await call.reply.json({"text": answer.text, "usage": usage})


async def speech(call: Call) -> None:
    """POST /v1/audio/speech: bytes of no meaning, as they are made."""
    call.check_model()
    text = _texts(call.body.get("input"), "input")[0]
    await _read(call, [text])
    seed = _digest(call.model, text)
    size_bytes = count_tokens(text) * SPEECH_BYTES_PER_TOKEN
    sound = (seed * (size_bytes // len(seed) + 1))[:size_bytes]
    await call.reply.begin(_AUDIO_TYPES.get(str(call.body.get("response_format")), "audio/mpeg"))
    for start in range(0, size_bytes, SPEECH_CHUNK_BYTES):
        await call.reply.event(sound[start : start + SPEECH_CHUNK_BYTES])
    await call.reply.finish()


async def images(call: Call) -> None:
    """POST /v1/images/generations: small PNGs of one colour."""
    call.check_model()
    prompt = _texts(call.body.get("prompt"), "prompt")[0]
    await _read(call, [prompt])
    pictures = [_png(_digest(call.model, f"{prompt}\0{index}")[:3]) for index in range(int(call.body.get("n") or 1))]
    data = [{"b64_json": base64.b64encode(picture).decode(), "revised_prompt": None} for picture in pictures]
    await call.reply.json({"created": call.host.clock.unix_s(), "data": data})


def parse_form(content_type: str, body: bytes) -> Mapping[str, Any]:
    """The parts of a multipart form by name: text, or bytes for a file. Raises ApiError 400."""
    boundary = content_type.partition("boundary=")[2].partition(";")[0].strip('" ').encode()
    if not boundary or b"--" + boundary + b"--" not in body:
        raise ApiError(400, "There was an error parsing the body")
    form: dict[str, Any] = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        text = head.decode("latin-1")
        name = text.partition('name="')[2].partition('"')[0] or text.partition("name=")[2].split("\r\n")[0].strip()
        value = value.removesuffix(b"\r\n")
        form[name] = value if "filename" in text else value.decode("utf-8", "replace")
    return form


async def _read(call: Call, texts: list[str]) -> int:
    """Let the engine read the texts; the tokens of all."""
    return sum([await prefill(call.host.engine, text, call.reply.slow_factor) for text in texts])


def _texts(given: object, name: str) -> list[str]:
    """One or several texts, as text, token numbers or documents; raises ApiError 400."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(one, int) for one in given):
            return [from_token_ids(given)]
        return [_text(one, name) for one in given]
    raise ApiError(400, f"{name}: Field required", param=name)


def _text(given: object, name: str) -> str:
    if isinstance(given, dict):
        given = given.get("text")
    if isinstance(given, list) and all(isinstance(one, int) for one in given):
        return from_token_ids(given)
    if not isinstance(given, str):
        raise ApiError(400, f"{name}: Input should be a valid string", param=name)
    return given


def _vector(call: Call, text: str) -> list[float]:
    return embed(call.model, text, int(call.body.get("dimensions") or call.host.embedding_dimensions))


def _digest(model: str, text: str) -> bytes:
    return blake2b(f"{model}\0{text}".encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _list_base(call: Call, prefix: str) -> dict[str, Any]:
    created = call.host.clock.unix_s()
    return {"id": call.new_id(prefix), "object": "list", "created": created, "model": call.model}


def _usage(tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def _png(colour: bytes) -> bytes:
    """A picture of 8 by 8 pixels."""
    head, rows = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), (b"\0" + colour * 8) * 8
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
