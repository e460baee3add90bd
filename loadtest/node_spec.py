"""The settings of a fake node, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

from loadtest.engine_model import EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec(EngineSpec):
    """One node: its engine, and what stands around it."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one, kept over refuse and come_back
    control_port: int | None = None  # a second listener for /sim, which no fault touches; 0: any free one
    models: tuple[str, ...] = ("sim-model",)
    owned_by: str = "vllm"  # the engine, as /v1/models tells it; llamacpp continues a chat as that does
    speed: float = 1.0  # divides all times of the engine
    seed: int = 0  # of ids, of answers at a temperature above 0, of faults with a probability
    max_context_tokens: int = 32_768
    shortest_answer: int = 24  # words of an answer that nothing else ends
    longest_answer: int = 64
    embedding_dimensions: int = 256
    gpus: int = 1
    api_key: str | None = None  # asked for on /v1 paths when set
    keep_requests: int = 20_000  # how many are recorded; older ones are dropped


def spec_from_args(arguments: Sequence[str] | None = None) -> NodeSpec:
    """The node that the command line asks for: an option for each field of NodeSpec, `--model NAME` any times."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.fake_node", description="A GPU node to break on purpose.")
    parser.add_argument("--model", action="append", dest="models", metavar="NAME")
    for entry in fields(NodeSpec):
        option = "--" + entry.name.replace("_", "-")
        if entry.name == "instant":
            parser.add_argument(option, action="store_true")
        elif entry.name != "models":
            assert entry.default is not MISSING
            kind = {"control_port": int, "api_key": str}.get(entry.name, type(entry.default))
            parser.add_argument(option, type=kind, default=entry.default, help="(default: %(default)s)")
    chosen = vars(parser.parse_args(arguments))
    models = tuple(chosen.pop("models") or NodeSpec().models)
    return NodeSpec(**chosen, models=models)
