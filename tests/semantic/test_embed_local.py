"""The embedder in this process: its file formats and tokenizer on made-up weights, its figures on real ones."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balancer.core.semantic.guards import compare, read
from balancer.semantic import Unavailable
from balancer.semantic.bert import Bert, read_safetensors
from balancer.semantic.embed_local import MAX_WAITING, LocalEmbedder
from balancer.semantic.wordpiece import WordPiece, split
from tests.semantic.contrast import triples

# Where the weights of all-MiniLM-L6-v2 are: config.json, vocab.txt, model.safetensors.
VARIABLE = "SEMANTIC_MODEL_DIR"
WIDTH, WIDE, LAYERS = 8, 16, 2
WORDS = ["what", "is", "the", "capital", "of", "per", "##u", "caf", "##e", "?", ".", ","]


def write_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        dtype = {"float32": "F32", "float16": "F16", "int64": "I64"}[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT of random weights with a vocabulary of Latin letters."""
    rng = np.random.default_rng(1)
    latin = [f"##{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyzàâçéèêëîïôûùüÿñæ"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *latin]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 2, "num_hidden_layers": LAYERS,
              "layer_norm_eps": 1e-12, "hidden_size": WIDTH}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def made(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": made(len(vocabulary), WIDTH),
        "embeddings.position_embeddings.weight": made(256, WIDTH),
        "embeddings.token_type_embeddings.weight": made(2, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        shapes = {"attention.self.query": (WIDTH, WIDTH), "attention.self.key": (WIDTH, WIDTH),
                  "attention.self.value": (WIDTH, WIDTH), "attention.output.dense": (WIDTH, WIDTH),
                  "intermediate.dense": (WIDE, WIDTH), "output.dense": (WIDTH, WIDE)}  # fmt: skip
        for name, (rows, columns) in shapes.items():
            tensors |= {f"{layer}.{name}.weight": made(rows, columns), f"{layer}.{name}.bias": made(rows)}
    for norm in norms:
        tensors |= {f"{norm}.weight": made(WIDTH), f"{norm}.bias": made(WIDTH)}
    write_weights(tmp_path / "model.safetensors", tensors)
    return tmp_path


def test_a_vector_has_length_one_and_belongs_to_the_text(folder: Path) -> None:
    bert = Bert(folder)
    one, again, other = (bert.embed(text) for text in ("What is Peru?", "what IS peru ?", "What is the capital?"))
    assert one is not None
    assert again is not None
    assert other is not None
    assert np.linalg.norm(one) == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("text", ["首都是哪里", "столица", "What is 首都?", "", "what " * 300, "!@#", "☃ ☃"])
def test_text_that_the_vocabulary_does_not_spell_is_refused(folder: Path, text: str) -> None:
    assert Bert(folder).embed(text) is None


def test_words_are_split_into_the_longest_pieces(folder: Path) -> None:
    pieces = WordPiece(folder / "vocab.txt", max_pieces=64)
    ids = {word: 4 + number for number, word in enumerate(WORDS)}
    assert pieces.encode("What is Café, Peru?") == [
        2, ids["what"], ids["is"], ids["caf"], ids["##e"], ids[","], ids["per"], ids["##u"], ids["?"], 3
    ]  # fmt: skip
    assert list(split("Don't — naïve\tU.S.\u200b首都x")) == [
        "don",
        "'",
        "t",
        "—",
        "naive",
        "u",
        ".",
        "s",
        ".",
        "首",
        "都",
        "x",
    ]


def test_a_folder_without_a_model_is_told_apart(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="not a BERT"):
        Bert(folder)
    with pytest.raises(ValueError, match=r"config\.json"):
        Bert(folder / "nowhere")


def test_a_broken_file_of_weights_is_told_apart(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cut short"):
        read_safetensors(path)
    tensors = read_safetensors_of(path, whole)
    del tensors["encoder.layer.1.output.dense.weight"]
    write_weights(path, tensors)
    with pytest.raises(ValueError, match=r"output\.dense"):
        Bert(folder)


def read_safetensors_of(path: Path, data: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(data)
    return read_safetensors(path)


def test_half_precision_and_a_prefix_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, {"bert.x": np.array([0.5, 2.0], np.float16), "ids": np.array([1], np.int64)})
    read_ = read_safetensors(path)
    assert (read_["x"].dtype, list(read_["x"])) == (np.float32, [0.5, 2.0])
    assert list(read_["ids"]) == [1]


async def test_it_embeds_beside_the_event_loop_and_only_so_many_at_a_time(folder: Path) -> None:
    import asyncio

    embedder = LocalEmbedder(str(folder))
    waiting = [asyncio.ensure_future(embedder.embed("What is Peru?")) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="busy"):
        await embedder.embed("What is Peru?")
    vectors = await asyncio.gather(*waiting)
    assert all(vector is not None for vector in vectors)
    assert await embedder.embed("столица") is None
    await embedder.close()


# -- with real weights


@cache
def minilm() -> Bert:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"no weights: {VARIABLE} names no folder")
    return Bert(Path(folder))


@pytest.mark.real("weights")
@pytest.mark.parametrize(
    ("one", "other", "cosine"),
    [
        ("Convert JSON to YAML.", "Convert YAML to JSON.", 0.992),
        ("What is the capital of Australia?", "What is the capital of Austria?", 0.710),
        ("Can a tenant sue a landlord?", "Can a landlord sue a tenant?", 0.998),
    ],
)
def test_cosines_are_those_of_the_reference(one: str, other: str, cosine: float) -> None:
    vectors = [minilm().embed(text) for text in (one, other)]
    assert vectors[0] is not None
    assert vectors[1] is not None
    assert float(vectors[0] @ vectors[1]) == pytest.approx(cosine, abs=0.002)


@pytest.mark.real("weights")
def test_guarded_at_its_default_finds_most_rewordings_and_nothing_that_differs() -> None:
    """At least half of the right hits, and no wrong one."""
    found = list(triples())
    right = 0
    for triple in found:
        base, same = minilm().embed(triple.base), minilm().embed(triple.same)
        assert base is not None
        assert same is not None
        right += compare(read(triple.base), read(triple.same)).agree and float(base @ same) >= 0.90
        assert not compare(read(triple.base), read(triple.diff)).agree
    assert right / len(found) >= 0.5


@pytest.mark.real("weights")
@pytest.mark.parametrize("text", ["5公里等于多少英里？", "Какая столица Австралии?", "ما هي عاصمة أستراليا؟"])
def test_scripts_that_the_model_cannot_read_get_no_vector(text: str) -> None:
    assert minilm().embed(text) is None
