"""Hits are counted by name in a bounded table, in which what is popular stays."""

from __future__ import annotations

from balancer.core.popularity import REQUEST_BYTES, Asked, Popularity


def test_the_most_hit_come_first() -> None:
    popularity = Popularity()
    for name, hits in (("a", 2), ("b", 5), ("c", 1)):
        for _ in range(hits):
            popularity.hit(name, 10, 0.5)
    top = popularity.top(2)
    assert [(popular.name, popular.hits, popular.saved_s) for popular in top] == [("b", 5, 2.5), ("a", 2, 1.0)]


def test_a_full_table_keeps_what_is_popular() -> None:
    popularity = Popularity(names=100)
    for number in range(10_000):
        popularity.hit(f"rare-{number}", 10, 0.1)
        popularity.hit("often", 10, 0.1)
    assert len(popularity) <= 100
    assert popularity.top(1)[0].name == "often"
    assert popularity.top(1)[0].hits >= 50


def test_requests_are_kept_while_there_is_room() -> None:
    popularity = Popularity(names=4)
    large = Asked("/v1/chat/completions", (), b"x" * (REQUEST_BYTES // 2))
    for number in range(4):
        popularity.keep_request(popularity.hit(str(number), 10, 0.1), large)
    assert [popular.request is not None for popular in popularity.top(4)] == [True, True, False, False]
    popularity.hit("2", 10, 0.1)
    popularity.hit("3", 10, 0.1)
    renewed = popularity.hit("4", 10, 0.1)  # no room in the table: half of it goes, and with it two requests
    popularity.keep_request(renewed, large)
    assert renewed.request is large
    popularity.forget_requests()
    assert not any(popular.request for popular in popularity.top(4))
