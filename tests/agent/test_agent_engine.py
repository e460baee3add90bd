"""Visits to engines over real sockets."""

from __future__ import annotations

import asyncio

import pytest
from agent_fakes import FakeEngine, ManualClock, dead_url, fake_engine, golden, moved, watching

from node_agent.engine_http import MAX_BYTES
from node_agent.engine_sample import Model
from node_agent.engine_spec import parse
from node_agent.engine_state import EngineState
from node_agent.engine_visit import ScrapePolicy, page_urls, rest_s
from node_agent.processes import EngineProcesses

# For engines that never answer: how soon a question is given up does not matter then.
HASTY = ScrapePolicy(timeout_s=0.05)
OPENAI_MODELS = {"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": 32768}]}


async def visited(engine: FakeEngine, clock: ManualClock, options: str = "") -> EngineState:
    async with watching(engine, clock, options) as watch:
        await watch.begin_visit()
        return watch.state


async def test_vllm_is_known_by_its_metrics(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.answer("/version", {"version": "0.11.0"})
        engine.answer("/v1/models", OPENAI_MODELS)
        state = await visited(engine, clock)
    assert (state.kind, state.health, state.reachable) == ("vllm", "ok", True)
    assert state.sample is not None
    assert state.sample.running == 14
    assert state.facts.version == "0.11.0"
    assert state.facts.models == (Model(id="m", loaded=True, max_context_tokens=32768),)
    assert not state.simulated


async def test_trtllm_serve_is_found_at_its_own_path(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/prometheus/metrics", golden("trtllm"))
        engine.answer("/version", {"version": "1.2.0"})
        state = await visited(engine, clock)
    assert (state.kind, state.facts.version) == ("trtllm", "1.2.0")
    assert state.sample is not None
    assert state.sample.running == 11


async def test_llamacpp_is_read_with_its_slots_and_start_time(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/metrics", golden("llamacpp"), Process_Start_Time_Unix="950679013")
        engine.answer("/slots", [{"id": 0, "n_ctx": 1024, "is_processing": True, "n_prompt_tokens": 5}])
        engine.answer(
            "/props", {"build_info": "b6000", "total_slots": 1, "default_generation_settings": {"n_ctx": 1024}}
        )
        engine.answer("/v1/models", {"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx_train": 2048}}]})
        state = await visited(engine, clock)
    assert (state.kind, state.facts.version, state.facts.slots) == ("llamacpp", "b6000", 1)
    assert state.facts.models == (Model(id="tiny", loaded=True, max_context_tokens=1024),)
    assert state.sample is not None
    assert (state.sample.context_tokens, state.sample.start_time) == (5, 950679013)


