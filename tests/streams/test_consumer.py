"""The consumer: batches that depend on the logs alone, however late a broker answers for a partition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import pytest

from streams.consumer import BatchConsumer
from streams.errors import TopicsMissingError
from streams.merge import Message
from streams.settings import StreamSettings

Partition = tuple[str, int]


class Clock:
    """A clock that only polling moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Topic:
    """A topic of one partition on a pretended broker: (time in ms) of each message, and when it answers at first."""

    times: list[int] = field(default_factory=list)
    answers_at_s: float = 0.0
    per_poll: int = 10_000


class Reader:
    """What a broker tells of one topic."""

    def __init__(self, name: str, topic: Topic, clock: Clock) -> None:
        self.partitions: list[Partition] = [(name, 0)]
        self._topic = topic
        self._clock = clock
        self._position = 0
        self._answered = False
        self.reported: Mapping[Partition, int] = {}

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        self._position = offsets.get(self.partitions[0], 0)

    def poll(self, timeout_ms: int, partitions: Collection[Partition]) -> dict[Partition, list[Message]]:
        assert list(partitions) == self.partitions
        self._clock.now_s += max(timeout_ms, 1) / 1_000
        if self._clock.now_s < self._topic.answers_at_s:
            return {}
        self._answered = True
        start = self._position
        times = self._topic.times[start : start + self._topic.per_poll]
        self._position += len(times)
        found = [Message(*self.partitions[0], start + n, time_ms, b"") for n, time_ms in enumerate(times)]
        return {self.partitions[0]: found} if found else {}

    def end(self, partition: Partition) -> int | None:
        return len(self._topic.times) if self._answered else None

    def last_known_end(self, partition: Partition) -> int | None:
        return self.end(partition)

    @property
    def reading(self) -> Collection[Partition]:
        return self.partitions

    def gained(self) -> list[Partition]:
        return []

    def answers(self) -> bool:
        return self._answered

    def position(self, partition: Partition) -> int:
        return self._position

    def report(self, offsets: Mapping[Partition, int]) -> None:
        self.reported = offsets

    def close(self) -> None:
        pass


Consume = Callable[..., tuple[BatchConsumer, Clock]]


@pytest.fixture
def consume(monkeypatch: pytest.MonkeyPatch) -> Consume:
    def start(
        topics: dict[str, Topic], offsets: Mapping[Partition, int] | None = None, linger_ms: int = 200
    ) -> tuple[BatchConsumer, Clock]:
        clock = Clock()
        monkeypatch.setattr("streams.consumer.TopicReader", lambda _, name, now_ms: Reader(name, topics[name], clock))
        settings = StreamSettings(batch_events=4, linger_ms=linger_ms)
        return BatchConsumer(settings, list(topics), offsets or {}, clock), clock

    return start


def at(messages: list[Message]) -> list[tuple[str, int]]:
    return [(message.topic, message.offset) for message in messages]


EXPECTED = [
    [("a", 0), ("b", 0), ("a", 1), ("b", 1)],
    [("a", 2), ("b", 2), ("a", 3), ("b", 3)],
    [("a", 4), ("a", 5)],
]


@pytest.mark.parametrize("answers_at_s", [0.0, 0.1, 0.7, 30.0])
@pytest.mark.parametrize("per_poll", [1, 3, 100])
@pytest.mark.parametrize("late", ["a", "b", "empty"])
def test_batches_do_not_depend_on_when_the_broker_answers(
    consume: Consume, answers_at_s: float, per_poll: int, late: str
) -> None:
    topics = {"a": Topic([0, 2, 4, 6, 8, 9]), "b": Topic([1, 3, 5, 7]), "empty": Topic()}
    topics[late].answers_at_s = answers_at_s
    topics[late].per_poll = per_poll
    consumer, clock = consume(topics)
    batches = []
    while clock.now_s < 60:
        if batch := consumer.poll(0.5):
            batches.append(at(batch))
    assert batches == EXPECTED


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_restart_goes_on_with_the_same_batches(consume: Consume, n_before: int) -> None:
    done = [entry for batch in EXPECTED[:n_before] for entry in batch]
    offsets = {(name, 0): sum(topic == name for topic, _ in done) for name in ("a", "b")}
    consumer, _ = consume({"a": Topic([0, 2, 4, 6, 8, 9]), "b": Topic([1, 3, 5, 7])}, offsets)
    assert [at(consumer.poll(0.5)) for _ in EXPECTED[n_before:]] == EXPECTED[n_before:]


@pytest.mark.parametrize("other", [Topic(), Topic([5]), Topic([5], answers_at_s=1e9)])
def test_a_poll_ends_in_time_when_there_is_nothing_to_take(consume: Consume, other: Topic) -> None:
    consumer, clock = consume({"silent": Topic(answers_at_s=1e9), "other": other})
    for n in range(1, 4):
        assert consumer.poll(0.5) == []
        assert clock.now_s == pytest.approx(0.5 * n, abs=0.1)


def test_a_batch_that_is_not_full_waits_for_the_linger_time(consume: Consume) -> None:
    topics = {"a": Topic([0]), "b": Topic([1])}
    consumer, clock = consume(topics)
    assert at(consumer.poll(5)) == [("a", 0), ("b", 0)]
    assert 0.2 <= clock.now_s < 0.5
    topics["b"].times.append(7)
    assert at(consumer.poll(5)) == [("b", 1)]


def test_a_batch_goes_on_where_a_poll_ran_out_of_time(consume: Consume) -> None:
    # "b" has more to give than the broker, which is slow, has answered for: what is taken of "a" waits for it.
    topics = {"a": Topic([0, 1]), "b": Topic([9, 10, 11], per_poll=1)}
    consumer, _ = consume(topics)
    topics["b"].per_poll = 0
    assert at(consumer.poll(1)) == []
    assert consumer.n_buffered == 2
    topics["b"].per_poll = 100
    assert at(consumer.poll(1)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


@pytest.mark.parametrize("linger_ms", [0, 100, 450, 500, 550, 3_000])
def test_messages_are_taken_whatever_the_linger_time(consume: Consume, linger_ms: int) -> None:
    consumer, clock = consume({"a": Topic([0, 1]), "empty": Topic()}, linger_ms=linger_ms)
    taken: list[Message] = []
    while clock.now_s < 10 and len(taken) < 2:
        taken += consumer.poll(0.5)
    assert at(taken) == [("a", 0), ("a", 1)]


def test_missing_topics_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Reader):
        def __init__(self, name: str) -> None:
            super().__init__(name, Topic(), Clock())
            self.partitions = []

    monkeypatch.setattr("streams.consumer.TopicReader", lambda _, name, now_ms: Missing(name))
    with pytest.raises(TopicsMissingError, match=r"no topic a, b on .*nothing can be consumed"):
        BatchConsumer(StreamSettings(), ["a", "b"], {}, Clock())
