"""The merge: one order, which depends on the logs and on nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.merge import Message, PartitionMerge

PARTITIONS = [("products", 0), ("impressions", 0), ("impressions", 1), ("clicks", 0)]


def log(partition: tuple[str, int], timestamps: list[int]) -> list[Message]:
    return [Message(*partition, offset, timestamp, b"") for offset, timestamp in enumerate(timestamps)]


def at(messages: list[Message]) -> list[tuple[str, int, int]]:
    return [(m.topic, m.partition, m.offset) for m in messages]


def run(
    logs: dict[tuple[str, int], list[Message]], batch: int, rng: random.Random, largest_fetch: int
) -> list[list[tuple[str, int, int]]]:
    """Consume logs as a consumer does, with fetches of random sizes from random partitions; return the batches."""
    merge = PartitionMerge(PARTITIONS)
    left = {partition: list(messages) for partition, messages in logs.items()}
    batches: list[list[Message]] = []
    taken: list[Message] = []
    while any(left.values()) or merge.n_buffered:
        if candidates := [partition for partition, messages in left.items() if messages]:
            partition = rng.choice(candidates)
            n = rng.randint(1, largest_fetch)
            merge.add(partition, left[partition][:n])
            del left[partition][:n]
        ended = [partition for partition, messages in left.items() if not messages]
        taken += merge.take(batch - len(taken), ended=ended)
        if len(taken) == batch:
            batches.append(taken)
            taken = []
    batches.append(taken)
    return [at(messages) for messages in batches]


timestamps = st.lists(st.integers(0, 12), max_size=12)


@given(
    st.tuples(timestamps, timestamps, timestamps, timestamps),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
    st.integers(1, 6),
)
def test_batches_depend_only_on_the_logs(
    times: tuple[list[int], ...], batch: int, rng: random.Random, largest_fetch: int
) -> None:
    logs = {partition: log(partition, of) for partition, of in zip(PARTITIONS, times, strict=True)}
    reference = run(logs, batch, random.Random(0), 100)
    assert run(logs, batch, rng, largest_fetch) == reference
    everything = [message for batch_ in reference for message in batch_]
    assert sorted(everything) == sorted(at([m for messages in logs.values() for m in messages]))
    assert all(len(batch_) == batch for batch_ in reference[:-1])
    for partition in PARTITIONS:
        offsets = [offset for *of, offset in everything if tuple(of) == partition]
        assert offsets == sorted(offsets)


@given(st.tuples(timestamps, timestamps, timestamps, timestamps), st.integers(1, 7), st.integers(0, 20))
def test_a_restart_after_any_batch_repeats_the_rest(times: tuple[list[int], ...], batch: int, n_before: int) -> None:
    logs = {partition: log(partition, of) for partition, of in zip(PARTITIONS, times, strict=True)}
    reference = run(logs, batch, random.Random(0), 3)
    done = {entry for batch_ in reference[:n_before] for entry in batch_}
    rest = {partition: [m for m in messages if at([m])[0] not in done] for partition, messages in logs.items()}
    again = run(rest, batch, random.Random(1), 2)
    assert [b for b in again if b] == [b for b in reference[n_before:] if b]


@given(st.tuples(timestamps, timestamps, timestamps, timestamps))
def test_sorted_logs_come_out_in_the_order_of_time(times: tuple[list[int], ...]) -> None:
    logs = {p: log(p, sorted(of)) for p, of in zip(PARTITIONS, times, strict=True)}
    merge = PartitionMerge(PARTITIONS)
    for partition, messages in logs.items():
        merge.add(partition, messages)
    rank = {partition: n for n, partition in enumerate(PARTITIONS)}
    everything = [m for messages in logs.values() for m in messages]
    expected = sorted(everything, key=lambda m: (m.timestamp_ms, rank[m.topic, m.partition], m.offset))
    assert merge.take(1000, ended=PARTITIONS) == expected
    assert merge.n_buffered == 0


A, B = ("a", 0), ("b", 0)


def sized(partition: tuple[str, int], sizes: list[int], start_ms: int) -> list[Message]:
    return [Message(*partition, n, start_ms + 2 * n, bytes(size)) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("n_most_bytes", "expected"),
    [(1, 1), (10, 1), (11, 2), (30, 2), (31, 3), (1_000, 4)],
)
def test_no_more_is_taken_after_so_many_bytes(n_most_bytes: int, expected: int) -> None:
    merge = PartitionMerge([A, B])
    merge.add(A, sized(A, [10, 10], 0))
    merge.add(B, sized(B, [20, 20], 1))
    taken = merge.take(9, n_most_bytes=n_most_bytes, ended=[A, B])
    assert len(taken) == expected
    assert merge.n_bytes_of(A) + merge.n_bytes_of(B) == 60 - sum(message.n_bytes for message in taken)


def test_further_partitions_take_their_place_in_the_order() -> None:
    merge = PartitionMerge([A])
    merge.add(A, log(A, [5, 7]))
    first = ("0", 0)
    merge.set_partitions([first, A])
    assert merge.empty() == [first]
    merge.add(first, log(first, [5]))
    assert [message.topic for message in merge.take(9, ended=[first, A])] == ["0", "a", "a"]


@pytest.mark.parametrize(
    ("a", "b", "ended", "n_most", "expected"),
    [
        pytest.param([1, 3], [2, 4], [], 9, [A, B, A], id="stops where a partition runs dry: its next might be first"),
        pytest.param([1, 3], [2, 4], [A], 9, [A, B, A, B], id="goes on when it is known to have ended"),
        pytest.param([1, 3], [], [], 9, [], id="nothing before every partition has been heard of"),
        pytest.param([1, 3], [], [B], 9, [A, A], id="an ended partition may be empty"),
        pytest.param([5, 5], [5, 5], [A, B], 9, [A, A, B, B], id="topics take precedence at equal times"),
        pytest.param([9, 1], [5], [A, B], 9, [B, A, A], id="a partition's own order holds whatever its times"),
        pytest.param([1, 2, 3], [9], [], 2, [A, A], id="no more than was asked for"),
    ],
)
def test_cases(
    a: list[int], b: list[int], ended: list[tuple[str, int]], n_most: int, expected: list[tuple[str, int]]
) -> None:
    merge = PartitionMerge([A, B])
    merge.add(A, log(A, a))
    merge.add(B, log(B, b))
    taken = merge.take(n_most, ended=ended)
    assert [(m.topic, m.partition) for m in taken] == expected
    assert merge.n_buffered == len(a) + len(b) - len(expected)
    assert merge.n_buffered_of(A) == len(a) - expected.count(A)
    assert (A in merge.empty()) == (len(a) == expected.count(A))
