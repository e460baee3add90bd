"""The OpenAI dialects that write text: chat completions and completions, as vLLM serves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from loadtest.call import ApiError, Call, ModelHost, render
from loadtest.generation import Generation
from loadtest.text import from_token_ids
from loadtest.writing import Wish

# vLLM's default where a completion does not say how long it may be.
COMPLETION_TOKENS = 16


async def chat_completions(call: Call) -> None:
    """POST /v1/chat/completions."""
    call.check_model()
    choices = call.generations(chat_wishes(call.host, call.body))
    base = {"id": call.new_id("chatcmpl-"), "created": call.host.clock.unix_s(), "model": call.model}
    if call.body.get("stream"):
        await _stream(call, choices, {**base, "object": "chat.completion.chunk"}, _chat_delta, role_first=True)
        return
    answers = [_chat_choice(call, index, choice) for index, choice in enumerate(await finish_all(choices))]
    body = {
        **base,
        "object": "chat.completion",
        "choices": answers,
        "usage": usage(choices),
        "system_fingerprint": None,
    }
    await call.reply.json(body)


async def completions(call: Call) -> None:
    """POST /v1/completions; a list of prompts gives a choice for each."""
    call.check_model()
    choices = call.generations(completion_wishes(call.host, call.body))
    base = {"id": call.new_id("cmpl-"), "created": call.host.clock.unix_s(), "model": call.model}
    base["object"] = "text_completion"
    if call.body.get("stream"):
        await _stream(call, choices, base, _text_delta, role_first=False)
        return
    answers = [_text_choice(call, index, choice) for index, choice in enumerate(await finish_all(choices))]
    await call.reply.json({**base, "choices": answers, "usage": usage(choices)})


def chat_wishes(host: ModelHost, body: Mapping[str, Any]) -> list[Wish]:
    """The answers that a chat request asks for."""
    _check_stream_options(body)
    prompt = chat_prompt(host, body)
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    return [host.wish(body, prompt, asked, choice) for choice in range(_count(body))]


def completion_wishes(host: ModelHost, body: Mapping[str, Any]) -> list[Wish]:
    """The answers that a completion request asks for, `n` to each prompt."""
    _check_stream_options(body)
    asked = body.get("max_tokens", COMPLETION_TOKENS)
    count = _count(body)
    return [host.wish(body, prompt, asked, choice) for prompt in _prompts(body) for choice in range(count)]


def chat_prompt(host: ModelHost, body: Mapping[str, Any]) -> str:
    """The messages as the model reads them. Raises ApiError 400.

    A last message of the assistant is continued where the body asks for that; llama.cpp does so unasked.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ApiError(400, "messages: a list of at least one message is required", param="messages")
    goes_on = bool(body.get("continue_final_message"))
    if goes_on and body.get("add_generation_prompt"):
        raise ApiError(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    trailing = host.owned_by == "llamacpp" and messages[-1].get("role") == "assistant"
    return render(messages, continue_final=goes_on or trailing)


def usage(choices: Sequence[Generation]) -> dict[str, Any]:
    """What the choices cost, in tokens; the prompt is counted once for choices that share it."""
    prompt_tokens = choices[0].prompt_tokens
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": choices[0].cached_tokens},
    }


async def finish_all(choices: Sequence[Generation]) -> Sequence[Generation]:
    """Let the engine work on all choices at once, to their ends."""
    with ExitStack() as stack:
        for choice in choices:
            stack.enter_context(choice.running())
        for choice in choices:
            await choice.whole_text()
    return choices


async def _stream(
    call: Call, choices: Sequence[Generation], base: dict[str, Any], delta: Any, *, role_first: bool
) -> None:
    """Head, then a chunk for each piece in turn, the finish of each choice, usage where asked, [DONE]."""
    reply = call.reply
    with ExitStack() as stack:
        for choice in choices:
            stack.enter_context(choice.running())
        await reply.begin()
        open_choices = dict(enumerate(choices))
        fresh = set(open_choices) if role_first else set()
        while open_choices:
            for index, choice in list(open_choices.items()):
                piece = await choice.next_piece()
                if index in fresh:
                    fresh.remove(index)
                    role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                    await reply.data({**base, "choices": [{**role, "finish_reason": None}]})
                reason = choice.finish_reason
                if piece is None:
                    del open_choices[index]
                    if reason == "stop":
                        await _chunk(call, base, delta(index, "", reply.finish_reason(reason), choice.stop_reason))
                elif reason == "length":
                    await _chunk(call, base, delta(index, piece, reply.finish_reason(reason), None))
                else:
                    await _chunk(call, base, delta(index, piece, None, None))
        if (call.body.get("stream_options") or {}).get("include_usage"):
            await reply.data({**base, "choices": [], "usage": usage(choices)})
        await reply.last(b"data: [DONE]\n\n")
        await reply.finish()


async def _chunk(call: Call, base: dict[str, Any], choice: dict[str, Any]) -> None:
    await call.reply.data({**base, "choices": [choice]})


def _chat_delta(index: int, piece: str, reason: str | None, stop_reason: str | None) -> dict[str, Any]:
    delta = {"index": index, "delta": {"content": piece}, "logprobs": None, "finish_reason": reason}
    return {**delta, "stop_reason": stop_reason} if reason else delta


def _text_delta(index: int, piece: str, reason: str | None, stop_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": piece, "logprobs": None, "finish_reason": reason, "stop_reason": stop_reason}


def _chat_choice(call: Call, index: int, choice: Generation) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": []}
    reason = call.reply.finish_reason(choice.finish_reason)
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": choice.stop_reason,
    }


def _text_choice(call: Call, index: int, choice: Generation) -> dict[str, Any]:
    return _text_delta(index, choice.text, call.reply.finish_reason(choice.finish_reason), choice.stop_reason)


def _check_stream_options(body: Mapping[str, Any]) -> None:
    if body.get("stream_options") and not body.get("stream"):
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", param="stream_options")


def _count(body: Mapping[str, Any]) -> int:
    count = body.get("n")
    if count is None:
        return 1
    if not isinstance(count, int) or not 1 <= count <= 128:
        raise ApiError(400, f"n must be between 1 and 128, got {count}.", param="n")
    return count


def _prompts(body: Mapping[str, Any]) -> Iterable[str]:
    """One or several prompts, as text or token numbers."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, int) for one in prompt):
        return [from_token_ids(prompt)]
    if isinstance(prompt, list) and prompt:
        return [one if isinstance(one, str) else from_token_ids(one) for one in prompt]
    raise ApiError(400, "prompt: text or a list of token ids is required", param="prompt")
