"""How many tokens a request will be: bytes per prompt token and output tokens, learned for each model from usage."""

from __future__ import annotations

from collections import OrderedDict

from balancer.core.books import MIN_SAMPLES, Work
from balancer.core.prompt_blocks import ATTACHMENT_TOKENS, BLOCK_BYTES, Prompt
from balancer.core.request import BYTES_PER_TOKEN, EXPECTED_OUTPUT_TOKENS

# Weight of one new answer in the mean output: about the last 50 count, enough for a mean of lengths that spread so.
OUTPUT_WEIGHT = 0.02
# Share of what was known that one more prompt leaves: about the last 50 prompts' bytes and tokens count.
PROMPT_KEEP = 0.98
# No text is outside of this: one byte is at least half a token, and no vocabulary has words of 32 bytes on average.
# What claims otherwise counted something else (a cached prompt, an image).
LEAST_BYTES_PER_TOKEN = 0.5
MOST_BYTES_PER_TOKEN = 32.0
# Models remembered. Names come from clients where nodes serve any model, so they are bounded.
MODELS = 256


class _Model:
    """One model's sums."""

    __slots__ = ("answers", "output", "prompt_bytes", "prompt_tokens", "prompts")

    def __init__(self) -> None:
        self.prompts = 0
        self.prompt_bytes = 0.0
        self.prompt_tokens = 0.0
        self.answers = 0
        self.output = 0.0


_UNSEEN = _Model()


class Expectations:
    """What is to be expected of the next request of a model."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Expectations models={len(self._models)}>"

    def __len__(self) -> int:
        """Models known."""
        return len(self._models)

    def bytes_per_token(self, model: str) -> float:
        """Bytes of prompt text that make one token; the prior for English until MIN_SAMPLES prompts were seen."""
        seen = self._models.get(model, _UNSEEN)
        return BYTES_PER_TOKEN if seen.prompts < MIN_SAMPLES else seen.prompt_bytes / seen.prompt_tokens

    def prompt_tokens(self, model: str, size_bytes: float) -> float:
        """Prompt tokens expected of so many bytes of text, at least one."""
        return max(1.0, size_bytes / self.bytes_per_token(model))

    def output_tokens(self, model: str, max_tokens: int | None) -> float:
        """Output tokens expected: the model's mean, the prior of 256 until it is known, never above `max_tokens`."""
        seen = self._models.get(model, _UNSEEN)
        expected = float(EXPECTED_OUTPUT_TOKENS) if seen.answers < MIN_SAMPLES else seen.output
        return expected if max_tokens is None or max_tokens > expected else float(max(1, max_tokens))

    def work(
        self, model: str, prompt: Prompt, max_tokens: int | None, *, generates: bool = True, streams: bool = True
    ) -> Work:
        """What a request asks of a node."""
        size_bytes, blocks, attachments, token_ids = prompt
        if token_ids is not None:
            tokens, block_tokens = float(token_ids), BLOCK_BYTES / 4.0
        else:
            ratio = self.bytes_per_token(model)
            tokens, block_tokens = size_bytes / ratio, BLOCK_BYTES / ratio
        if attachments:
            tokens += ATTACHMENT_TOKENS * attachments
        output = self.output_tokens(model, max_tokens) if generates else 0.0
        return Work(max(1.0, tokens), blocks, block_tokens, output, generates, streams)

    def learned(
        self, model: str, size_bytes: float | None, prompt_tokens: int | None, output_tokens: int | None
    ) -> None:
        """What usage said of one finished request.

        `size_bytes`: of its prompt's text; None where that says nothing of tokens (attachments, token ids).
        """
        seen = self._models.get(model)
        if seen is None:
            seen = self._models[model] = _Model()
            if len(self._models) > MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(model)
        if size_bytes is not None and prompt_tokens is not None and prompt_tokens > 0:
            bounded = min(max(size_bytes / prompt_tokens, LEAST_BYTES_PER_TOKEN), MOST_BYTES_PER_TOKEN)
            seen.prompt_bytes = PROMPT_KEEP * seen.prompt_bytes + bounded * prompt_tokens
            seen.prompt_tokens = PROMPT_KEEP * seen.prompt_tokens + prompt_tokens
            seen.prompts += 1
        if output_tokens is not None and output_tokens >= 0:
            # A plain mean at first, so that the first answer does not weigh for a hundred.
            seen.answers += 1
            seen.output += max(OUTPUT_WEIGHT, 1.0 / seen.answers) * (output_tokens - seen.output)
