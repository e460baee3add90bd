"""The Prometheus text format as engines really write it."""

from __future__ import annotations

from agent_fakes import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from node_agent.exposition import first, mean, parse, peak, select, total, total_of


def test_name_that_is_a_prefix_of_another_name_is_not_mistaken_for_it() -> None:
    families = parse('queue 3\nqueue_by_reason{reason="deferred"} 9\n')
    assert total(families, ("queue",)) == 3


def test_missing_series_is_none_and_never_zero() -> None:
    assert total({}, ("queue",)) is None
    assert total_of({}, (("a",), ("b",))) is None
    assert peak({}, ("queue",)) is None
    assert mean({}, ("queue",)) is None


def test_zero_is_zero() -> None:
    assert total(parse("queue 0\n"), ("queue",)) == 0


def test_newest_name_goes_first() -> None:
    assert total(parse("new 1\nold 2\n"), ("new", "old")) == 1
    assert total(parse("old 2\n"), ("new", "old")) == 2


def test_data_parallel_ranks_are_summed_and_tensor_parallel_twins_counted_once() -> None:
    lines = [f'n{{dp_rank="{dp}",tp_rank="{tp}"}} {dp + 1}' for dp, tp in ((0, 0), (0, 1), (1, 2), (1, 3))]
    assert total(parse("\n".join(lines)), ("n",)) == 3


def test_breakdown_by_priority_is_not_added_to_its_total() -> None:
    families = parse('n{priority=""} 5\nn{priority="0"} 3\nn{priority="1"} 2\n')
    assert total(families, ("n",)) == 5
    assert total(parse('n{priority="0"} 3\nn{priority="1"} 2\n'), ("n",)) == 5


def test_selector_picks_one_label_value() -> None:
    families = parse('n{kind="waiting"} 2\nn{kind="active"} 6\n')
    assert [one.value for one in select(families, "n{kind=active}")] == [6]
    assert first(families, ("n{kind=none}",)) == []


def test_odd_lines_are_passed_over() -> None:
    text = (
        '# HELP n {odd}\n\nn{a="x"} abc\nn{a="y"} NaN\nn 4 1700000000\nn{ 5\n{a="b"} 3\nn{a="}, \\"quoted\\" {"} 1\r\n'
    )
    assert [one.value for one in parse(text)["n"]] == [4, 1]
    assert parse(text)["n"][1].labels == {"a": '}, "quoted" {'}


def test_only_wanted_series_are_kept() -> None:
    assert set(parse(golden("vllm"), lambda name: name == "vllm:num_requests_running")) == {"vllm:num_requests_running"}


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), st.floats(allow_nan=False), max_size=5))
def test_what_the_prometheus_client_writes_is_read_back(values: dict[str, float]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("n", "help", ["label"], registry=registry)
    for label, value in values.items():
        gauge.labels(label).set(value)
    read = parse(generate_latest(registry).decode()).get("n", [])
    assert {one.labels["label"]: one.value for one in read} == values