async def test_llamacpp_without_a_metrics_page_is_known_by_its_models(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/metrics", {"error": {"code": 501}}, status=501)
        engine.answer("/v1/models", {"data": [{"id": "tiny", "owned_by": "llamacpp"}]})
        engine.answer("/slots", [{"id": 0, "n_ctx": 1024, "is_processing": True}])
        async with watching(engine, clock) as watch:
            for _ in range(2):
                await watch.begin_visit()
                clock.advance(1.0)
            assert watch.state.kind == "llamacpp"
            assert watch.state.sample is not None
            assert (watch.state.sample.running, watch.state.sample.queue_depth) == (1, None)


async def test_sglang_is_asked_for_loads_and_never_for_a_generation(clock: ManualClock) -> None:
    async with fake_engine("sglang") as engine:
        engine.answer("/v1/loads", {"loads": [{"num_waiting_uncached_tokens": 700, "max_running_requests": 48}]})
        engine.answer("/get_server_info", {"version": "0.5.4", "max_total_num_tokens": 1, "max_running_requests": 48})
        engine.answer("/v1/models", {"data": [{"id": "glm", "owned_by": "sglang", "max_model_len": 131072}]})
        async with watching(engine, clock, ",kind=sglang") as watch:
            await watch.begin_visit()
            state = watch.state
    assert state.sample is not None
    assert (state.sample.running, state.sample.waiting_prompt_tokens, state.sample.slots) == (8, 700, 48)
    assert (state.facts.version, state.facts.slots) == ("0.5.4", 48)
    assert not {"/health", "/health_generate"} & set(engine.asked)


async def test_tgi_tells_its_model_and_limits(clock: ManualClock) -> None:
    async with fake_engine("tgi") as engine:
        engine.answer(
            "/info",
            {
                "model_id": "bloom",
                "version": "3.3.0",
                "max_total_tokens": 4096,
                "max_concurrent_requests": 128,
                "max_batch_total_tokens": 60000,
            },
        )
        state = await visited(engine, clock)
    assert state.kind == "tgi"
    assert state.facts.models == (Model(id="bloom", loaded=True, max_context_tokens=4096),)
    assert (state.facts.slots, state.facts.kv_capacity_tokens, state.facts.version) == (128, 60000, "3.3.0")


async def test_triton_is_read_from_a_metrics_address_of_its_own(clock: ManualClock) -> None:
    async with fake_engine() as engine, fake_engine("triton") as metrics:
        engine.answer("/v2", {"name": "triton", "version": "2.49.0"})
        engine.answer("/v2/health/ready", b"")
        engine.answer(
            "/v2/repository/index", [{"name": "llm", "state": "READY"}, {"name": "old", "state": "UNAVAILABLE"}]
        )
        state = await visited(engine, clock, f",kind=triton,metrics={metrics.url}/metrics")
    assert state.sample is not None
    assert state.sample.running == 6
    assert state.facts.version == "2.49.0"
    assert state.facts.models == (Model(id="llm", loaded=True), Model(id="old", loaded=False))


async def test_triton_that_is_not_ready_is_failing(clock: ManualClock) -> None:
    async with fake_engine("triton") as engine:
        engine.answer("/v2/health/ready", b"", status=503)
        state = await visited(engine, clock, f",kind=triton,metrics={engine.url}/metrics")
    assert (state.health, state.reachable) == ("error", True)


async def test_ollama_lists_what_is_installed_and_what_is_loaded(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/api/version", {"version": "0.12.3"})
        engine.answer("/api/tags", {"models": [{"name": "llama3:8b"}, {"name": "qwen3:4b"}]})
        engine.answer("/api/ps", {"models": [{"name": "llama3:8b", "size_vram": 6 << 30, "context_length": 8192}]})
        state = await visited(engine, clock)
    assert (state.kind, state.facts.version) == ("ollama", "0.12.3")
    assert state.facts.models == (
        Model(id="llama3:8b", loaded=True, max_context_tokens=8192),
        Model(id="qwen3:4b", loaded=False),
    )
    assert state.sample is None  # it tells neither queue nor load: unknown, never 0


async def test_engine_of_an_unknown_kind_is_reachable_and_its_load_unknown(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        state = await visited(engine, clock)
    assert (state.kind, state.reachable, state.sample) == (None, True, None)
    assert state.facts.models is None


async def test_engine_that_is_loading_is_failing(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/health", {"error": {"message": "Loading model"}}, status=503)
        state = await visited(engine, clock)
    assert (state.health, state.reachable, state.detail) == ("error", True, "/health answered 503")


async def test_health_check_that_needs_a_key_is_an_answer(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/health", b"", status=401)
        assert (await visited(engine, clock)).health == "ok"


async def test_key_goes_to_the_engine_and_to_nobody_else(clock: ManualClock) -> None:
    async with fake_engine() as engine, fake_engine("vllm") as metrics:
        async with watching(engine, clock, f",metrics={metrics.url}/metrics", api_key="s3cret") as watch:
            await watch.begin_visit()
        assert {headers.get("Authorization") for _, headers in engine.headers} == {"Bearer s3cret"}
        assert {headers.get("Authorization") for _, headers in metrics.headers} == {None}


async def test_dead_engine_is_refused_and_the_reason_is_plain(clock: ManualClock) -> None:
    async with watching(await dead_url(), clock) as watch:
        await watch.begin_visit()
        assert (watch.state.health, watch.state.reachable) == ("refused", False)
        assert watch.state.detail.endswith("/health: connection refused")


async def test_engine_that_says_nothing_is_silent(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.held = {"/health": asyncio.Event(), "/metrics": asyncio.Event()}
        async with watching(engine, clock, policy=HASTY) as watch:
            await watch.begin_visit()
            assert (watch.state.health, watch.state.reachable) == ("silent", False)


async def test_engine_without_a_health_check_is_healthy_by_answering(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.pages.pop("/health")
        state = await visited(engine, clock)
    assert state.health == "ok"
    assert state.sample is not None


async def test_at_most_one_visit_is_under_way(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.held["/metrics"] = asyncio.Event()
        async with watching(engine, clock) as watch:
            first = watch.begin_visit()
            await engine.arrived.wait()
            assert watch.begin_visit() is first
            engine.held["/metrics"].set()
            await first
            assert engine.asked.count("/metrics") == 1
            assert watch.begin_visit() is not first


def test_slow_page_is_left_alone_for_longer() -> None:
    assert rest_s(0.01) == pytest.approx(0.02)
    assert rest_s(1.0) == 2.0
    assert rest_s(60.0) == 10.0


async def test_slow_page_is_read_less_often_but_health_is_not(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.held["/metrics"] = asyncio.Event()
        async with watching(engine, clock) as watch:
            visit = watch.begin_visit()
            await engine.arrived.wait()
            clock.advance(3.0)
            engine.held["/metrics"].set()
            await visit
            for _ in range(5):
                clock.advance(1.0)
                await watch.begin_visit()
            # One slow read, a rest of six seconds, none yet after it.
            assert (engine.asked.count("/metrics"), engine.asked.count("/health")) == (1, 6)
            clock.advance(1.0)
            await watch.begin_visit()
            assert engine.asked.count("/metrics") == 2
            assert watch.state.sample is not None


async def test_rare_facts_are_asked_rarely_and_again_after_a_restart(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.answer("/v1/models", OPENAI_MODELS)
        async with watching(engine, clock) as watch:
            for _ in range(10):
                await watch.begin_visit()
                clock.advance(1.0)
            assert engine.asked.count("/v1/models") == 1
            engine.answer("/metrics", moved(golden("vllm"), "process_start_time_seconds", 60))
            engine.answer("/v1/models", {"data": [{"id": "other"}]})
            first = watch.state.boot
            for _ in range(2):
                await watch.begin_visit()
                clock.advance(1.0)
            assert watch.state.boot != first
            assert watch.state.facts.models == (Model(id="other", loaded=True),)


async def test_restart_is_noticed_by_the_process(clock: ManualClock) -> None:
    found = [EngineProcesses(pids=frozenset({1}), identity="1-x"), EngineProcesses(pids=frozenset({2}), identity="2-y")]
    async with (
        fake_engine("vllm") as engine,
        watching(engine, clock, find_processes=lambda url: found.pop(0)) as watch,
    ):
        await watch.begin_visit()
        first = watch.state.boot
        clock.advance(10.0)
        await watch.begin_visit()
        assert first is not None
        assert watch.state.boot is not None
        assert watch.state.boot.id != first.id
        assert watch.processes is not None
        assert watch.processes.pids == {2}


async def test_engine_that_gives_way_to_another_kind_is_read_as_that(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch:
        await watch.begin_visit()
        clock.advance(1.0)
        engine.answer("/metrics", golden("sglang"))
        await watch.begin_visit()
        assert watch.state.kind == "sglang"
        assert watch.state.sample is not None
        assert watch.state.sample.running == 8


async def test_simulated_node_says_so_and_lists_its_gpus(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/metrics", golden("vllm"), X_Simulated="1")
        engine.answer("/sim/gpus", [{"uuid": "S"}])
        state = await visited(engine, clock)
    assert state.simulated
    assert state.simulated_gpus == ({"uuid": "S"},)


async def test_real_node_is_never_asked_for_simulated_gpus(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        await visited(engine, clock)
        assert "/sim/gpus" not in engine.asked


@pytest.mark.parametrize("body", [b"", b"\xff\xfe\x00", b"<html>", b"vllm:num_requests_running{ NaN\n" * 3, b"{}"])
async def test_odd_metrics_page_leaves_the_load_unknown(body: bytes, clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/metrics", body)
        state = await visited(engine, clock, ",kind=vllm")
    assert state.reachable
    assert state.sample is None or state.sample.running is None


@pytest.mark.parametrize("body", ["null", "[]", '{"data": null}', '{"data": [1, {"id": 3}]}', "not json"])
async def test_odd_model_list_ends_nothing(body: str, clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine:
        engine.answer("/v1/models", body)
        state = await visited(engine, clock)
    assert state.facts.models in (None, ())


async def test_redirect_is_not_followed(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, fake_engine("vllm") as elsewhere:
        engine.answer("/metrics", b"", status=302, Location=f"{elsewhere.url}/metrics")
        state = await visited(engine, clock)
        assert elsewhere.asked == []
    assert state.sample is None


async def test_what_answers_no_http_is_refused(clock: ManualClock) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server, watching(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", clock) as watch:
        await watch.begin_visit()
        assert (watch.state.health, watch.state.reachable) == ("refused", False)


async def test_page_without_end_is_no_metrics_page(clock: ManualClock) -> None:
    async with fake_engine() as engine:
        engine.answer("/metrics", golden("vllm").encode() + b"#" * MAX_BYTES)
        state = await visited(engine, clock, ",kind=vllm")
    assert (state.reachable, state.sample) == (True, None)


@pytest.mark.parametrize(
    ("options", "kind", "urls"),
    [
        ("", None, ("/metrics", "/prometheus/metrics")),
        ("", "vllm", ("/metrics",)),
        ("", "trtllm", ("/prometheus/metrics",)),
        ("", "triton", ("http://h:8002/metrics", "/metrics")),
        ("", "ollama", ()),
        (",metrics=http://m:9/x", "triton", ("http://m:9/x",)),
    ],
)
def test_metrics_page_is_looked_for_where_its_engine_has_it(
    options: str, kind: str | None, urls: tuple[str, ...]
) -> None:
    assert page_urls(parse(f"http://h:8000{options}"), kind) == urls


def test_triton_on_an_ipv6_address() -> None:
    assert page_urls(parse("http://[::1]:8000"), "triton")[0] == "http://[::1]:8002/metrics"


async def test_visit_that_fails_oddly_is_followed_by_the_next(clock: ManualClock) -> None:
    failures = [RuntimeError("odd")]

    def find(url: str) -> None:
        if failures:
            raise failures.pop()

    async with fake_engine("vllm") as engine, watching(engine, clock, find_processes=find) as watch:
        await watch.begin_visit()
        assert (watch.state.health, watch.state.reachable) == ("refused", False)
        clock.advance(1.0)
        await watch.begin_visit()
        assert (watch.state.health, watch.state.reachable) == ("ok", True)
        assert watch.visits == {"ok": 1, "error": 0, "refused": 1, "silent": 0}
