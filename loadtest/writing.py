"""What an answer says, token by token, and where it ends: by length, by a stop string, or by itself. Knows no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.text import Story


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks of one answer. It ends itself after `shortest` to `longest` words."""

    prompt: str
    salt: str = ""
    max_tokens: int
    min_tokens: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    shortest: int = 24
    longest: int = 64


class Writing:
    """One answer's text. `step` gives what may go out with the next token, until `finish_reason` stands."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._story = Story(wish.prompt, wish.salt, shortest=wish.shortest, longest=wish.longest)
        natural = max(self._story.length - self._story.written, wish.min_tokens)
        self._ends_itself = not wish.ignore_eos and natural <= wish.max_tokens
        self.max_tokens = natural if self._ends_itself else wish.max_tokens
        self._held = ""
        self._hold_chars = max(map(len, wish.stop), default=1) - 1
        self.text = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None

    def step(self) -> str:
        """One more token: the text that may go out now. What may be the beginning of a stop string is held back."""
        if self.tokens < self.max_tokens:
            self.tokens += 1
            self._held += self._story.next_word()
        cuts = [(self._held.find(stop), stop) for stop in self._wish.stop if stop in self._held]
        if cuts:
            ready, self.stop_reason = min(cuts)
            self.finish_reason = "stop"
        elif self.tokens >= self.max_tokens:
            ready = len(self._held)
            self.finish_reason = "stop" if self._ends_itself else "length"
        else:
            ready = max(0, len(self._held) - self._hold_chars)
        piece, self._held = self._held[:ready], self._held[ready:]
        self.text += piece
        return piece


def text_of(wish: Wish) -> str:
    """The whole answer, at once."""
    writing = Writing(wish)
    while writing.finish_reason is None:
        writing.step()
    return writing.text
