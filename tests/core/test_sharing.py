"""What balancers tell each other: what is said, how it is read, and what is believed of it as it ages."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.books import OTHERS_DECAY_S, Outstanding
from balancer.core.request import NodeId
from balancer.core.sharing import (
    FORGET_S,
    FRESH_S,
    MAX_BLOCKS,
    MAX_NODES,
    MAX_PEERS,
    MAX_PLACEMENTS,
    REFRESH_S,
    Peers,
    Said,
    Teller,
    decode,
    encode,
    node_key,
)

A, B = node_key(NodeId("a"), "http://a:1"), node_key(NodeId("b"), "http://b:1")
NOTHING = Outstanding()


def some(tokens: float, context: float = 0.0, requests: float = 1.0) -> Outstanding:
    return Outstanding(tokens=tokens, context=context, requests=requests)


# -- the message

counts = st.integers(0, 10**12)
figures = st.builds(Outstanding, tokens=counts, context=counts, requests=counts)
keys = st.sampled_from([A, B])
block_lists = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8).map(tuple)


@given(st.lists(st.tuples(keys, figures)), st.lists(st.tuples(keys, block_lists)), st.booleans())
def test_what_is_said_is_what_is_read(
    nodes: list[tuple[str, Outstanding]], placed: list[tuple[str, tuple[int, ...]]], leaving: bool
) -> None:
    assert decode(encode(Said(figures=nodes, placed=placed, leaving=leaving))) == Said(
        figures=nodes, placed=placed, leaving=leaving
    )


GOOD: dict[str, Any] = {"v": 1, "nodes": [[A, 1, 2, 3, 4]], "placed": [[A, "AAAAAAAAAAA="]], "leaving": False}


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert decode(orjson.dumps({**GOOD, "more": 1})) == decode(orjson.dumps(GOOD)) != None  # noqa: E711


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": "1"},
        {"leaving": 0},
        {"nodes": {}},
        {"nodes": [[A, 1, 2, 3]]},
        {"nodes": [[A, 1, 2, 3, -1]]},
        {"nodes": [[A, 1, 2, 1.5, 0]]},
        {"nodes": [[A, 1, 2, True, 0]]},
        {"nodes": [[A, 1, 2, 2**53, 0]]},
        {"nodes": [["a", 1, 2, 3, 4]]},
        {"nodes": [[5, 1, 2, 3, 4]]},
        {"nodes": [5]},
        {"nodes": [[A, 1, 2, 3, 4]] * (MAX_NODES + 1)},
        {"placed": None},
        {"placed": [[A, "AAAA"]]},
        {"placed": [[A, ""]]},
        {"placed": [[A, "AAAAAAAAAA!="]]},
        {"placed": [[A, 5]]},
        {"placed": [[A, "AAAAAAAAAAA="]] * (MAX_PLACEMENTS + 1)},
        {"placed": [[A, "A" * 12 * MAX_BLOCKS]]},
    ],
)
def test_anything_else_is_no_message(change: dict[str, Any]) -> None:
    assert decode(orjson.dumps(GOOD)) is not None
    assert decode(orjson.dumps({**GOOD, **change})) is None
    for missing in change:
        assert decode(orjson.dumps({key: value for key, value in GOOD.items() if key != missing})) is None


@given(st.binary())
def test_junk_is_no_message(junk: bytes) -> None:
    assert decode(junk) is None


def test_a_node_at_another_url_is_another_node() -> None:
    assert node_key(NodeId("a"), "http://a:1/") == A
    assert len({A, node_key(NodeId("a"), "http://a:2"), node_key(NodeId("b"), "http://a:1")}) == 3


# -- what is worth saying


def said_figures(teller: Teller, now: float, **nodes: Outstanding) -> dict[str, Outstanding] | None:
    said = teller.next(nodes, (), now)
    return None if said is None else dict(said.figures)


def test_what_changed_is_said_once() -> None:
    teller = Teller()
    assert said_figures(teller, 0.0, a=some(5), b=some(6)) == {"a": some(5), "b": some(6)}
    assert said_figures(teller, 0.2, a=some(5), b=some(7)) == {"b": some(7)}
    assert said_figures(teller, 0.4, a=some(5), b=some(7)) is None


def test_what_is_over_is_said_once() -> None:
    teller = Teller()
    said_figures(teller, 0.0, a=some(5))
    assert said_figures(teller, 0.2, a=some(0, 0, 0)) == {"a": NOTHING}
    assert said_figures(teller, 0.4, a=some(0, 0, 0)) is None


def test_what_has_not_changed_is_said_again_after_a_while() -> None:
    teller = Teller()
    said_figures(teller, 0.0, a=some(5))
    assert said_figures(teller, REFRESH_S, a=some(5)) == {"a": some(5)}


def test_who_has_nothing_to_say_says_so_now_and_then() -> None:
    teller = Teller()
    assert said_figures(teller, 0.0) == {}
    assert said_figures(teller, REFRESH_S / 2) is None
    assert said_figures(teller, REFRESH_S) == {}


def test_of_too_many_nodes_those_not_said_for_longest_come_first_and_all_get_their_turn() -> None:
    teller = Teller()
    fleet = {node_key(NodeId(str(n)), ""): some(n) for n in range(1, 2 * MAX_NODES)}
    heard: set[str] = set()
    for turn in range(2):
        said = teller.next(fleet, (), 0.2 * turn)
        assert said is not None
        assert len(said.figures) <= MAX_NODES
        assert heard.isdisjoint(dict(said.figures))
        heard |= dict(said.figures).keys()
    assert heard == fleet.keys()


def test_a_message_holds_the_newest_placements_and_is_bounded() -> None:
    placed = [(A, tuple(range(n, n + 100))) for n in range(MAX_PLACEMENTS + 5)]
    fleet = {node_key(NodeId(str(n)), ""): some(10**11, 10**11, 10**6) for n in range(MAX_NODES)}
    said = Teller().next(fleet, placed, 0.0)
    assert said is not None
    assert said.placed == placed[-MAX_BLOCKS // 100 :]
    assert len(encode(said)) < 96 * 1024
    assert decode(encode(said)) is not None


# -- what is believed


def test_figures_of_several_balancers_add_up() -> None:
    peers = Peers()
    assert peers.heard("one", [(A, some(100, 1000, 1)), (B, some(7))], 0.0)
    assert peers.heard("two", [(A, some(50, 500, 2))], 0.1)
    assert not peers.heard("two", [], 0.2)
    assert peers.together(A, 0.2) == some(150, 1500, 3)
    assert peers.together(B, 0.2) == some(7)
    assert peers.together("c", 0.2) == NOTHING


def test_a_newer_figure_takes_the_place_of_the_older_one() -> None:
    peers = Peers()
    peers.heard("one", [(A, some(100)), (B, some(7))], 0.0)
    peers.heard("one", [(A, some(40)), (B, NOTHING)], 0.2)
    assert peers.together(A, 0.2) == some(40)
    assert peers.together(B, 0.2) == NOTHING


def test_a_figure_that_is_not_repeated_fades_and_is_dropped() -> None:
    peers = Peers()
    peers.heard("one", [(A, some(100))], 0.0)
    assert peers.together(A, FRESH_S).tokens == 100
    assert peers.together(A, FRESH_S + 1.0).tokens == pytest.approx(100 * math.exp(-1.0 / OTHERS_DECAY_S))
    peers.heard("one", [], FORGET_S)
    assert peers.forget_silent(FORGET_S + 0.1) == []
    assert peers.together(A, FORGET_S + 0.1) == NOTHING
    assert len(peers) == 1, "it was heard"


def test_a_balancer_that_fell_silent_is_forgotten() -> None:
    peers = Peers()
    peers.heard("one", [(A, some(100))], 0.0)
    peers.heard("two", [(A, some(5))], 1.0)
    assert peers.forget_silent(FORGET_S) == []
    assert peers.forget_silent(FORGET_S + 0.1) == ["one"]
    assert peers.together(A, 1.0) == some(5)
    assert peers.silence_s(2.0) == {"two": 1.0}


def test_a_balancer_that_left_has_nothing() -> None:
    peers = Peers()
    peers.heard("one", [(A, some(100))], 0.0)
    assert peers.left("one")
    assert not peers.left("one")
    assert peers.together(A, 0.0) == NOTHING


def test_no_more_balancers_than_there_can_be_are_kept() -> None:
    peers = Peers()
    for number in range(MAX_PEERS + 10):
        peers.heard(str(number), [(A, some(1))], 0.0)
    assert len(peers) == MAX_PEERS
    assert peers.together(A, 0.0).tokens == MAX_PEERS


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.dictionaries(st.sampled_from("abc"), figures, max_size=3))))
def test_who_hears_everything_believes_what_is_true(steps: list[tuple[float, dict[str, Outstanding]]]) -> None:
    """Whatever changes when: after each period the listener's figures are the speaker's."""
    teller, peers, now = Teller(), Peers(), 0.0
    for step_s, truth in steps:
        now += step_s
        said = teller.next({key: figure for key, figure in truth.items() if figure != NOTHING}, (), now)
        if said is not None:
            peers.heard("one", said.figures, now)
        peers.forget_silent(now)
        for key in "abc":
            assert peers.together(key, now) == truth.get(key, NOTHING)


# -- what nodes have read


def so_far(read: float, tokens: float = 0.0) -> Outstanding:
    return Outstanding(tokens=tokens, context=tokens, requests=1.0 if tokens else 0.0, read=read)


def test_what_nodes_have_read_is_said_when_it_grew() -> None:
    teller = Teller()
    assert said_figures(teller, 0.0, a=so_far(100)) == {"a": so_far(100)}
    assert said_figures(teller, 0.2, a=so_far(100)) is None
    assert said_figures(teller, 0.4, a=so_far(150)) == {"a": so_far(150)}


def test_a_node_that_is_gone_is_said_to_have_nothing_once() -> None:
    teller = Teller()
    said_figures(teller, 0.0, a=so_far(100, tokens=5))
    assert said_figures(teller, 0.2) == {"a": NOTHING}
    assert said_figures(teller, 0.4) is None


def test_what_nodes_have_read_only_grows_whoever_comes_and_goes() -> None:
    peers = Peers()
    peers.heard("one", [(A, so_far(1000))], 0.0)
    assert peers.together(A, 0.0).read == 0, "that was before we knew of it"
    peers.heard("one", [(A, so_far(1500))], 0.2)
    peers.heard("two", [(A, so_far(7000))], 0.2)
    peers.heard("two", [(A, so_far(7100))], 0.4)
    assert peers.together(A, 0.4).read == 600
    peers.heard("one", [(A, so_far(0)), (A, so_far(10))], 0.6)  # the node was another one in between
    assert peers.together(A, 0.6).read == 610
    peers.left("two")
    peers.forget_silent(10.0)
    assert peers.together(A, 10.0).read == 610


def test_nodes_that_are_gone_are_forgotten() -> None:
    peers = Peers()
    peers.heard("one", [(A, so_far(0, tokens=5)), (B, so_far(0, tokens=6))], 0.0)
    peers.heard("one", [(A, so_far(9, tokens=5))], 0.1)
    peers.keep({B})
    assert peers.together(A, 0.1) == NOTHING
    assert peers.together(B, 0.1).tokens == 6
