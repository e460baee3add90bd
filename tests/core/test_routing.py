"""Routing as the balancer uses it: what is priced beside load, what is learned, and what is kept of each pick."""

from __future__ import annotations

import json
import math
from collections import Counter
from random import Random
from typing import Any

import pytest

from balancer.core.books import MIN_SAMPLES
from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.cost import CostPolicy, explained
from balancer.core.health import NodeReport
from balancer.core.node import Node, NodeConfig
from balancer.core.outcome import Outcome
from balancer.core.request import Dialect, Endpoint, InferenceRequest, NodeId, Tenant, TenantId, Wishes
from balancer.core.routing import PredictedRouting, PrefixRouting, Routing, Sessions, routing_of
from balancer.core.selection import UNEVEN_REQUESTS, Candidates, RoutingPolicy, sift

CHAT = Endpoint(path="/v1/chat/completions", name="chat", dialect=Dialect.OPENAI, streams=True, samples=True)
ACME = Tenant(id=TenantId("acme"))
NOW = 100.0
POLICY = RoutingPolicy()


def a_node(id_: str, **config: Any) -> Node:
    return Node(NodeConfig(url=f"http://{id_}:1", **config), NodeId(id_), Breaker(BreakerPolicy(), Random(id_)))


def request(text: str = "hello", *, tenant: Tenant = ACME, session: str | None = None) -> InferenceRequest:
    parsed = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 50}
    return InferenceRequest(
        id="r",
        endpoint=CHAT,
        tenant=tenant,
        wishes=Wishes(session=session),
        forward=(),
        head_lines=b"",
        target=b"/v1/chat/completions",
        model="m",
        body=json.dumps(parsed).encode(),
        usage_body=None,
        parsed=parsed,
        is_exact=True,
        stream=True,
        wants_usage=True,
        accepted_s=NOW,
        deadline_s=NOW + 60.0,
        http10=False,
    )


def among(*nodes: Node, now: float = NOW) -> Candidates:
    return sift(nodes, POLICY, now)


def served(
    routing: Routing, node: Node, asked: InferenceRequest, now: float, took_s: float = 0.1, cached: int | None = None
) -> None:
    """One request there from beginning to end."""
    sent = routing.dispatched(node, asked, now)
    node.load.begin()
    routing.first_token(node, sent, now + took_s)
    node.load.end()
    prompt_tokens = len(asked.body) // 4
    routing.ended(node, sent, asked, Outcome.OK, (prompt_tokens, 10, cached), now + took_s)


def warm(routing: Routing, *nodes: Node) -> None:
    """Each has shown the same pace."""
    for at in range(MIN_SAMPLES):
        for node in nodes:
            served(routing, node, request("x" * 4000), NOW - 50.0 + at)


def picked(routing: Routing, asked: InferenceRequest, *nodes: Node, now: float = NOW, rng: Random | None = None) -> str:
    node = routing.pick(among(*nodes, now=now), asked, now, rng or Random(1))
    assert node is not None
    return node.id


# Sessions


def test_a_session_goes_where_it_was_served_last() -> None:
    nodes = [a_node(f"n{at}") for at in range(4)]
    routing = PredictedRouting()
    warm(routing, *nodes)
    served(routing, nodes[2], request(session="s"), NOW)

    rng = Random(1)
    assert {picked(routing, request("another", session="s"), *nodes, rng=rng) for _ in range(50)} == {"n2"}
    assert len({picked(routing, request("another", session="other"), *nodes, rng=rng) for _ in range(50)}) == 4
    stranger = Tenant(id=TenantId("stranger"))
    assert len({picked(routing, request(session="s", tenant=stranger), *nodes, rng=rng) for _ in range(50)}) == 4


def test_a_session_is_a_price_and_never_a_duty() -> None:
    home, other = a_node("home"), a_node("other")
    routing = PredictedRouting()
    warm(routing, home, other)
    served(routing, home, request(session="s"), NOW - 1.0)
    for _ in range(10):
        routing.dispatched(home, request("y" * 40_000), NOW)

    assert picked(routing, request(session="s"), home, other) == "other"
    home.check_up = False
    assert picked(routing, request(session="s"), home, other) == "other"


def test_sessions_remembered_are_bounded_and_the_last_used_stay() -> None:
    sessions = Sessions(limit=3)
    for name in ("a", "b", "c", "a", "d"):
        sessions.went(ACME.id, name, NodeId(f"on-{name}"))

    assert len(sessions) == 3
    assert sessions.last(ACME.id, "a") == "on-a"
    assert sessions.last(ACME.id, "b") is None


