"""A language model of half a megabyte that no one trained, as a GGUF file: it talks gibberish, the same every time."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from random import Random

LAYERS, WIDTH, INNER, HEADS, CONTEXT = 2, 64, 128, 4, 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "i n", "a n", "Ġ the", "o n", "e r", "r e", "Ġ a")
# GGUF version 3: little-endian, tensors on multiples of 32 bytes. Types of values, and of tensors: F32.
VERSION, ALIGNMENT, F32 = 3, 32, 0
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
Value = bool | int | float | str | list[int] | list[str]
Tensor = tuple[tuple[int, ...], "array[float]"]


def write(path: Path) -> None:
    """Write the model; the same bytes every time."""
    tokens = [*_byte_letters(), *SPECIAL, *(merge.replace(" ", "") for merge in MERGES)]
    path.write_bytes(_gguf(_facts(tokens), _weights(len(tokens), Random(0))))


def _facts(tokens: list[str]) -> Mapping[str, Value]:
    control = range(256, 256 + len(SPECIAL))
    return {
        "general.architecture": "llama",
        "general.name": "tiny-random",
        "general.file_type": F32,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if number in control else 1 for number in range(len(tokens))],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _weights(vocabulary: int, rng: Random) -> Mapping[str, Tensor]:
    def noise(rows: int, columns: int) -> Tensor:
        return (rows, columns), array("f", (rng.gauss(0.0, 0.3) for _ in range(rows * columns)))

    ones: Tensor = ((WIDTH,), array("f", [1.0] * WIDTH))
    shape, output = noise(vocabulary, WIDTH)
    for number in range(vocabulary * WIDTH):
        if not 32 <= number // WIDTH < 127:  # it says what can be printed
            output[number] *= 0.02
    weights = {
        "token_embd.weight": noise(vocabulary, WIDTH),
        "output_norm.weight": ones,
        "output.weight": (shape, output),
    }
    for layer in range(LAYERS):
        square = {f"attn_{name}": noise(WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        inner = {"ffn_gate": noise(INNER, WIDTH), "ffn_up": noise(INNER, WIDTH), "ffn_down": noise(WIDTH, INNER)}
        block = {"attn_norm": ones, "ffn_norm": ones, **square, **inner}
        weights |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    return weights


def _byte_letters() -> list[str]:
    """A visible letter for each byte, as GPT-2's tokenizer has them."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def _gguf(facts: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(facts))
    head += b"".join(_text(name) + _typed(value) for name, value in facts.items())
    data = b""
    for name, (shape, numbers) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), F32, len(data))
        data += _padded(numbers.tobytes())
    return _padded(head) + data


def _typed(value: Value) -> bytes:
    kind, data = _value(value)
    return struct.pack("<I", kind) + data


def _value(value: Value) -> tuple[int, bytes]:
    match value:
        case bool():
            return BOOL, struct.pack("<?", value)
        case int():
            return UINT32, struct.pack("<I", value)
        case float():
            return FLOAT32, struct.pack("<f", value)
        case str():
            return STRING, _text(value)
    items = [_value(item) for item in value]
    kind = INT32 if items[0][0] == UINT32 else items[0][0]
    return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
