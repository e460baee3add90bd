"""How many tokens a request will be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.books import MIN_SAMPLES
from balancer.core.expectations import (
    LEAST_BYTES_PER_TOKEN,
    MODELS,
    MOST_BYTES_PER_TOKEN,
    Expectations,
)
from balancer.core.prompt_blocks import Prompt


def taught(bytes_per_token: float = 3.0, output: int = 40, samples: int = MIN_SAMPLES) -> Expectations:
    expectations = Expectations()
    for _ in range(samples):
        expectations.learned("m", 1000 * bytes_per_token, 1000, output)
    return expectations


def test_an_unknown_model_is_expected_to_speak_english_at_some_length() -> None:
    expectations = Expectations()

    assert expectations.prompt_tokens("m", 4000) == 1000.0
    assert expectations.output_tokens("m", None) == 256.0
    assert expectations.output_tokens("m", 100) == 100.0


def test_the_prior_stands_until_five_answers() -> None:
    assert taught(samples=MIN_SAMPLES - 1).output_tokens("m", None) == 256.0
    assert taught(samples=MIN_SAMPLES - 1).bytes_per_token("m") == 4.0


def test_usage_teaches_each_model_its_own_figures() -> None:
    expectations = taught()

    assert expectations.prompt_tokens("m", 3000) == pytest.approx(1000.0)
    assert expectations.output_tokens("m", None) == pytest.approx(40.0)
    assert expectations.output_tokens("m", 10) == 10.0
    assert expectations.output_tokens("n", None) == 256.0


def test_what_changes_is_followed() -> None:
    expectations = taught(output=40)
    for _ in range(200):
        expectations.learned("m", 2000, 1000, 400)

    assert expectations.output_tokens("m", None) == pytest.approx(400, rel=0.05)
    assert expectations.bytes_per_token("m") == pytest.approx(2.0, rel=0.05)


def test_unknown_counts_teach_nothing() -> None:
    expectations = taught()
    expectations.learned("m", None, 9_000_000, None)
    expectations.learned("m", 100.0, 0, None)
    expectations.learned("m", 100.0, None, None)

    assert expectations.bytes_per_token("m") == pytest.approx(3.0)
    assert expectations.output_tokens("m", None) == pytest.approx(40.0)


def test_work_is_in_the_models_own_tokens() -> None:
    work = taught().work("m", Prompt(size_bytes=3072.0, blocks=(1, 2, 3)), 20)

    assert work.prompt_tokens == pytest.approx(1024)
    assert work.blocks == (1, 2, 3)
    assert work.block_tokens == pytest.approx(1024 / 3)
    assert work.expected_output == 20.0
    assert (work.generates, work.streams) == (True, True)


def test_work_takes_token_ids_as_they_are_and_adds_attachments() -> None:
    ids = taught().work("m", Prompt(size_bytes=2048.0, blocks=(1, 2), token_ids=512), None)
    seen = taught().work("m", Prompt(size_bytes=3000.0, attachments=2), None)
    embedded = taught().work("m", Prompt(size_bytes=30.0), None, generates=False, streams=False)

    assert (ids.prompt_tokens, ids.block_tokens) == (512.0, 256.0)
    assert seen.prompt_tokens == pytest.approx(2600.0)
    assert (embedded.expected_output, embedded.generates) == (0.0, False)


def test_models_are_bounded_and_the_longest_unused_goes() -> None:
    expectations = taught()
    for at in range(3 * MODELS):
        expectations.learned(f"other {at}", 100.0, 50, 5)
        expectations.learned("m", 3000.0, 1000, 40)

    assert len(expectations) == MODELS
    assert expectations.output_tokens("m", None) == pytest.approx(40.0)
    assert expectations.output_tokens("other 0", None) == 256.0


@given(
    st.lists(
        st.tuples(st.floats(0, 1e9) | st.none(), st.integers(-5, 10**7) | st.none(), st.integers(-5, 10**6) | st.none())
    ),
    st.integers(1, 5000),
)
def test_expectations_keep_to_reason_whatever_usage_says(
    answers: list[tuple[float | None, int | None, int | None]], most: int
) -> None:
    expectations = Expectations()
    for size_bytes, prompt, output in answers:
        expectations.learned("m", size_bytes, prompt, output)
        ratio = expectations.bytes_per_token("m")
        assert LEAST_BYTES_PER_TOKEN * 0.999 <= ratio <= MOST_BYTES_PER_TOKEN * 1.001
        assert 0.0 <= expectations.output_tokens("m", most) <= most
        assert expectations.prompt_tokens("m", 1.0) >= 1.0
