"""Errors of the streams: what is wrong with the log or the broker, what was kept, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class ConsumerError(RuntimeError):
    """The log cannot be consumed from where the state stands."""


class BrokerAwayError(ConsumerError):
    """No broker answers."""

    def __init__(self, bootstrap_servers: str, cause: BaseException) -> None:
        super().__init__(
            f"no broker answers at {bootstrap_servers} ({cause}): nothing was consumed, and the state is as it was. "
            "Start the broker, or set streams.bootstrap_servers to one that runs; started again, this process goes on "
            "where the state stands."
        )


class TopicReadError(ConsumerError):
    """The broker refuses to let a topic be read."""

    def __init__(self, topic: str, cause: BaseException) -> None:
        super().__init__(
            f"{topic} cannot be read ({type(cause).__name__}: {cause}): this process ends, and the state is as of the "
            "last commit. See to the topic and the rights on it, and start again: it goes on from there."
        )


class StateAheadOfBrokerError(ConsumerError):
    """The state has consumed more of a partition than the broker holds: it is another log."""

    def __init__(self, topic: str, partition: int, wanted: int, end: int) -> None:
        super().__init__(
            f"{topic}[{partition}] ends at offset {end} on the broker, the state continues at {wanted}: this is not "
            "the log that the state was built from. Nothing was consumed. Point streams.bootstrap_servers to the "
            "right broker, or start with a new state.path."
        )


class OffsetsExpiredError(ConsumerError):
    """The broker no longer has messages that have not been consumed."""

    def __init__(self, topic: str, partition: int, wanted: int, first: int) -> None:
        super().__init__(
            f"{topic}[{partition}] starts at offset {first} on the broker, the state continues at {wanted}: "
            f"{first - wanted} events ({wanted} to {first - 1}) have expired and were never counted. Nothing of them "
            "is skipped unasked. Restore those events and raise the topic's retention; or start with a new state.path; "
            'or set streams.expired_offsets = "skip", which goes on without them and counts them in the state.'
        )


class TopicsMissingError(ConsumerError):
    """A topic that is to be read is not on the broker."""

    def __init__(self, missing: list[str], bootstrap_servers: str) -> None:
        super().__init__(
            f"no topic {', '.join(missing)} on {bootstrap_servers}: nothing can be consumed. Create them "
            "(`osmf broker --topics-only` does on a running broker), or set streams.topics to the names in use."
        )


class NotCopartitionedError(ConsumerError):
    """Topics that are to be read partition by partition do not have as many of them."""

    def __init__(self, n_partitions: Mapping[str, int]) -> None:
        counts = ", ".join(f"{topic} has {n}" for topic, n in n_partitions.items())
        super().__init__(
            f"the topics differ in their partitions ({counts}): with streams.shared each partition is a shard of its "
            "own, and a product's events must have the same partition in every topic. Nothing was consumed. Give all "
            "of these topics the same number of partitions and key them by product, or set streams.shared to false."
        )
