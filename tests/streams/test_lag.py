"""Lag: when it is said, and in which words."""

from __future__ import annotations

import pytest

from streams.lag import LagWatch, lag_words

A, B = ("a", 0), ("b", 3)


@pytest.mark.parametrize(
    ("lag", "words"),
    [
        ({}, ""),
        ({A: 0}, ""),
        ({A: 5, B: 1_200}, "b[3] 1,200, a[0] 5"),
        ({("t", n): n for n in range(7)}, "t[6] 6, t[5] 5, t[4] 4, t[3] 3 and 2 more partitions"),
    ],
)
def test_the_furthest_behind_are_named(lag: dict[tuple[str, int], int], words: str) -> None:
    assert lag_words(lag) == words


def test_it_is_said_every_minute_and_taken_back_once() -> None:
    watch = LagWatch(100)
    said = {
        seconds: words
        for seconds, n in [(0, 99), (1, 100), (30, 400), (60, 90), (62, 500), (70, 11), (80, 10), (90, 10), (91, 150)]
        if (words := watch.observe({A: n, B: 0}, float(seconds)))
    }
    assert {seconds: words.split(":")[0] for seconds, words in said.items()} == {
        1: "100 events behind the log",
        62: "500 events behind the log",
        80: "caught up",
        91: "150 events behind the log",
    }
    assert "a[0] 500" in said[62]
    assert "Nothing is lost as long as the topics keep them" in said[62]
