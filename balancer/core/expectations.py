"""Tokens expected of a request. INTERFACE STAGE."""

from __future__ import annotations


class Expectations:
    """Per model: bytes per prompt token and output tokens, learned from usage."""

    def prompt_tokens(self, model: str, size_bytes: float) -> float:
        """Prompt tokens expected of so many rendered bytes."""
        raise NotImplementedError

    def output_tokens(self, model: str, max_tokens: int | None) -> float:
        """E[out], capped by max_tokens."""
        raise NotImplementedError

    def learned(self, model: str, size_bytes: float, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """What usage said of one finished request."""