# Labels and weights


def test_a_tenant_gets_nodes_with_the_labels_it_prefers_while_they_are_no_busier() -> None:
    near, far = a_node("near", labels={"zone": "a", "gpu": "h100"}), a_node("far", labels={"zone": "b"})
    tenant = Tenant(id=TenantId("acme"), prefer=(("zone", "a"),))
    routing = PredictedRouting()
    warm(routing, near, far)
    rng = Random(1)

    assert {picked(routing, request(tenant=tenant), near, far, rng=rng) for _ in range(50)} == {"near"}
    assert len({picked(routing, request(), near, far, rng=rng) for _ in range(50)}) == 2
    for _ in range(20):
        routing.dispatched(near, request("y" * 40_000), NOW)
    assert picked(routing, request(tenant=tenant), near, far, rng=rng) == "far"


def test_each_missing_label_costs_the_same() -> None:
    tenant = Tenant(id=TenantId("acme"), prefer=(("zone", "a"), ("gpu", "h100")))
    nodes = [a_node("both", labels={"zone": "a", "gpu": "h100"}), a_node("one", labels={"zone": "a"}), a_node("none")]
    routing = PredictedRouting(CostPolicy(label=2.0))
    asked = request(tenant=tenant)
    picked(routing, asked, *nodes)

    assert asked.picked is not None
    assert asked.picked.choice is not None
    told = {explanation.node: explanation.terms_s["labels"] for explanation in explained(asked.picked.choice)}
    assert told == {"both": 0.0, "one": 2.0, "none": 4.0}


def test_a_node_of_twice_the_weight_is_taken_until_it_costs_twice_as_much() -> None:
    light, heavy = a_node("light"), a_node("heavy", weight=2.0)
    routing = PredictedRouting(CostPolicy(decode=0, interference=0, late=0))
    warm(routing, light, heavy)
    counts: Counter[str] = Counter()
    rng = Random(1)
    for _ in range(300):
        asked = request("x" * 4000)
        asked.parsed["messages"][0]["content"] = f"{rng.random()}" + "x" * 4000  # type: ignore[index]
        node = routing.pick(among(light, heavy), asked, NOW, rng)
        assert node is not None
        routing.dispatched(node, asked, NOW)
        counts[node.id] += 1

    assert counts["heavy"] / counts["light"] == pytest.approx(2.0, rel=0.05)


# What is learned


def test_new_weights_keep_what_was_learned() -> None:
    slow, fast = a_node("slow"), a_node("fast")
    routing = PredictedRouting()
    for at in range(MIN_SAMPLES):
        served(routing, slow, request("x" * 4000), NOW - 50.0 + at, took_s=0.9)
        served(routing, fast, request("x" * 4000), NOW - 50.0 + at, took_s=0.1)
    pace = slow.books.s_per_token
    routing.configure(RoutingPolicy(cost=CostPolicy(session=9.0)))

    assert slow.books.s_per_token == pace
    assert picked(routing, request("z" * 4000), slow, fast) == "fast"
    asked = request(session="s")
    served(routing, slow, request(session="s"), NOW)
    assert picked(routing, asked, slow, fast) == "slow"  # at the new price


def test_what_an_engine_says_it_had_cached_corrects_the_pace() -> None:
    """A prompt believed to be held that was not: its time was for reading all of it."""
    node, other = a_node("a"), a_node("b")
    routing = PredictedRouting()
    warm(routing, node, other)
    honest = node.books.s_per_token
    for at in range(20):
        asked = request("w" * 40_000)
        routing.pick(among(node), asked, NOW + at, Random(1))
        asked.held_blocks = 39
        asked.work = asked.work or routing._work(asked)
        served(routing, node, asked, NOW + at, took_s=honest * len(asked.body) / 4, cached=0)

    assert node.books.s_per_token == pytest.approx(honest, rel=0.1)


