"""One answer in the making: its text from `Writing`, its pace from the `Engine`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.engine import Ending, Engine
from loadtest.engine_model import Sequence
from loadtest.text import block_keys, count_tokens
from loadtest.writing import Wish, Writing


class Generation:
    """Inside `running()`, `next_piece` gives the text bit by bit, then None; then `finish_reason` stands."""

    def __init__(self, engine: Engine, wish: Wish, slow: float = 1.0) -> None:
        self._engine = engine
        self._wish = wish
        self._writing = Writing(wish)
        self._sequence = _sequence(engine, wish.prompt, self._writing.max_tokens, slow)
        self._ending = Ending()

    @property
    def text(self) -> str:
        """What has been delivered so far."""
        return self._writing.text

    @property
    def finish_reason(self) -> str | None:
        return self._writing.finish_reason

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended it."""
        return self._writing.stop_reason

    @property
    def prompt_tokens(self) -> int:
        return self._sequence.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self._writing.tokens

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held; known once the first piece is there."""
        return self._sequence.cached_tokens

    @contextmanager
    def running(self) -> Iterator[Generation]:
        """Keep the answer in the engine; leaving early aborts it."""
        with self._engine.running(self._sequence) as self._ending:
            yield self

    async def next_piece(self) -> str | None:
        """Wait for the next text to deliver; None when all is said."""
        while self.finish_reason is None:
            await self._engine.progress(self._sequence, self._writing.tokens)
            piece = self._writing.step()
            if self.finish_reason is not None:
                self._ending.reason = self.finish_reason
                self._ending.keys = block_keys(self._wish.prompt + self.text, self._engine.model.spec.block_tokens)
            if piece:
                return piece
        return None

    async def whole_text(self) -> str:
        """Wait for the whole answer."""
        if not self._wish.stop:
            await self._engine.progress(self._sequence, self._sequence.max_tokens - 1)
        while await self.next_piece() is not None:
            pass
        return self.text


async def prefill(engine: Engine, text: str, slow: float = 1.0) -> int:
    """Let the engine read a text without an answer, as embeddings do; return its tokens."""
    sequence = _sequence(engine, text, 0, slow)
    with engine.running(sequence) as ending:
        await engine.progress(sequence, 0)
        ending.reason = "stop"
    return sequence.prompt_tokens


def _sequence(engine: Engine, prompt: str, max_tokens: int, slow: float) -> Sequence:
    keys = block_keys(prompt, engine.model.spec.block_tokens)
    return Sequence(prompt_tokens=count_tokens(prompt), max_tokens=max_tokens, keys=keys, slow=slow)
