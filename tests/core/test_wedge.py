"""When a node's silence means that it is wedged, and all the silences that do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.wedge import ALIVE_S, EARLY, GAPS, Finding, Seen, holds_commit, judge, may_have_hung_it, probe_for

NOW = 1000.0
STALL_S = 3.0


def a_stream(sent_s: float = NOW - 20.0, **fields: Any) -> Seen:
    return Seen(sent_s=sent_s, streams=True, **fields)


def begun(**fields: Any) -> Seen:
    return a_stream(begun=True, **fields)


def unary(sent_s: float = NOW - 20.0, **fields: Any) -> Seen:
    return Seen(sent_s=sent_s, streams=False, **fields)


def judged(*seen: Seen, silent_s: float = STALL_S, probe_failed: bool = False) -> Finding:
    return judge(seen, heard_s=NOW - silent_s, probe_failed=probe_failed, stall_s=STALL_S, now=NOW)


# What accuses


def test_a_stream_that_gave_a_token_accuses_after_stall_s_of_silence() -> None:
    assert judged(begun(), silent_s=2.9) is Finding.SUSPECT
    assert judged(begun(), silent_s=3.0) is Finding.STREAM_SILENT
    assert judged(begun(), silent_s=3.0).is_wedged


def test_any_byte_from_the_node_speaks_for_all_of_its_requests() -> None:
    assert judged(begun(), a_stream(), unary(), silent_s=0.2) is Finding.FINE


def test_a_first_token_accuses_when_it_is_overdue_by_stall_s_and_twice_its_prefill() -> None:
    long = a_stream(NOW - 13.0, expected_s=6.0, prefill_s=2.0)
    assert judged(long, silent_s=13.0) is Finding.FIRST_TOKEN_OVERDUE
    longer = a_stream(NOW - 12.9, expected_s=6.0, prefill_s=2.0)
    assert judged(longer, silent_s=12.9) is Finding.SUSPECT


@pytest.mark.parametrize("seen", [unary(), a_stream(known_pace=False)], ids=["unary", "unknown_pace"])
def test_what_never_accuses_is_settled_by_a_probe(seen: Seen) -> None:
    assert judged(seen, silent_s=20.0) is Finding.UNPROVEN
    assert judged(seen, silent_s=20.0, probe_failed=True) is Finding.PROBE_FAILED
    assert judged(seen, silent_s=20.0, probe_failed=True).is_wedged


def test_a_probe_that_failed_convicts_nobody_who_was_heard_since() -> None:
    assert judged(unary(), silent_s=STALL_S - 0.1, probe_failed=True) is Finding.FINE


def test_an_idle_node_is_not_judged() -> None:
    assert judged(silent_s=1e6, probe_failed=True) is Finding.FINE


# What does not


def test_a_request_that_has_just_been_sent_to_an_idle_node_suspects_nobody() -> None:
    for seen in (unary(NOW - 0.1), a_stream(NOW - 0.1), a_stream(NOW - 0.1, known_pace=False)):
        assert judged(seen, silent_s=3600.0) is Finding.FINE


def test_a_stream_whose_client_does_not_read_accuses_nobody() -> None:
    assert judged(begun(paused=True), silent_s=60.0, probe_failed=True) is Finding.FINE


def test_a_stream_that_goes_on_after_a_pause_gets_its_time() -> None:
    assert judged(begun(resumed_s=NOW - 0.5), silent_s=60.0) is Finding.FINE
    assert judged(begun(resumed_s=NOW - 3.0), silent_s=60.0) is Finding.STREAM_SILENT


def test_running_streams_stand_still_while_a_long_prompt_is_read() -> None:
    reading = a_stream(NOW - 9.0, expected_s=10.0, prefill_s=10.0)
    assert judged(begun(), reading, silent_s=9.0) is Finding.FINE
    assert judged(begun(), reading, silent_s=13.0) is Finding.STREAM_SILENT


def test_a_node_whose_tokens_come_slowly_is_not_wedged_between_two_of_them() -> None:
    assert judged(begun(gap_s=2.0), silent_s=3.0 + GAPS * 2.0 - 0.1) is Finding.SUSPECT
    assert judged(begun(gap_s=2.0), silent_s=3.0 + GAPS * 2.0) is Finding.STREAM_SILENT


kinds = st.one_of(
    st.builds(unary, st.floats(NOW - 600.0, NOW)),
    st.builds(lambda sent_s: a_stream(sent_s, known_pace=False), st.floats(NOW - 600.0, NOW)),
    st.builds(lambda paused_s: begun(sent_s=NOW - 700.0, paused=True, resumed_s=paused_s), st.floats(0.0, NOW)),
)


@given(st.lists(kinds, max_size=20), st.floats(0.0, 600.0))
def test_without_a_failed_probe_nothing_of_these_ever_takes_a_node_out(seen: list[Seen], silent_s: float) -> None:
    assert not judged(*seen, silent_s=silent_s).is_wedged


@given(st.floats(0.01, 60.0), st.floats(1.0, 20.0), st.floats(0.0, 1.0))
def test_a_long_prompt_on_an_idle_node_never_accuses_within_three_times_its_prediction(
    prefill_s: float, slower: float, at: float
) -> None:
    waited_s = at * (min(slower, 3.0) * prefill_s)
    seen = a_stream(NOW - waited_s, expected_s=prefill_s, prefill_s=prefill_s)
    assert not judged(seen, silent_s=3600.0).is_wedged


@given(st.floats(0.001, 30.0), st.floats(0.0, 4.0))
def test_a_steady_node_never_accuses_itself_however_slow(gap_s: float, times: float) -> None:
    assert not judged(begun(gap_s=gap_s), silent_s=times * gap_s).is_wedged or times * gap_s >= STALL_S + GAPS * gap_s


@given(st.lists(st.one_of(kinds, st.builds(begun)), max_size=10), st.floats(0.0, 60.0), st.booleans())
def test_silence_under_half_of_stall_s_is_never_looked_at(seen: list[Seen], share: float, failed: bool) -> None:
    silent_s = min(share, EARLY * STALL_S * 0.99)
    assert judged(*seen, silent_s=silent_s, probe_failed=failed) is Finding.FINE


# The commit that waits


def held(seen: Seen, silent_s: float) -> bool:
    return holds_commit(seen, heard_s=NOW - silent_s, commit_s=2.0, stall_s=STALL_S, now=NOW)


def test_a_stream_without_content_is_held_while_its_node_is_silent_and_its_token_late() -> None:
    assert held(a_stream(NOW - 2.0), 5.0)
    assert not held(a_stream(NOW - 2.0), 0.1), "the node moves"
    assert not held(a_stream(NOW - 2.0, expected_s=4.0, prefill_s=4.0), 5.0), "it is not late yet"


@pytest.mark.parametrize(("known", "most_s"), [(True, 3.5), (False, 6.5)])
def test_it_is_held_no_longer_than_the_watchdog_needs(known: bool, most_s: float) -> None:
    assert held(a_stream(NOW - most_s + 0.01, known_pace=known), 60.0)
    assert not held(a_stream(NOW - most_s, known_pace=known), 60.0)


# Probes


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_a_probe_asks_for_one_token_of_the_model(path: str) -> None:
    probe = probe_for(path, "llama")
    assert probe is not None
    assert (probe.path, probe.body["model"], probe.body["max_tokens"]) == (path, "llama", 1)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/audio/transcriptions", "/tokenize"])
def test_what_has_no_cheap_request_has_no_probe(path: str) -> None:
    assert probe_for(path, "m") is None


# -- of what it hung


def suspected(seen: Seen, *others: Seen, heard_s: float = NOW) -> bool:
    return may_have_hung_it(seen, (seen, *others), heard_s=heard_s, stall_s=STALL_S)


def test_what_waited_when_streams_stopped_may_have_hung_the_node_and_what_came_later_found_it_so() -> None:
    stream = begun(gap_s=0.05)
    assert suspected(unary(NOW - 1.0), stream)
    assert suspected(a_stream(NOW + 0.15), stream), "within a few of their gaps"
    assert not suspected(a_stream(NOW + 0.25), stream)
    assert not suspected(begun(), stream), "its prompt was read"


def test_a_long_prompt_may_stand_between_the_last_byte_and_the_hang() -> None:
    assert suspected(a_stream(NOW + 1.5), begun(gap_s=0.01), a_stream(NOW, prefill_s=2.0))


def test_without_streams_what_came_before_the_silence_was_long_may_have_hung_it() -> None:
    first = unary(NOW)
    assert suspected(first)
    assert suspected(unary(NOW + EARLY * STALL_S - 0.1), first)
    assert not suspected(unary(NOW + EARLY * STALL_S), first)


def test_a_node_that_showed_no_life_before_hangs_by_itself() -> None:
    assert suspected(unary(NOW + ALIVE_S))
    assert not suspected(unary(NOW + ALIVE_S + 0.1))