def test_blocks_that_an_engine_had_dropped_are_believed_in_less() -> None:
    node, other = a_node("a"), a_node("b")
    routing = PredictedRouting()
    texts = [f"{at:04d}" + "w" * 4096 for at in range(300)]
    for at, text in enumerate(texts):
        served(routing, node, request(text), NOW + at, cached=0)
    believed = routing._index.blocks_of(node.id)
    for round_ in range(30):  # each time the engine has nothing of what it is believed to hold
        asked = request(texts[-1 - round_])
        routing.pick(among(node, other), asked, NOW + 1000 + round_, Random(1))
        served(routing, node, asked, NOW + 1000 + round_, cached=0)

    assert believed > 1000
    assert routing._index.blocks_of(node.id) < 0.1 * believed


def test_a_report_without_cached_tokens_changes_nothing() -> None:
    node = a_node("a")
    routing = PredictedRouting()
    for at in range(50):
        served(routing, node, request("w" * 4096), NOW + at, cached=None)

    assert routing._index._lanes[node.id].limit == routing._index._lanes[node.id].capacity


def report(node: Node, **figures: Any) -> NodeReport:
    return NodeReport(id=node.id, url=node.config.url, **figures)


def test_a_node_that_nobody_tells_of_does_not_look_idle_beside_those_that_tell() -> None:
    told = [a_node("a"), a_node("b")]
    silent = a_node("c")
    routing = PredictedRouting()
    warm(routing, *told, silent)
    for node, running in zip(told, (8.0, 4.0), strict=True):
        routing.reported(node, report(node, running=running, queue_depth=0.0), NOW, NOW)
    routing.reported(told[0], report(told[0], running=8.0, queue_depth=0.0), NOW + 1.0, NOW + 1.0)

    others = silent.books.others_now(NOW + 1.0)
    assert 4.0 < others.requests < 8.0
    assert silent.books.figures(NOW + 1.0).others_assumed
    assert math.isinf(silent.books.others_age_s(NOW + 1.0))


def test_an_old_report_fades_into_what_the_rest_of_the_fleet_has() -> None:
    fresh, old = a_node("a"), a_node("b")
    routing = PredictedRouting()
    warm(routing, fresh, old)
    routing.reported(old, report(old, running=40.0, queue_depth=0.0), NOW, NOW)
    for second in range(30):
        now = NOW + 1.0 + second
        routing.reported(fresh, report(fresh, running=6.0, queue_depth=0.0), now, now)

    assert old.books.others_now(NOW + 30.0).requests == pytest.approx(6.0, rel=0.05)
    routing.reported(old, report(old, running=2.0, queue_depth=0.0), NOW + 31.0, NOW + 31.0)
    assert old.books.others_now(NOW + 31.0).requests == 2.0
    assert not old.books.figures(NOW + 31.0).others_assumed


def test_a_report_without_running_requests_says_nothing_of_others() -> None:
    loaded, mute = a_node("a"), a_node("b")
    routing = PredictedRouting()
    warm(routing, loaded, mute)
    routing.reported(loaded, report(loaded, running=5.0), NOW, NOW)
    routing.reported(mute, report(mute), NOW + 1.0, NOW + 1.0)

    assert mute.books.others_now(NOW + 1.0).requests == pytest.approx(5.0, rel=0.5)


# One node


def test_where_one_node_serves_the_model_prompts_are_not_read() -> None:
    node = a_node("only")
    routing = PredictedRouting()
    asked = request("x" * 40_000)

    assert picked(routing, asked, node) == "only"
    assert asked.prompt is None
    sent = routing.dispatched(node, asked, NOW)
    assert (node.books.n, len(routing._index)) == (1, 0)
    assert sent is not None
    assert sent.tokens == pytest.approx(10_000, rel=0.02)


# The prefix rule


def test_the_prefix_rule_goes_to_the_holder_of_enough_of_the_prompt() -> None:
    nodes = [a_node(f"n{at}") for at in range(4)]
    routing = PrefixRouting()
    routing.dispatched(nodes[1], request("x" * 8000), NOW)
    nodes[1].load.rif = UNEVEN_REQUESTS

    assert picked(routing, request("x" * 8000 + "y" * 7000), *nodes) == "n1"
    assert picked(routing, request("x" * 8000 + "y" * 9500), *nodes) != "n1"  # less than half of it
    nodes[1].load.rif += 1
    assert picked(routing, request("x" * 8000), *nodes) != "n1"  # the fleet is uneven


