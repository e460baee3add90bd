"""Reading an agent's report, and judging it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.health import (
    DEGRADED_WEIGHT,
    OUT_PROBLEMS,
    HealthPolicy,
    HealthState,
    NodeReport,
    Verdict,
    assess,
    parse_report,
)
from balancer.errors import BadRequest

GOLDEN = Path(__file__).parent.parent / "contract" / "golden"
POLICY = HealthPolicy(recover_after_s=3.0)

# Reading


def host(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "host": "h", "boot_id": "b", "seq": 3, "age_s": 0.5, "nodes": [], "gpus": [], **changes}


def node(**changes: Any) -> dict[str, Any]:
    return host(nodes=[{"id": "n", "url": "http://n:1", **changes}])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("host_report_*.json")), ids=lambda path: path.stem)
def test_every_golden_report_is_understood(path: Path) -> None:
    golden = json.loads(path.read_bytes())

    report = parse_report(golden)

    assert (report.host, report.seq, report.drain) == (golden["host"], golden["seq"], golden["drain"])
    assert len(report.gpus) == len(golden["gpus"])
    for read, told in zip(report.nodes, golden["nodes"], strict=True):
        assert (read.id, read.url) == (told["id"], told["url"])
        for name in ("queue_depth", "running", "kv_usage_ratio", "gpu_memory_utilization", "healthy", "wedged"):
            assert getattr(read, name) == told[name]
        assert read.problems == tuple(told["problems"])
        assert read.models == (None if told["models"] is None else tuple(m["id"] for m in told["models"]))


NUMBERS = ["queue_depth", "running", "slots", "kv_usage_ratio", "avg_latency_seconds", "gpu_memory_utilization"]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_not_known_is_not_zero(name: str) -> None:
    assert getattr(parse_report(node(**{name: None})).nodes[0], name) is None
    assert getattr(parse_report(node()).nodes[0], name) is None
    assert getattr(parse_report(node(**{name: 0})).nodes[0], name) == 0.0


def test_models_that_are_not_known_are_not_none_at_all() -> None:
    assert parse_report(node(models=None)).nodes[0].models is None
    assert parse_report(node(models=[])).nodes[0].models == ()
    assert parse_report(node(models=[{"id": "m"}, {"loaded": True}])).nodes[0].models == ("m",)


def test_unknown_fields_are_ignored() -> None:
    report = parse_report(host(shiny={"a": 1}, nodes=[{"id": "n", "url": "u", "quantum": [1]}], gpus=[{"x": 1}]))

    assert report.nodes[0].id == "n"


def test_a_report_may_leave_out_all_but_its_version() -> None:
    report = parse_report({"version": 1})

    assert (report.nodes, report.gpus, report.drain, report.age_s, report.interval_s) == ((), (), False, 0.0, 1.0)


def test_an_age_is_never_negative() -> None:
    assert parse_report(host(age_s=-5.0)).age_s == 0.0


@pytest.mark.parametrize("data", [None, [], "x", 1, {}, {"version": 2}, {"version": "1"}, {"version": None}])
def test_another_version_is_refused(data: Any) -> None:
    with pytest.raises(BadRequest):
        parse_report(data)


@pytest.mark.parametrize(
    ("report", "name"),
    [
        *[(node(**{name: value}), name) for name in NUMBERS for value in ("1", True, [1], {})],
        *[(host(**{name: value}), name) for name in ("seq", "age_s", "interval_s") for value in ("1", False, [])],
        *[(host(**{name: value}), name) for name in ("host", "boot_id") for value in (1, ["x"])],
        *[(host(**{name: value}), name) for name in ("drain", "simulated") for value in (1, "true")],
        *[(host(**{name: value}), name) for name in ("nodes", "gpus") for value in ({}, 1, "x", [1], [None])],
        *[(node(**{name: value}), name) for name in ("healthy", "wedged") for value in (0, "false")],
        *[(node(**{name: value}), name) for name in ("id", "url", "engine") for value in (1, {})],
        *[(node(problems=value), "problems") for value in ("gpu_lost", 1, [1], [["gpu_lost"]])],
        *[(node(models=value), "models") for value in ("m", {}, ["m"], 1)],
        (node(models=[{"id": 1}]), "id"),
    ],
)
def test_a_wrong_type_is_refused_by_its_name(report: dict[str, Any], name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_report(report)

    assert refused.value.param == name


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from([*host(), "drain", "simulated", "interval_s"]), ANYTHING),
    st.dictionaries(st.sampled_from([*NUMBERS, "id", "url", "models", "problems", "healthy", "wedged"]), ANYTHING),
)
def test_a_report_is_read_or_refused_and_nothing_else(top: dict[str, Any], inner: dict[str, Any]) -> None:
    for report in ({"version": 1, **top}, {"version": 1, "nodes": [inner]}):
        try:
            parse_report(report)
        except BadRequest:
            pass


# Judging


def report(*problems: str, healthy: bool | None = True) -> NodeReport:
    return NodeReport(id="n", url="u", problems=problems, healthy=healthy)


OK, SLOW, DEAD = report(), report("thermal_throttle"), report("gpu_lost", healthy=False)


@pytest.mark.parametrize("problem", sorted(OUT_PROBLEMS))
def test_a_node_that_cannot_answer_rightly_is_out_at_once(problem: str) -> None:
    state = assess(report(problem, "clock_low"), HealthState(verdict=Verdict.OK), POLICY, 0.0)

    assert (state.verdict, state.reasons) == (Verdict.OUT, (problem,))


DEGRADING = ["ecc_uncorrected", "row_remap_pending", "thermal_throttle", "power_brake", "clock_low", "pcie_degraded"]


@pytest.mark.parametrize("problem", [*DEGRADING, "memory_pressure", "foreign_memory", "xid_application", "news_to_us"])
def test_any_other_problem_costs_weight(problem: str) -> None:
    state = assess(report(problem), HealthState(), POLICY, 0.0)

    assert (state.verdict, state.reasons, state.weight) == (Verdict.DEGRADED, (problem,), DEGRADED_WEIGHT)


def test_an_agent_that_calls_its_node_unhealthy_is_believed_whatever_its_reasons() -> None:
    assert assess(report(healthy=False), HealthState(), POLICY, 0.0).reasons == ("unhealthy",)
    for problems in (("news_to_us",), ("thermal_throttle",), ("engine_error",)):
        state = assess(report(*problems, healthy=False), HealthState(), POLICY, 0.0)
        assert (state.verdict, state.reasons) == (Verdict.OUT, problems)


def test_no_problem_is_ok_whether_the_agent_says_so_or_not() -> None:
    for healthy in (True, None):
        state = assess(report(healthy=healthy), HealthState(), POLICY, 0.0)
        assert state == HealthState(verdict=Verdict.OK)
        assert state.weight == 1.0


def judged(*steps: tuple[float, NodeReport]) -> list[Verdict]:
    state = HealthState()
    verdicts = []
    for now, one in steps:
        state = assess(one, state, POLICY, now)
        verdicts.append(state.verdict)
    return verdicts


def test_a_first_report_is_believed_at_once() -> None:
    assert [judged((0.0, one))[0] for one in (OK, SLOW, DEAD)] == [Verdict.OK, Verdict.DEGRADED, Verdict.OUT]


def test_a_verdict_worsens_at_once() -> None:
    assert judged((0.0, OK), (0.1, SLOW), (0.2, DEAD)) == [Verdict.OK, Verdict.DEGRADED, Verdict.OUT]


def test_a_verdict_improves_after_three_seconds_of_better_reports() -> None:
    steps = [(0.0, DEAD), (1.0, OK), (2.0, OK), (3.9, OK), (4.0, OK)]

    assert judged(*steps) == [Verdict.OUT] * 4 + [Verdict.OK]


def test_one_bad_report_between_begins_the_wait_anew() -> None:
    steps = [(0.0, DEAD), (1.0, OK), (3.0, DEAD), (4.0, OK), (6.9, OK), (7.0, OK)]

    assert judged(*steps) == [Verdict.OUT] * 5 + [Verdict.OK]


def test_it_improves_to_what_the_latest_report_says() -> None:
    steps = [(0.0, DEAD), (1.0, OK), (2.0, SLOW), (4.0, SLOW), (5.0, OK), (8.0, OK)]

    assert judged(*steps) == [Verdict.OUT] * 3 + [Verdict.DEGRADED] * 2 + [Verdict.OK]


def test_reasons_of_the_same_verdict_follow_the_reports() -> None:
    state = assess(report("clock_low"), HealthState(), POLICY, 0.0)
    state = assess(report("power_brake"), state, POLICY, 1.0)

    assert state.reasons == ("power_brake",)


def test_while_it_improves_it_keeps_its_reasons() -> None:
    state = assess(OK, assess(DEAD, HealthState(), POLICY, 0.0), POLICY, 1.0)

    assert (state.verdict, state.reasons, state.improving_since_s) == (Verdict.OUT, ("gpu_lost",), 1.0)


RANK = {Verdict.UNKNOWN: 0, Verdict.OK: 0, Verdict.DEGRADED: 1, Verdict.OUT: 2}


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 1.0, 2.9, 3.0]), st.sampled_from([OK, SLOW, DEAD])), max_size=40))
def test_no_verdict_is_better_than_a_report_of_the_last_three_seconds(steps: list[tuple[float, NodeReport]]) -> None:
    state = HealthState()
    now = 0.0
    seen: list[tuple[float, int]] = []
    for pause_s, one in steps:
        now += pause_s
        seen.append((now, RANK[assess(one, HealthState(), POLICY, now).verdict]))
        state = assess(one, state, POLICY, now)

        # the wait begins with the first better report, so what is older than that and three seconds is over
        recent = [rank for at, rank in seen if now - at < POLICY.recover_after_s - 1e-9]
        assert RANK[state.verdict] >= min(recent)
        assert RANK[state.verdict] >= seen[-1][1]
        assert (state.improving_since_s is None) == (RANK[state.verdict] == seen[-1][1])
