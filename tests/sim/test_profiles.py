"""The engine model's step times against the sources it names."""

from __future__ import annotations

import pytest

from loadtest.sim.profiles import A100, A100_40, L4, MEASURED, PROFILES, WEIGHT_BYTES_8B, Measured, slower


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.source}-{row.profile}-{row.what}-{row.size}")
def test_a_step_takes_as_long_as_was_measured(row: Measured) -> None:
    profile = PROFILES[row.profile]
    if row.what == "prefill":
        seconds = profile.prefill_alone_s(row.size)
    else:
        seconds = profile.step_s(0, 0.0, row.size, 576 * row.size)
    # 7 %: the measured rows are no smoother than that themselves (batches of 1 and 2 cross over).
    assert seconds == pytest.approx(row.seconds, rel=0.07)


def test_8b_decode_has_the_bandwidth_efficiency_that_was_measured_on_the_smaller_a100() -> None:
    # 75 tokens/s alone on 1.555 TB/s; the profile is of the 80 GB card, whose bandwidth is 2.039 TB/s.
    expected_s = (1 / 75) * A100_40.bandwidth / A100.bandwidth
    assert PROFILES["a100-8b"].step_s(0, 0.0, 1, 1024) == pytest.approx(expected_s, rel=0.04)


def test_no_profile_beats_its_datasheet() -> None:
    l4 = PROFILES["l4-8b"]
    assert l4.decode_s > WEIGHT_BYTES_8B / L4.bandwidth
    assert l4.prefill_s > WEIGHT_BYTES_8B / L4.flops


def test_decode_steps_grow_with_batch_and_context_and_prefill_with_tokens() -> None:
    for profile in PROFILES.values():
        assert profile.step_s(0, 0.0, 16, 16_000) > profile.step_s(0, 0.0, 8, 16_000) > profile.step_s(0, 0.0, 8, 8_000)
        assert profile.step_s(2048, 0.0, 0, 0) > profile.step_s(1024, 0.0, 0, 0)


def test_a_profile_made_slower_takes_so_much_longer_for_everything() -> None:
    profile = PROFILES["h100-70b"]
    half = slower(profile, 2.0)
    assert half.step_s(500, 1e6, 7, 9000) == pytest.approx(2 * profile.step_s(500, 1e6, 7, 9000))
