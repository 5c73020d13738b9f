"""Shared shards: those of the consumer group's shards that this process is given at the time."""

from __future__ import annotations

import logging
from collections.abc import Callable

from online.pipeline import BatchSummary
from online.shard import Shard
from state.errors import StateFencedError
from streams.membership import Membership

log = logging.getLogger(__name__)

POLL_S = 0.02
"""How long one of several shards waits for messages before the next one's turn, seconds."""

FIRST_POLL_S = 1.0
"""How long a shard that has just been taken over may wait: until the broker has answered, and its silent partitions
have been silent for the linger time, it has nothing to work off."""


class SharedShards:
    """Works off the shards that this process is given, in turn.

    A shard that is given away is closed after the batch in hand. One whose commit was refused, because another process
    has taken it over already, is left alone until the group has shared out anew: this process was away, and what it
    believes to own is out of date.

    Parameters
    ----------
    membership
        Tells which partitions are given.
    open_shard
        Opens the shard of a partition, and takes its state over.
    """

    def __init__(self, membership: Membership, open_shard: Callable[[int], Shard]) -> None:
        self._membership = membership
        self._open_shard = open_shard
        self._shards: dict[int, Shard] = {}
        self._lost: set[int] = set()
        self._n_rounds = 0

    def step(self) -> list[BatchSummary] | None:
        """Work off at most one micro-batch of each shard; None when there was no time to be idle.

        That is while this process is given no shard, and when it has just taken one over.
        """
        n_rounds, given = self._membership.poll()
        if n_rounds != self._n_rounds:
            self._n_rounds = n_rounds
            self._lost.clear()
        for partition in sorted(self._shards.keys() - given):
            self._give_away(partition)
        new = sorted(given - self._shards.keys() - self._lost)
        for partition in new:
            self._shards[partition] = self._open_shard(partition)
            log.info("shard %d: taken over", partition)
        summaries = []
        for partition, shard in list(self._shards.items()):
            try:
                summary = shard.step(FIRST_POLL_S if partition in new else POLL_S)
            except StateFencedError as error:
                log.warning("shard %d: %s", partition, error)
                self._shards.pop(partition).close()
                self._lost.add(partition)
                continue
            if summary is not None:
                summaries.append(summary)
                self._membership.report(shard.next_offsets())
        return summaries if given and not new else summaries or None

    def _give_away(self, partition: int) -> None:
        shard = self._shards.pop(partition)
        try:
            shard.finish()
        except StateFencedError:
            log.info("shard %d: the new owner was quicker", partition)
        finally:
            shard.close()
        log.info("shard %d: given away", partition)

    def finish(self) -> None:
        """End in order: what the broker has acknowledged is removed from the states."""
        for partition in list(self._shards):
            self._give_away(partition)

    def close(self) -> None:
        """Close the shards and leave the group."""
        for partition in list(self._shards):
            self._shards.pop(partition).close()
        self._membership.close()
