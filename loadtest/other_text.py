"""Dialects beside OpenAI's first two that write text: Anthropic's messages, OpenAI's responses, TGI's generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from loadtest.call import ApiError, Call, ModelHost, content_text, render
from loadtest.generation import Generation
from loadtest.writing import Wish

# TGI's default for the length of an answer.
TGI_TOKENS = 100
_ANTHROPIC_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_TGI_REASONS = {"stop": "eos_token", "length": "length"}


async def messages(call: Call) -> None:
    """POST /v1/messages. A last message of the assistant is continued."""
    call.check_model()
    (answer,) = call.generations(message_wishes(call.host, call.body))
    message: dict[str, Any] = {"id": call.new_id("msg_"), "type": "message", "role": "assistant", "model": call.model}
    with answer.running():
        if call.body.get("stream"):
            await _stream_message(call, answer, message)
            return
        text = await answer.whole_text()
    content = [{"type": "text", "text": text}]
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens}
    await call.reply.json({**message, "content": content, **_message_end(call, answer), "usage": usage})


def message_wishes(host: ModelHost, body: Mapping[str, Any]) -> list[Wish]:
    """The answer that a messages request asks for."""
    if not isinstance(body.get("max_tokens"), int):
        raise ApiError(400, "max_tokens: Field required", param="max_tokens")
    system = content_text(body.get("system"))
    prompt = (f"<|system|>\n{system}<|end|>\n" if system else "") + _turns(body)
    return [host.wish(body, prompt, body["max_tokens"])]


def _turns(body: Mapping[str, Any]) -> str:
    """The messages as the model reads them. Raises ApiError 400."""
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ApiError(400, "messages: a list of at least one message is required", param="messages")
    return render(turns, continue_final=turns[-1].get("role") == "assistant")


async def _stream_message(call: Call, answer: Generation, message: dict[str, Any]) -> None:
    reply = call.reply
    await reply.begin()
    piece = await answer.next_piece()
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": 0}
    start = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    await reply.named("message_start", {"type": "message_start", "message": start})
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    await reply.named("content_block_start", block)
    while piece is not None:
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
        await reply.named("content_block_delta", delta)
        piece = await answer.next_piece()
    await reply.named("content_block_stop", {"type": "content_block_stop", "index": 0})
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens}
    end = {"type": "message_delta", "delta": _message_end(call, answer), "usage": usage}
    await reply.named("message_delta", end)
    await reply.last(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    await reply.finish()


def _message_end(call: Call, answer: Generation) -> dict[str, str | None]:
    reason = "stop_sequence" if answer.stop_reason else _ANTHROPIC_REASONS[answer.finish_reason or "stop"]
    return {"stop_reason": call.reply.finish_reason(reason), "stop_sequence": answer.stop_reason}


async def responses(call: Call) -> None:
    """POST /v1/responses. Nothing is stored: `previous_response_id` is 404."""
    call.check_model()
    if previous := call.body.get("previous_response_id"):
        raise ApiError(404, f"Response with id '{previous}' not found.", "NotFoundError", "previous_response_id")
    (answer,) = call.generations(response_wishes(call.host, call.body))
    base = {"id": call.new_id("resp_"), "object": "response", "created_at": call.host.clock.unix_s()}
    base |= {"model": call.model, "error": None, "parallel_tool_calls": True, "tools": [], "metadata": {}}
    item = {"id": call.new_id("msg_"), "type": "message", "role": "assistant"}
    with answer.running():
        if call.body.get("stream"):
            await _stream_response(call, answer, base, item)
            return
        await answer.whole_text()
    await call.reply.json(_response(call, answer, base, item))


def response_wishes(host: ModelHost, body: Mapping[str, Any]) -> list[Wish]:
    """The answer that a responses request asks for: to its instructions and input."""
    given = body.get("input")
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ApiError(400, "input: text or a list of items is required", param="input")
    instructions = body.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    prompt = render([*system, *turns], continue_final=turns[-1].get("role") == "assistant")
    return [host.wish(body, prompt, body.get("max_output_tokens"))]


def _response(call: Call, answer: Generation, base: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    whole = answer.finish_reason != "length"
    status = "completed" if whole else "incomplete"
    content = [{"type": "output_text", "text": answer.text, "annotations": []}]
    usage = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    return {
        **base,
        "status": call.reply.finish_reason(status),
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "output": [{**item, "status": status, "content": content}],
        "usage": usage,
    }


async def _stream_response(call: Call, answer: Generation, base: dict[str, Any], item: dict[str, Any]) -> None:
    reply = call.reply
    begun = {**base, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}

    async def say(name: str, **fields: Any) -> None:
        await reply.named(name, {"type": name, "sequence_number": reply.request.events_sent, **fields})

    await reply.begin()
    await say("response.created", response=begun)
    await say("response.in_progress", response=begun)
    await say("response.output_item.added", output_index=0, item={**item, "status": "in_progress", "content": []})
    await say("response.content_part.added", **place, part=part)
    while (piece := await answer.next_piece()) is not None:
        await say("response.output_text.delta", **place, delta=piece, logprobs=[])
    end = _response(call, answer, base, item)
    await say("response.output_text.done", **place, text=answer.text, logprobs=[])
    await say("response.content_part.done", **place, part={**part, "text": answer.text})
    await say("response.output_item.done", output_index=0, item=end["output"][0])
    name = "response.incomplete" if end["incomplete_details"] else "response.completed"
    last = {"type": name, "sequence_number": reply.request.events_sent, "response": end}
    await reply.last(b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(last)))
    await reply.finish()


async def generate(call: Call) -> None:
    """POST /generate, as TGI serves it."""
    (answer,) = call.generations(tgi_wishes(call.host, call.body))
    with answer.running():
        text = await answer.whole_text()
    wants_details = (call.body.get("parameters") or {}).get("details")
    details = {"details": _tgi_details(call, answer)} if wants_details else {}
    await call.reply.json({"generated_text": text, **details})


async def generate_stream(call: Call) -> None:
    """POST /generate_stream, as TGI serves it: no space behind `data:`, the text once more in the last event."""
    (answer,) = call.generations(tgi_wishes(call.host, call.body))
    reply = call.reply
    with answer.running():
        await reply.begin()
        index, end = 0, "</s>"
        while (piece := await answer.next_piece()) is not None:
            index += 1
            if answer.finish_reason == "length":
                end = piece
                break
            await reply.event(b"data:%b\n\n" % orjson.dumps(_tgi_token(index, piece)))
        last = {**_tgi_token(index, end), "generated_text": answer.text, "details": _tgi_details(call, answer)}
        await reply.last(b"data:%b\n\n" % orjson.dumps(last))
        await reply.finish()


def tgi_wishes(host: ModelHost, body: Mapping[str, Any]) -> list[Wish]:
    """The answer that a TGI request asks for."""
    inputs = body.get("inputs")
    if not isinstance(inputs, str):
        raise ApiError(422, "missing field `inputs`")
    parameters = dict(body.get("parameters") or {})
    asked = parameters.pop("max_new_tokens", None) or TGI_TOKENS
    for name in ("details", "decoder_input_details", "return_full_text"):
        parameters.pop(name, None)
    return [host.wish(parameters, inputs, asked)]


def _tgi_token(index: int, text: str) -> dict[str, Any]:
    token = {"id": 2 if text == "</s>" else 1000 + index, "text": text, "logprob": -0.1, "special": text == "</s>"}
    return {"index": index, "token": token, "generated_text": None, "details": None}


def _tgi_details(call: Call, answer: Generation) -> dict[str, Any]:
    reason = "stop_sequence" if answer.stop_reason else _TGI_REASONS[answer.finish_reason or "stop"]
    tokens = answer.completion_tokens
    seed = (call.body.get("parameters") or {}).get("seed")
    finish = call.reply.finish_reason(reason)
    return {"finish_reason": finish, "generated_tokens": tokens, "seed": seed, "input_length": answer.prompt_tokens}
