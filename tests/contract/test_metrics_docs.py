"""docs/metrics.md names every metric of both programs, with its type and labels."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from balancer.metrics import Metrics
from node_agent.metrics import ReportCollector
from node_agent.report import GpuReport, HostReport, ModelReport, NodeReport, Quantiles
from tests.contract.markdown import PAGES, page, tables, ticked

DOCUMENT = page("docs/metrics.md")
ROWS = tables(DOCUMENT, "metric", "type", "labels", "unit", "meaning")
TOLD = {name: (kind, tuple(re.findall(r"`(\w+)`", labels) or labels.split())) for name, kind, labels, *_ in ROWS}

# The metrics that dashboards and alerts stand on: these names and labels change only on purpose.
CONTRACT = """
balancer_requests_total{model,endpoint,status,code} balancer_request_seconds balancer_time_to_first_token_seconds
balancer_inter_token_seconds balancer_overhead_seconds balancer_tokens_total{model,kind}
balancer_attempts_total{node,outcome} balancer_retries_total{reason} balancer_retry_budget_exhausted_total
balancer_hedges_total{won} balancer_resumes_total{outcome} balancer_node_requests_in_flight{node}
balancer_node_cost_seconds{node} balancer_node_state{node,state} balancer_breaker_state{node}
balancer_report_age_seconds{node} balancer_queue_depth{priority} balancer_queue_seconds balancer_shed_total{reason}
balancer_cache_lookups_total{result} balancer_cache_seconds{op} balancer_store_errors_total{op}
balancer_gpu_seconds_saved_total balancer_event_loop_lag_seconds
"""


def balancers() -> dict[str, tuple[str, tuple[str, ...]]]:
    return {metric.name: (metric.kind, metric.labels) for metric in Metrics().all()}


def filled(kind: type, **chosen: Any) -> Any:
    """A report of this kind in which nothing is unknown."""
    values = {int: 1, float: 1.0, bool: True, str: "x", Quantiles: Quantiles(p50=1.0, p99=2.0)}
    made: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        options = get_args(hint) or (hint,)
        plain = next((option for option in options if option in values), None)
        made[name] = values[plain] if plain is not None else ()
    return kind(**{**made, **chosen})


def agents() -> dict[str, tuple[str, tuple[str, ...]]]:
    node = filled(NodeReport, models=(ModelReport(id="m"),), problems=("clock_low",))
    gpu = filled(GpuReport, throttle_reasons=("sw_power_cap",), xid_recent=(13,), problems=("clock_low",))
    report = filled(HostReport, nodes=(node,), gpus=(gpu,))
    engine = SimpleNamespace(spec=SimpleNamespace(id="x"), visits={"ok": 1}, visit_s=0.1)
    sampler: Any = SimpleNamespace(report=lambda: report, engines=(engine,))
    pusher: Any = SimpleNamespace(url="http://b", pushes={"ok": 1})
    found = {}
    for family in ReportCollector(sampler, [pusher]).collect():
        assert family.samples, family.name
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, tuple(family.samples[0].labels))
    return found


def test_every_metric_of_the_balancer_is_told() -> None:
    told = {name: row for name, row in TOLD.items() if name.startswith("balancer_")}
    assert told == balancers()


def test_every_metric_of_the_agent_is_told() -> None:
    told = {name: row for name, row in TOLD.items() if name.startswith("node_agent_")}
    assert told == agents()


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert len(TOLD) == len(ROWS)
    for name, _, _, unit, meaning in ROWS:
        assert unit, name
        assert meaning.endswith("."), name


@pytest.mark.parametrize("promised", CONTRACT.split())
def test_metrics_that_dashboards_stand_on_keep_their_names_and_labels(promised: str) -> None:
    name, _, labels = promised.partition("{")
    assert name in balancers()
    if labels:
        assert balancers()[name][1] == tuple(labels.rstrip("}").split(","))


def test_metrics_named_in_other_documents_exist() -> None:
    known = balancers() | agents()
    for path in PAGES:
        for word in ticked(path.read_text(encoding="utf-8")):
            for name in re.findall(r"\b(?:balancer|node_agent)_[a-z_]+\b", word):
                plain = re.sub(r"_(bucket|count|sum)$", "", name)
                assert plain in known or not plain.endswith(("_total", "_seconds", "_bytes", "_state")), (
                    path.name,
                    name,
                )