def test_the_prefix_rule_finds_holders_in_a_large_fleet_and_passes_over_those_that_were_tried() -> None:
    nodes = [a_node(f"n{at:03d}") for at in range(100)]
    routing = PrefixRouting()
    for at in (40, 70):
        routing.dispatched(nodes[at], request("x" * 8000), NOW)
    rng = Random(1)
    asked = request("x" * 8000)
    first = picked(routing, asked, *nodes, rng=rng)
    asked.tried.add(NodeId(first))

    assert {first, picked(routing, asked, *nodes, rng=rng)} == {"n040", "n070"}


def test_the_prefix_rule_forgets_nodes_that_are_gone() -> None:
    nodes = [a_node(f"n{at}") for at in range(3)]
    routing = PrefixRouting()
    routing.dispatched(nodes[1], request("x" * 8000), NOW)
    routing.reported(nodes[1], report(nodes[1], kv_capacity_tokens=100_000.0), NOW, NOW)
    routing.forget(nodes[1].id)
    rng = Random(1)

    assert len({picked(routing, request("x" * 8000), *nodes, rng=rng) for _ in range(50)}) == 3


# What is kept of a pick


@pytest.mark.parametrize("name", ["predicted_cost", "least_outstanding", "prefix", "round_robin"])
def test_every_pick_says_who_was_there_and_who_got_it(name: Any) -> None:
    nodes = [a_node(f"n{at}") for at in range(3)]
    routing = routing_of(RoutingPolicy(policy=name))
    asked = request()
    asked.tried.add(nodes[0].id)
    node = routing.pick(among(*nodes), asked, NOW, Random(1))

    assert node in nodes[1:]
    pick = asked.picked
    assert pick is not None
    assert (pick.policy, pick.node, pick.at_s, tuple(pick.tried)) == (name, node.id, NOW, ("n0",))
    compared = pick.choice.nodes if pick.choice is not None else pick.compared
    assert {each.id for each in compared} == {"n1", "n2"}

    asked.tried.update(each.id for each in nodes)
    assert routing.pick(among(*nodes), asked, NOW, Random(1)) is None
    assert asked.picked is not None
    assert asked.picked.node is None


def test_a_pick_is_explained_later_by_what_was_known_then() -> None:
    nodes = [a_node(f"n{at}") for at in range(3)]
    routing = PredictedRouting()
    warm(routing, *nodes)
    routing.dispatched(nodes[0], request("y" * 40_000), NOW)
    asked = request("z" * 40_000, session="s")
    picked(routing, asked, *nodes)
    assert asked.picked is not None
    choice = asked.picked.choice
    assert choice is not None
    before = explained(choice)
    for _ in range(5):
        served(routing, nodes[1], request("later" * 1000), NOW + 5.0, took_s=30.0)

    assert explained(choice) == before
    assert before[-1].node == "n0"
    assert before[-1].terms_s["backlog"] > 0.1
    assert len(choice.work.blocks) == 0  # a long prompt's blocks are not kept
    assert all(told.cost_s == pytest.approx(sum(told.terms_s.values())) for told in before)


def test_the_weight_is_a_term_like_any_other() -> None:
    light, heavy = a_node("light"), a_node("heavy", weight=4.0)
    routing = PredictedRouting()
    warm(routing, light, heavy)
    heavy.books = light.books
    prices = {told.node: told for told in routing.prices([light, heavy], NOW)}

    assert prices[heavy.id].cost_s == pytest.approx(prices[light.id].cost_s / 4.0)
    assert prices[heavy.id].terms_s["weight"] < 0.0
    assert "weight" not in prices[light.id].terms_s


def test_policies_without_prices_have_none() -> None:
    assert list(routing_of(RoutingPolicy(policy="weighted")).prices([a_node("a")], NOW)) == []


def test_slow_start_is_a_price_on_growing_fast() -> None:
    warm_node, newcomer = a_node("warm"), a_node("new")
    routing = PredictedRouting()
    warm(routing, warm_node, newcomer)
    newcomer.ramp_from_s = NOW
    counts: Counter[str] = Counter()
    rng = Random(1)
    for at in range(20):
        node = routing.pick(among(warm_node, newcomer), asked := request(f"{at}" * 100), NOW, rng)
        assert node is not None
        routing.dispatched(node, asked, NOW)
        node.load.begin()
        counts[node.id] += 1

    assert 1 <= counts["new"] <= 3
    (told,) = [told for told in routing.prices([warm_node, newcomer], NOW) if told.node == newcomer.id]
    assert told.terms_s["slow_start"] > 0.0
    assert told.cost_s == pytest.approx(sum(told.terms_s.values()))
