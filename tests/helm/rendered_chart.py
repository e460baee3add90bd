"""A chart rendered: the objects of a release, and short ways to those that tests ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART_DIR = REPOSITORY / "helm"

Values = dict[str, Any]
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Release:
    """What one `helm install` would send to the cluster, and the text it would print."""

    manifests: list[Manifest]
    notes: str

    def all(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Manifest:
        """The only object of that kind; with `suffix`, the only one whose name ends in it."""
        found = [manifest for manifest in self.all(kind) if manifest["metadata"]["name"].endswith(suffix)]
        assert len(found) == 1, f"{len(found)} of {kind}{suffix}: {[m['metadata']['name'] for m in found]}"
        return found[0]

    def pod(self, kind: str) -> Manifest:
        return self.one(kind)["spec"]["template"]["spec"]

    def container(self, kind: str) -> Manifest:
        (container,) = self.pod(kind)["containers"]
        return container

    def environment(self, kind: str) -> dict[str, Any]:
        return {
            entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in self.container(kind).get("env", [])
        }

    def config(self) -> Values:
        """The settings file as the balancer will read it."""
        return yaml.safe_load(self.config_text())

    def config_text(self) -> str:
        return self.one("ConfigMap")["data"]["balancer.yaml"]


# render(values, name=…, namespace=…)
Render = Callable[..., Release]
# What Helm says when it refuses the values.
Refusal = Callable[[Values], str]
