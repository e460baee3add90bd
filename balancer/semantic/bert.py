"""Sentence embeddings in this process: a small BERT (such as all-MiniLM-L6-v2) as a NumPy forward pass.

A folder holds `config.json`, `vocab.txt` and `model.safetensors`. One question takes some milliseconds of one core.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from balancer.semantic.wordpiece import WordPiece

Array = npt.NDArray[np.float32]

# A question longer than this is no case for a semantic hit; the models are trained on 128 to 256 pieces.
MAX_PIECES = 256
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8")}
# Abramowitz and Stegun 7.1.26: erf to 1.5e-7.
_ERF_P = 0.3275911
_ERF_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class Bert:
    """BERT's encoder, mean over the pieces, length one. Raises ValueError for a folder that is not one."""

    def __init__(self, folder: Path) -> None:
        try:
            config = orjson.loads((folder / "config.json").read_bytes())
            if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
                raise ValueError("config.json: not a BERT with gelu")
            self._heads = int(config["num_attention_heads"])
            self._layers = int(config["num_hidden_layers"])
            self._epsilon = float(config["layer_norm_eps"])
            self.dimensions = int(config["hidden_size"])
            self._pieces = WordPiece(folder / "vocab.txt", max_pieces=MAX_PIECES)
            self._weights = read_safetensors(folder / "model.safetensors")
            self._forward([0, 1])  # every weight is there and has its shape
        except (OSError, KeyError, TypeError, orjson.JSONDecodeError) as error:
            raise ValueError(f"{folder}: {type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        return f"<Bert dimensions={self.dimensions} layers={self._layers}>"

    def embed(self, text: str) -> Array | None:
        """The text's direction, float32, length 1; None for text that the vocabulary cannot read."""
        ids = self._pieces.encode(text)
        return None if ids is None else self._forward(ids)

    def _forward(self, ids: list[int]) -> Array:
        weights = self._weights
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for number in range(self._layers):
            x = self._layer(x, f"encoder.layer.{number}")
        mean = x.mean(0)
        return np.asarray(mean / np.linalg.norm(mean), np.float32)

    def _layer(self, x: Array, name: str) -> Array:
        query, key, value = (
            self._linear(x, f"{name}.attention.self.{part}").reshape(len(x), self._heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = (scores @ value).transpose(1, 0, 2).reshape(len(x), -1)
        x = self._norm(x + self._linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        wide = _gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"], np.float32)

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self._epsilon))
        return np.asarray(centred / scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"], np.float32)


def _gelu(x: Array) -> Array:
    magnitude = np.asarray(np.abs(x) / np.float32(math.sqrt(2)), np.float32)
    t: Array = np.asarray(1 / (1 + np.float32(_ERF_P) * magnitude), np.float32)
    series: Array = np.zeros_like(t)
    for factor in reversed(_ERF_A):
        series = (series + np.float32(factor)) * t
    erf = np.sign(x) * (1 - series * np.exp(-(magnitude**2)))
    return np.asarray(x * np.float32(0.5) * (1 + erf), np.float32)


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file as float32 (integers as they are). Raises ValueError for anything else.

    The format: eight bytes with the header's length, a JSON header with type, shape and byte range of each, the data.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 + size:
        raise ValueError(f"{path}: cut short")
    tensors: dict[str, Array] = {}
    header: dict[str, Any] = orjson.loads(data[8 : 8 + size])
    for name, about in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(about["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name} has the type {about['dtype']}")
        begin, end = about["data_offsets"]
        flat = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype)
        tensor = flat.reshape(about["shape"])
        tensors[name.removeprefix("bert.")] = tensor.astype(np.float32) if dtype.kind == "f" else tensor
    return tensors
