"""Which nodes hold which prefix, and what they are no longer believed to hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.prefix_index import DEFAULT_KV_BLOCKS, KEPT_SHARE, PrefixIndex
from balancer.core.request import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def test_a_node_holds_the_leading_blocks_it_was_sent() -> None:
    index = PrefixIndex()
    index.placed(A, (1, 2, 3), 0.0)
    index.placed(B, (1, 2), 0.0)
    index.placed(C, (9,), 0.0)

    assert index.held((1, 2, 3, 4)) == {A: 3, B: 2}
    assert index.held((1, 7, 3)) == {A: 1, B: 1}
    assert index.held((2, 3)) == {A: 2, B: 1}  # chained blocks never come so; it only has to stop
    assert index.held((7, 1)) == {}
    assert index.held(()) == {}


def test_levels_name_the_deepest_holders_last() -> None:
    index = PrefixIndex()
    index.placed(A, (1, 2, 3), 0.0)
    index.placed(B, (1, 2), 0.0)

    assert index.levels((1, 2, 3, 4)) == [(0b11, 2), (0b01, 3)]
    assert index.deepest(index.levels((1, 2, 3)), 4, 0.0) == [A, B]
    assert index.deepest(index.levels((1, 2, 3)), 1, 0.9) == [A]


def test_among_equal_holders_each_gets_its_turn() -> None:
    index = PrefixIndex()
    names = [NodeId(str(at)) for at in range(10)]
    for name in names:
        index.placed(name, (1,), 0.0)
    named = {index.deepest(index.levels((1,)), 1, at / 10)[0] for at in range(10)}

    assert named == set(names)
    assert len(index.deepest(index.levels((1,)), 4, 0.8)) == 4


def test_a_restarted_node_holds_nothing() -> None:
    index = PrefixIndex()
    index.placed(A, (1, 2), 0.0)
    index.placed(B, (1,), 0.0)
    index.forget(A)
    index.forget(C)

    assert index.held((1, 2)) == {B: 1}
    assert len(index) == 1
    index.placed(C, (1, 2), 0.0)  # in A's place
    assert index.held((1, 2)) == {B: 1, C: 2}


def test_forgetting_all_leaves_nothing() -> None:
    index = PrefixIndex()
    for name in (A, B, C):
        index.placed(name, range(100), 0.0)
    for name in (A, B, C):
        index.forget(name)

    assert (len(index), index.bits, index._names, index._lanes) == (0, {}, [], {})


def test_what_was_used_longest_ago_is_dropped_and_a_prompts_end_before_its_head() -> None:
    index = PrefixIndex()
    index.resize(A, 10 / KEPT_SHARE)
    index.placed(A, (1, 2, 3, 4), 0.0)
    index.placed(A, (11, 12, 13, 14), 1.0)
    index.placed(A, (1, 2), 2.0)
    index.placed(A, (21, 22, 23, 24), 3.0)

    assert index.held((1, 2, 3, 4)) == {A: 2}
    assert index.held((11, 12, 13, 14)) == index.held((21, 22, 23, 24)) == {A: 4}
    assert index.blocks_of(A) == 10


def test_a_smaller_cache_drops_at_once() -> None:
    index = PrefixIndex()
    index.placed(A, range(100), 0.0)
    index.resize(A, 50)

    assert index.blocks_of(A) == 45
    assert index.held(range(100)) == {A: 45}


def test_memory_is_flat_however_many_prompts_come() -> None:
    index = PrefixIndex()
    for at in range(20_000):
        index.placed(A, range(at * 5, at * 5 + 5), float(at))

    assert index.blocks_of(A) == len(index) <= DEFAULT_KV_BLOCKS * KEPT_SHARE


def test_a_prompt_longer_than_the_cache_leaves_its_head() -> None:
    index = PrefixIndex()
    index.resize(A, 20)
    index.placed(A, range(1000), 0.0)

    assert index.held(range(1000))[A] == index.blocks_of(A) == 18


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["placed", "placed", "placed", "forget", "resize"]),
            st.sampled_from([A, B, C]),
            st.integers(0, 5),
            st.integers(1, 40),
        ),
        max_size=60,
    )
)
def test_bounds_and_sets_hold_whatever_happens(steps: list[tuple[str, NodeId, int, int]]) -> None:
    index = PrefixIndex()
    limits = dict.fromkeys((A, B, C), DEFAULT_KV_BLOCKS)
    seen: dict[NodeId, set[int]] = {A: set(), B: set(), C: set()}
    for name, node, stem, size in steps:
        blocks = [1000 * stem + at for at in range(size)]
        if name == "placed":
            index.placed(node, blocks, 0.0)
            seen[node].update(blocks)
            assert index.held(blocks)[node] == min(size, max(1, int(KEPT_SHARE * limits[node])))
        elif name == "forget":
            index.forget(node)
            seen[node].clear()
            limits[node] = DEFAULT_KV_BLOCKS
        else:
            index.resize(node, size)
            limits[node] = size
        for one in (A, B, C):
            assert index.blocks_of(one) <= max(1, KEPT_SHARE * limits[one])
        assert len(index) <= sum(index.blocks_of(one) for one in (A, B, C))
        for at in range(6):
            chain = [1000 * at + step for step in range(40)]
            for one, held in index.held(chain).items():
                assert set(chain[:held]) <= seen[one]
            assert index.held(chain) == _by_levels(index, chain)


def _by_levels(index: PrefixIndex, chain: Sequence[int]) -> dict[NodeId, int]:
    """The same, asked block by block."""
    found: dict[NodeId, int] = {}
    for node, lane in index._lanes.items():
        held = 0
        while held < len(chain) and chain[held] in lane.blocks:
            held += 1
        if held:
            found[node] = held
    return found


@pytest.mark.parametrize("count", [1, 70])
def test_levels_shrink_and_deepen(count: int) -> None:
    index = PrefixIndex()
    for at in range(count):
        index.placed(NodeId(str(at)), range(at + 1), 0.0)
    levels = index.levels(range(100))

    assert [depth for _, depth in levels] == list(range(1, count + 1))
    for (wider, _), (narrower, _) in pairwise(levels):
        assert narrower & ~wider == 0
