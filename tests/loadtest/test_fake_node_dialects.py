"""What the node answers in each dialect, and that every answer has the same text however it is asked for."""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from fake_node_client import CHAT, RawClient, chat, sse
from prometheus_client.parser import text_string_to_metric_families

from loadtest.dialects import ROUTES
from loadtest.embedding import likeness
from loadtest.engine_model import EngineModel, EngineSpec
from loadtest.fake_node import FakeNode
from loadtest.gpus import SimulatedGpus

COMPLETIONS = "/v1/completions"


async def ask(client: RawClient, body: Any, path: str = CHAT) -> Any:
    client.send(body, path)
    head, answer = await client.answer()
    return sse(answer) if b"event-stream" in head else json.loads(answer)


def chat_text(events: list[Any], index: int = 0) -> str:
    deltas = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in deltas if choice["index"] == index)


async def test_a_chat_stream_has_role_contents_finish_usage_and_done(node: FakeNode, client: RawClient) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    events = await ask(client, body)
    assert events[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(event["choices"][0]["delta"]["content"] for event in events[1:-3])
    assert events[-3]["choices"][0] | {"stop_reason": None} == {
        "index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop", "stop_reason": None,
    }  # fmt: skip
    assert events[-2]["choices"] == []
    usage = events[-2]["usage"]
    assert usage["completion_tokens"] == len(events) - 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert events[-1] == "[DONE]"
    assert len({(event["id"], event["object"], event["model"]) for event in events[:-1]}) == 1


async def test_a_stream_that_did_not_ask_for_usage_has_none(client: RawClient) -> None:
    events = await ask(client, chat(stream=True))
    assert all(event["choices"] and "usage" not in event for event in events[:-1])


@pytest.mark.parametrize(
    "fields", [{}, {"max_tokens": 5}, {"max_completion_tokens": 9}, {"stop": ["e", "the"]}, {"seed": 4}]
)
async def test_stream_and_unary_and_expectation_are_one_text(
    node: FakeNode, client: RawClient, fields: dict[str, Any]
) -> None:
    whole = await ask(client, chat(**fields))
    events = await ask(client, chat(stream=True, **fields))
    text = whole["choices"][0]["message"]["content"]
    assert text
    assert chat_text(events) == text == node.expected_text(chat(**fields))
    reasons = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == [whole["choices"][0]["finish_reason"]]
    if asked := fields.get("max_tokens") or fields.get("max_completion_tokens"):
        assert whole["usage"]["completion_tokens"] == asked
        assert whole["choices"][0]["finish_reason"] == "length"
    if "stop" in fields:
        assert whole["choices"][0]["stop_reason"] in fields["stop"]
        assert "e" not in text


async def test_what_changes_an_answer_changes_it_and_the_rest_does_not(node: FakeNode, client: RawClient) -> None:
    texts = {
        json.dumps(fields): (await ask(client, chat(**fields)))["choices"][0]["message"]["content"]
        for fields in (
            {},
            {"top_p": 0.5},
            {"seed": 1},
            {"tools": [{"type": "function"}]},
            {"user": "me"},
            {"temperature": 0},
        )
    }
    assert len(set(texts.values())) == 4
    assert texts["{}"] == texts['{"user": "me"}'] == texts['{"temperature": 0}']
    lucky = [node.expected_text(chat(temperature=0.7)) for _ in range(2)]
    assert lucky[0] != lucky[1]
    assert node.expected_text(chat(temperature=0.7, seed=3)) == node.expected_text(chat(temperature=0.7, seed=3))


async def test_another_node_gives_the_same_text(node: FakeNode) -> None:
    other = FakeNode(seed=99)
    assert node.expected_text(chat()) == other.expected_text(chat())


async def test_several_choices_each_have_their_end(client: RawClient) -> None:
    events = await ask(client, chat(n=3, stream=True))
    whole = await ask(client, chat(n=3))
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert [chat_text(events, index) for index in range(3)] == texts
    finished = [c["index"] for event in events[:-1] for c in event["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]


GO_ON = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(("owner", "flags"), [("vllm", GO_ON), ("sglang", GO_ON), ("llamacpp", {})])
async def test_a_chat_goes_on_exactly_where_its_text_was_cut(
    node: FakeNode, client: RawClient, owner: str, flags: dict[str, bool]
) -> None:
    node.spec = replace(node.spec, owned_by=owner)
    events = await ask(client, chat(stream=True))
    text, pieces = chat_text(events), len(events) - 3
    for cut in (1, 5, len(text) // 2, len(text) - 1, len(text)):
        body = chat(stream=True, **flags)
        body["messages"].append({"role": "assistant", "content": text[:cut]})
        rest = await ask(client, body)
        assert chat_text(rest) == text[cut:]
        assert rest[-2]["choices"][0]["finish_reason"] == "stop"
    assert pieces == (await ask(client, chat()))["usage"]["completion_tokens"]


async def test_a_message_of_the_assistant_that_is_not_to_be_continued_is_answered(
    node: FakeNode, client: RawClient
) -> None:
    text = chat_text(await ask(client, chat(stream=True)))
    body = chat()
    body["messages"].append({"role": "assistant", "content": text[:9]})
    assert not text.endswith((await ask(client, body))["choices"][0]["message"]["content"])


async def test_a_completion_goes_on_exactly_where_its_text_was_cut(client: RawClient) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}
    text = (await ask(client, body, COMPLETIONS))["choices"][0]["text"]
    tokens = [0, *itertools.accumulate(map(len, text.replace(" ", "\0 ").split("\0")[1:]))]
    for done in (1, 7, 29):
        cut = tokens[done]
        rest = await ask(
            client, {**body, "prompt": body["prompt"] + text[:cut], "max_tokens": 30 - done}, COMPLETIONS
        )  # fmt: skip
        assert rest["choices"][0]["text"] == text[cut:]
        assert rest["choices"][0]["finish_reason"] == "length"


async def test_completions_take_text_tokens_and_lists(client: RawClient) -> None:
    ids = (await ask(client, {"prompt": "Once"}, "/tokenize"))["tokens"]
    assert (await ask(client, {"tokens": ids}, "/detokenize"))["prompt"] == "Once"
    texts = []
    for prompt in ("Once", ids, ["Once"], [ids, ids]):
        answer = await ask(client, {"prompt": prompt}, COMPLETIONS)
        assert answer["usage"]["completion_tokens"] == 16 * len(answer["choices"])
        texts += [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 5
    assert len(set(texts)) == 1
    events = await ask(client, {"prompt": "Once", "stream": True}, COMPLETIONS)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == texts[0]


async def test_a_repeated_prompt_is_taken_from_the_prefix_cache(node: FakeNode, client: RawClient) -> None:
    for cached_tokens in (0, 256):
        answer = await ask(client, {"prompt": "x" * 1030, "max_tokens": 1}, COMPLETIONS)
        assert answer["usage"]["prompt_tokens"] == 258
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": cached_tokens}


async def test_messages_stream_and_unary_agree(node: FakeNode, client: RawClient) -> None:
    body = {"system": "be brief", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    body["max_tokens"] = 100
    whole = await ask(client, body, "/v1/messages")
    events = await ask(client, {**body, "stream": True}, "/v1/messages")
    kinds = [kind for kind, _ in itertools.groupby(event["type"] for event in events)]
    assert kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_stop",
                     "message_delta", "message_stop"]  # fmt: skip
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"] == node.expected_text(body, "/v1/messages")
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "end_turn"
    assert events[-2]["usage"] == whole["usage"]
    part = {**body, "messages": [*body["messages"], {"role": "assistant", "content": text[:9]}]}
    assert (await ask(client, part, "/v1/messages"))["content"][0]["text"] == text[9:]


@pytest.mark.parametrize(("limit", "end"), [(None, "completed"), (4, "incomplete")])
async def test_responses_stream_and_unary_agree(node: FakeNode, client: RawClient, limit: int | None, end: str) -> None:
    body = {"instructions": "be brief", "input": "hi", "max_output_tokens": limit}
    whole = await ask(client, body, "/v1/responses")
    events = await ask(client, {**body, "stream": True}, "/v1/responses")
    assert events[0]["type"] == "response.created"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == node.expected_text(body, "/v1/responses")
    assert (events[-1]["type"], whole["status"]) == (f"response.{end}", end)
    assert events[-1]["response"]["usage"] == whole["usage"]


@pytest.mark.parametrize(("limit", "reason"), [(100, "eos_token"), (6, "length")])
async def test_tgi_stream_and_unary_agree(node: FakeNode, client: RawClient, limit: int, reason: str) -> None:
    body = {"inputs": "Once upon", "parameters": {"max_new_tokens": limit, "details": True}}
    whole = await ask(client, body, "/generate")
    events = await ask(client, body, "/generate_stream")
    text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert text == whole["generated_text"] == events[-1]["generated_text"] == node.expected_text(body, "/generate")
    assert events[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"] == reason
    assert all(event["generated_text"] is None for event in events[:-1])


async def test_embeddings_are_unit_vectors_alike_for_like_texts(client: RawClient) -> None:
    texts = ["how do I reset my password", "how do I reset my passwords", "the weather in Oslo"]
    answer = await ask(client, {"input": texts}, "/v1/embeddings")
    one, like, other = (entry["embedding"] for entry in answer["data"])
    assert math.fsum(value * value for value in one) == pytest.approx(1.0)
    assert likeness(one, like) > 0.95
    assert likeness(one, other) < 0.75
    packed = await ask(client, {"input": texts[0], "encoding_format": "base64", "dimensions": 64}, "/v1/embeddings")
    floats = struct.unpack("<64f", base64.b64decode(packed["data"][0]["embedding"]))
    plain = await ask(client, {"input": texts[0], "dimensions": 64}, "/v1/embeddings")
    assert plain["data"][0]["embedding"] == pytest.approx(floats, abs=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
async def test_rerank_puts_the_best_first(client: RawClient, path: str) -> None:
    body = {"query": "red apples", "documents": ["blue whales", {"text": "red apple"}, "zzz"], "top_n": 2}
    results = (await ask(client, body, path))["results"]
    assert [result["index"] for result in results] == [1, 0]
    assert results[0]["relevance_score"] > results[1]["relevance_score"]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_score_pairs_one_with_many(client: RawClient, path: str) -> None:
    data = (await ask(client, {"text_1": "a cat", "text_2": ["a cat", "an ox"]}, path))["data"]
    assert data[0]["score"] == pytest.approx(1.0)
    assert data[1]["score"] < 0.99


async def test_the_smaller_dialects_answer(client: RawClient) -> None:
    assert len((await ask(client, {"input": "four more"}, "/pooling"))["data"][0]["data"]) == 3
    (entry,) = (await ask(client, {"input": "x"}, "/classify"))["data"]
    assert sum(entry["probs"]) == pytest.approx(1.0)
    (picture,) = (await ask(client, {"prompt": "a cat"}, "/v1/images/generations"))["data"]
    assert base64.b64decode(picture["b64_json"]).startswith(b"\x89PNG")
    client.send({"input": "say this", "response_format": "wav"}, "/v1/audio/speech")
    head, sound = await client.answer()
    assert b"content-type: audio/wav" in head
    assert len(sound) == 4096


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
async def test_audio_is_taken_as_a_form(client: RawClient, path: str) -> None:
    def form(sound: bytes) -> bytes:
        return (
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nsim-model\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + sound + b"\r\n--b--\r\n"
        )

    texts = []
    for sound in (b"\0\1", b"\0\1", b"\0\2"):
        client.send(form(sound), path, "content-type: multipart/form-data; boundary=b")
        texts.append(json.loads((await client.answer())[1])["text"])
    assert texts[0] == texts[1] != texts[2]
    client.send(b"nothing", path, "content-type: multipart/form-data; boundary=b")
    assert (await client.answer())[0].startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("path", "body", "status", "form"),
    [
        (CHAT, chat(model="other"), 404, "error"),
        ("/v1/embeddings", {"model": "other", "input": "x"}, 404, "error"),
        ("/v1/messages", {"model": "other", "messages": [], "max_tokens": 1}, 404, "type"),
        (CHAT, chat("x" * 200_000), 400, "error"),
        (CHAT, chat(max_tokens=0), 400, "error"),
        (CHAT, chat(max_tokens=-1), 400, "error"),
        (CHAT, chat(max_tokens="many"), 400, "error"),
        (CHAT, chat(n=0), 400, "error"),
        (CHAT, chat(continue_final_message=True, add_generation_prompt=True), 400, "error"),
        (CHAT, chat(stream_options={"include_usage": True}), 400, "error"),
        (CHAT, {"messages": []}, 400, "error"),
        (CHAT, b"{", 400, "error"),
        (CHAT, b"[]", 400, "error"),
        (COMPLETIONS, {}, 400, "error"),
        ("/v1/messages", chat(), 400, "type"),
        ("/generate", {"inputs": 3}, 422, "error_type"),
        ("/v1/responses", {"input": "x", "previous_response_id": "y"}, 404, "error"),
        ("/v1/nothing", {}, 404, "detail"),
        ("/v1/models", {}, 405, "detail"),
    ],
)
async def test_refusals_have_their_status_and_their_dialects_form(
    client: RawClient, path: str, body: object, status: int, form: str
) -> None:
    client.send(body, path)
    head, answer = await client.answer()
    assert int(head.split()[1]) == status
    assert form in json.loads(answer)
    client.get("/health")
    assert (await client.answer())[0].startswith(b"HTTP/1.1 200")


async def test_a_context_that_is_too_long_says_how_long_it_may_be() -> None:
    async with FakeNode(instant=True, max_context_tokens=100) as node:
        client = await RawClient.to(node)
        client.send(chat("x" * 300, max_tokens=50))
        error = json.loads((await client.answer())[1])["error"]
        assert "maximum context length is 100 tokens" in error["message"]
        assert (error["type"], error["code"]) == ("BadRequestError", 400)


async def test_a_node_with_a_key_asks_for_it_but_not_on_health() -> None:
    async with FakeNode(instant=True, api_key="secret") as node:
        client = await RawClient.to(node)
        for headers, status in (((), b"401"), (("authorization: Bearer secret",), b"200")):
            client.send(chat(), CHAT, *headers)
            assert (await client.answer())[0].split()[1] == status
        client.get("/health")
        assert (await client.answer())[0].split()[1] == b"200"


async def test_models_and_version_are_told(client: RawClient) -> None:
    for path, key in (("/v1/models", "data"), ("/v1/models/sim-model", "id"), ("/version", "version")):
        client.get(path)
        assert key in json.loads((await client.answer())[1])
    client.get("/v1/models/none")
    assert (await client.answer())[0].startswith(b"HTTP/1.1 404")


async def test_the_metrics_page_counts_in_vllms_names(node: FakeNode, client: RawClient) -> None:
    for _ in range(2):
        await ask(client, {"prompt": "x" * 1030, "max_tokens": 5}, COMPLETIONS)
    client.get("/metrics")
    head, page = await client.answer()
    assert b"\r\nx-simulated: 1\r\n" in head
    samples = {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }
    assert samples["vllm:num_requests_running", ""] == samples["vllm:num_requests_waiting", ""] == 0
    assert samples["vllm:kv_cache_usage_perc", ""] == 0
    assert samples["vllm:prompt_tokens_total", ""] == samples["vllm:prefix_cache_queries_total", ""] == 516
    assert samples["vllm:prompt_tokens_cached_total", ""] == samples["vllm:prefix_cache_hits_total", ""] == 256
    assert samples["vllm:generation_tokens_total", ""] == 10
    assert samples["vllm:request_success_total", "length"] == 2
    assert samples["vllm:num_preemptions_total", ""] == 0
    assert samples["vllm:cache_config_info", ""] == 1
    for name, count in (("time_to_first_token", 2), ("inter_token_latency", 8), ("e2e_request_latency", 2)):
        assert samples[f"vllm:{name}_seconds_count", ""] == samples[f"vllm:{name}_seconds_bucket", "+Inf"] == count


async def test_gpus_are_told_in_the_reports_form_and_can_be_made_ill(node: FakeNode, client: RawClient) -> None:
    client.get("/sim/gpus")
    head, body = await client.answer()
    assert b"\r\nx-simulated: 1\r\n" in head
    (gpu,) = json.loads(body)
    assert set(gpu) == {
        "uuid", "index", "name", "memory_used_bytes", "memory_total_bytes", "memory_used_by_others_bytes",
        "utilization_ratio", "temperature_celsius", "power_watts", "clock_sm_mhz", "throttle_reasons",
        "ecc_uncorrected_total", "remapped_rows_pending", "xid_recent", "pcie_width", "problems",
    }  # fmt: skip
    client.send({"index": 0, "temperature_celsius": 97, "problems": ["thermal_throttle"]}, "/sim/gpus")
    (gpu,) = json.loads((await client.answer())[1])
    assert (gpu["temperature_celsius"], gpu["problems"]) == (97, ["thermal_throttle"])
    client.send({"fever": True}, "/sim/gpus")
    assert (await client.answer())[0].startswith(b"HTTP/1.1 400")


def test_gpus_grow_warm_under_load() -> None:
    model, gpus = EngineModel(EngineSpec()), SimulatedGpus(1, now=0.0)
    (idle,) = gpus.read(model, 0.0)
    model.busy_s += 30.0
    (busy,) = gpus.read(model, 30.0)
    assert busy["utilization_ratio"] == 1.0
    assert busy["temperature_celsius"] > idle["temperature_celsius"] + 20
    assert busy["power_watts"] > idle["power_watts"]


def test_every_inference_path_of_the_data_port_has_its_dialect() -> None:
    assert {path for path, route in ROUTES.items() if route.method == "POST"} == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/rerank", "/score",
        "/v1/score", "/v1/messages", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech",
        "/v1/images/generations", "/tokenize", "/detokenize", "/generate", "/generate_stream", "/pooling", "/classify",
    }  # fmt: skip


@pytest.mark.real("openai")
async def test_the_openai_client_reads_every_answer(node: FakeNode) -> None:
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": "hello"}]
    async with openai.AsyncOpenAI(base_url=node.url + "/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="sim-model", messages=messages)
        stream = await client.chat.completions.create(model="sim-model", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        response = await client.responses.create(model="sim-model", input="hello")
        kinds = [
            event.type async for event in await client.responses.create(model="sim-model", input="hello", stream=True)
        ]
        assert (response.status, kinds[-1]) == ("completed", "response.completed")
        embedded = await client.embeddings.create(model="sim-model", input=["a", "b"])
        assert len(embedded.data[1].embedding) == 256
        assert [model.id async for model in client.models.list()] == ["sim-model"]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=messages)
