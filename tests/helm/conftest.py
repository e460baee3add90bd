"""The chart as Helm renders it: `render(values)` gives a release, `refusal(values)` what Helm has against it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml
from rendered_chart import CHART_DIR, Refusal, Release, Render, Values


@pytest.fixture(scope="session")
def helm() -> ModuleType:
    """Helm as a library, or a skip that says why it is not there (it exists for Linux only)."""
    module = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed", exc_type=ImportError)
    try:
        module.helm_sdk_version()
    except (module.HelmLibraryError, OSError) as error:
        pytest.skip(f"helm-python-sdk does not load here: {error}")
    return module


@pytest.fixture(scope="session")
def chart(helm: ModuleType) -> Iterator[Any]:
    with helm.Chart.load(CHART_DIR) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render(chart: Any) -> Render:
    def rendered(values: Values | None = None, *, name: str = "lb", namespace: str = "inference") -> Release:
        files = chart.render(values or {}, name=name, namespace=namespace)
        notes = "".join(text for path, text in files.items() if path.endswith("NOTES.txt"))
        sources = [text for path, text in sorted(files.items()) if path.endswith(".yaml")]
        return Release([document for text in sources for document in yaml.safe_load_all(text) if document], notes)

    return rendered


@pytest.fixture
def refusal(helm: ModuleType, render: Render) -> Refusal:
    """What Helm says when it refuses `values`; fails when it takes them."""

    def said(values: Values) -> str:
        with pytest.raises(helm.HelmError) as caught:
            render(values)
        return str(caught.value)

    return said
