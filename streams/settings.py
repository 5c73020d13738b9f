"""Settings of the streams: the broker, the topics, the join's windows and a platform's own field names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TopicSettings(BaseModel):
    """Names of the topics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    impressions: str = Field("osmf.impressions", description="Topic of impressions (in), keyed by product.")
    clicks: str = Field("osmf.clicks", description="Topic of clicks (in), keyed by product.")
    corrections: str = Field(
        "osmf.corrections",
        description="Topic of retracted clicks (in, keyed by product) and forgotten users (a copy in each partition).",
    )
    products: str = Field("osmf.products", description="Topic of products (in), keyed by product; may be compacted.")
    creatives: str = Field("osmf.creatives", description="Topic of creatives (in, and out of the generator).")
    creatives_reviewed: str = Field(
        "osmf.creatives-reviewed",
        description="Topic of people's verdicts on creatives that wait (in to the generator).",
    )
    creatives_requested: str = Field(
        "osmf.creatives-requested", description="Topic of requests for new creatives (in to the generator)."
    )
    groups_shifted: str = Field("osmf.groups-shifted", description="Topic of shifts (out), keyed by product.")
    dead_letters: str = Field("osmf.dead-letters", description="Topic of events that could not be used (out).")

    @property
    def inputs(self) -> list[str]:
        """The topics that the online process reads, in order of precedence at equal times: what is shown is known."""
        return [self.products, self.creatives, self.impressions, self.clicks, self.corrections]


class FieldMapSettings(BaseModel):
    """A platform's own field names: ours on the left, theirs on the right; dots reach into objects."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    impressions: dict[str, str] = Field({}, description='For impressions, such as {creative_id = "ad.image_id"}.')
    clicks: dict[str, str] = Field({}, description="For clicks.")
    corrections: dict[str, str] = Field({}, description="For retracted clicks and forgotten users.")
    products: dict[str, str] = Field({}, description="For products.")
    creatives: dict[str, str] = Field({}, description="For creatives.")


class JoinSettings(BaseModel):
    """Windows of the join of impressions and clicks, in event time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_lateness_s: int = Field(
        60, ge=0, description="How far the watermark stays behind the newest event, seconds of event time."
    )
    label_window_s: int = Field(
        1_800, ge=1, description="How long training waits for an impression's click, seconds of event time."
    )
    attribution_window_s: int = Field(
        86_400, ge=1, description="How long a click is still credited to its impression, seconds of event time."
    )
    max_timers_per_batch: int = Field(
        16_384,
        ge=1,
        description="Windows that one micro-batch closes at most, the oldest first: after a gap in the stream, a "
        "commit stays small, and so does what is learnt at once (measured: 50,000 took 370 MiB of memory, 16,384 some "
        "100 MiB).",
    )
    click_wait_s: int = Field(
        3_600,
        ge=0,
        description="How long a click waits for an impression that is not there yet, seconds of event time.",
    )
    max_pending_impressions: int = Field(
        20_000_000,
        ge=1,
        description="Impressions that are kept for their clicks. Of more, the oldest are closed before their "
        "attribution window has passed; the state counts how many.",
    )
    max_waiting_clicks: int = Field(
        1_000_000,
        ge=0,
        description="Clicks that may wait for their impressions. While there are as many, further ones go to the dead "
        "letters.",
    )


class StreamSettings(BaseModel):
    """The broker, the topics and how events are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bootstrap_servers: str = Field("127.0.0.1:9092", description="The brokers, host:port, separated by commas.")
    consumer_group: str = Field(
        "osmf-online", min_length=1, description="Group under which offsets are reported to the broker, for lag tools."
    )
    n_partitions: int = Field(1, ge=1, le=1024, description="Partitions of a topic that we create.")
    shared: bool = Field(
        False,
        description="Whether several `osmf online` processes share the partitions. Each partition of the topics is "
        "then a shard, with a state and a model of its own; the topics need equally many partitions, keyed by product.",
    )
    session_timeout_s: float = Field(
        10.0,
        ge=1,
        le=300,
        description="With `shared`: how long a process may be silent before its shards go to the others, seconds.",
    )
    batch_events: int = Field(4_096, ge=1, le=100_000, description="Events of a full micro-batch.")
    batch_mib: int = Field(
        16, ge=1, le=1_024, description="Size of a full micro-batch, MiB: it is full when either is reached."
    )
    read_ahead_mib: int = Field(
        64,
        ge=1,
        le=16_384,
        description="Messages that are read ahead of the micro-batch, MiB over all topics, whatever the lag. One "
        "message of each partition, and what a fetch of it brings along, may come on top.",
    )
    linger_ms: int = Field(300, ge=0, description="How long a batch that is not full waits for more, milliseconds.")
    broker_timeout_s: float = Field(
        30.0,
        ge=1,
        le=600,
        description="How long the broker may take to answer at the start, and to take an event, seconds.",
    )
    partition_check_s: float = Field(
        60.0,
        ge=1,
        le=3_600,
        description="How often it is looked whether a topic has gained partitions, seconds. They are read from their "
        "beginning.",
    )
    expired_offsets: Literal["stop", "skip"] = Field(
        "stop",
        description="What is done when the broker has dropped events before they were read. `stop`: end, and say "
        "which. `skip`: go on without them; the state counts how many were skipped.",
    )
    max_ahead_s: int = Field(
        3_600,
        ge=0,
        description="How far a time may be ahead, seconds. An impression or click that is dated further ahead "
        "than that of its message goes to the dead letters. A message that is stamped further ahead of the clock is "
        "read with the one before it in its partition, instead of holding up the partition until then.",
    )
    lag_warning_events: int = Field(
        100_000,
        ge=1,
        description="Events behind the log, over all topics, from which `osmf online` says so every minute.",
    )
    dead_letter_kib: int = Field(
        256, ge=1, le=700, description="How much of an event's bytes a dead letter carries, KiB; the rest is cut off."
    )
    outbox_events: int = Field(
        100_000,
        ge=1,
        description="Outbound events that may wait for the broker. While there are more nothing is consumed, so that "
        "none is lost.",
    )
    client_options: dict[str, str] = Field(
        {}, description="Further kafka-python client options (security_protocol, sasl_mechanism, ...)."
    )
    topics: TopicSettings = TopicSettings()
    fields: FieldMapSettings = FieldMapSettings()
    join: JoinSettings = JoinSettings()
