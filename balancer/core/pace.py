"""How a stream came over time, in few bytes, and when to send which part of it again.

Recorded are reads, not events: what came together is sent together. A read costs two to four bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# A longer record is not kept: about 5,000 reads.
RECORD_BYTES = 16 * 1024
# A pause is replayed at most this long, and a whole stream: what a node once stood still for is no part of the answer.
MAX_PAUSE_S = 1.0
MAX_WHOLE_S = 60.0


def record(reads: Sequence[tuple[float, int]]) -> bytes:
    """Reads (time in seconds, bytes) as pairs of varints: milliseconds since the last one, bytes. Empty: too many."""
    written = bytearray()
    before_s = reads[0][0] if reads else 0.0
    for at_s, size in reads:
        since_ms = max(0, round((at_s - before_s) * 1000))
        before_s += since_ms / 1000  # what was rounded off is not lost
        _write(written, since_ms)
        _write(written, size)
        if len(written) > RECORD_BYTES:
            return b""
    return bytes(written)


def schedule(pace: bytes, size: int) -> list[tuple[float, int]]:
    """When (seconds from the beginning) the stream is to have come up to which byte; the last is the whole.

    `size` may differ from what was recorded by an event that was left out or put in. Soiled records give one step.
    """
    steps: list[tuple[float, int]] = []
    at_s, end = 0.0, 0
    numbers = list(_read(pace))
    for since_ms, read in zip(numbers[::2], numbers[1::2], strict=False):
        at_s += min(since_ms / 1000, MAX_PAUSE_S)
        end += read
        if end >= size:
            break
        if steps and steps[-1][0] == at_s:
            steps[-1] = (at_s, end)
        elif read:
            steps.append((at_s, end))
    whole_s = at_s if steps else 0.0
    steps.append((whole_s, size))
    if whole_s <= MAX_WHOLE_S:
        return steps
    return [(at_s * MAX_WHOLE_S / whole_s, end) for at_s, end in steps]


def _write(written: bytearray, number: int) -> None:
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)


def _read(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
        elif shift > 35:
            return
