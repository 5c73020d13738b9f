"""Lag: how many messages of each partition the log is ahead of the state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from streams.errors import BrokerAwayError
from streams.settings import StreamSettings

Partition = tuple[str, int]

_WARN_EVERY_S: Final = 60.0
_MOST_NAMED: Final = 4
_POLL_MS: Final = 50


def lag_words(lag: Mapping[Partition, int]) -> str:
    """Return the partitions that are behind, the furthest first, in words."""
    behind = sorted(((n, partition) for partition, n in lag.items() if n), reverse=True)
    named = [f"{topic}[{number}] {n:,}" for n, (topic, number) in behind[:_MOST_NAMED]]
    more = len(behind) - len(named)
    return ", ".join(named) + (f" and {more} more partitions" if more > 0 else "")


class LagWatch:
    """Says when a consumer falls behind, while it is, and when it has caught up.

    Parameters
    ----------
    warning_events
        Messages, over all partitions, from which it is behind.
    """

    def __init__(self, warning_events: int) -> None:
        self._warning_events = warning_events
        self._said_s: float | None = None

    def observe(self, lag: Mapping[Partition, int], now_s: float) -> str | None:
        """Take in the lag of every partition; return what there is to say, if anything."""
        total = sum(lag.values())
        if total < self._warning_events:
            # Not at the same threshold, or a lag about it would be said and taken back all the time.
            if self._said_s is None or total > self._warning_events / 10:
                return None
            self._said_s = None
            return f"caught up: {total:,} events behind the log"
        if self._said_s is not None and now_s - self._said_s < _WARN_EVERY_S:
            return None
        self._said_s = now_s
        return (
            f"{total:,} events behind the log: {lag_words(lag)}. Nothing is lost as long as the topics keep them; "
            "memory does not grow with it"
        )


def read_lag(
    settings: StreamSettings, offsets: Mapping[Partition, int], timeout_s: float = 10.0
) -> dict[Partition, int]:
    """Ask the broker how many messages each partition is ahead of a state.

    Parameters
    ----------
    settings
        The broker.
    offsets
        Where each partition of the state continues. Further partitions of the same topics are looked at too.
    timeout_s
        How long an answer may take.

    Raises
    ------
    BrokerAwayError
        No broker answers in time.
    """
    from kafka import KafkaConsumer, TopicPartition
    from kafka.errors import KafkaError

    consumer: Any = None
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=1,
            bootstrap_timeout_ms=int(timeout_s * 1000),
            **settings.client_options,
        )
        partitions = {
            TopicPartition(topic, number)
            for topic in {topic for topic, _ in offsets}
            for number in consumer.partitions_for_topic(topic) or ()
        }
        lag: dict[Partition, int] = {}
        # One after the other: of several, one with messages would be fetched again and again before the next is.
        for each in sorted(partitions):
            consumer.assign([each])
            first = consumer.beginning_offsets([each])[each]
            wanted = max(offsets.get((each.topic, each.partition), first), first)
            consumer.seek(each, wanted)
            deadline_s = time.monotonic() + timeout_s
            # Not ``end_offsets``: the local broker answers with the first offset of the last batch.
            while consumer.highwater(each) is None:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no answer for {each.topic}[{each.partition}] within {timeout_s:g} s")
                consumer.poll(timeout_ms=_POLL_MS)
            lag[each.topic, each.partition] = max(consumer.highwater(each) - wanted, 0)
        return lag
    except (KafkaError, TimeoutError) as error:
        raise BrokerAwayError(settings.bootstrap_servers, error) from error
    finally:
        if consumer is not None:
            consumer.close(autocommit=False)
