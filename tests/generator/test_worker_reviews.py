"""Verdicts: what people accept is published once, and what they reject never."""

from __future__ import annotations

import msgspec
import pytest

from generator.manifest import read_manifest
from generator.storage import local_path, read_bytes, read_metadata
from state.records import (
    OffsetRecord,
)
from state.store import ChangeSet, Store
from streams.codec import encode
from tests.generator.bench import REVIEWS, Killed, MakeBench, shift, stem_of, verdict


def test_in_manual_mode_a_creative_waits_until_a_person_accepts_it(make_bench: MakeBench) -> None:
    bench = make_bench(approval="manual")
    assert bench.start([encode(shift())]) == []
    assert not bench.producer.log
    assert not bench.files()
    accepted, rejected = (review.creative_id for review in bench.reviews("waiting"))
    assert {stem_of(review.image_uri) for review in bench.reviews("waiting")} == bench.reviewed_files()
    (creative,) = bench.start(
        [verdict(accepted, "accepted"), verdict(rejected, "rejected", reason="too dark")], topic=REVIEWS
    )
    bench.assert_once(1)
    assert (creative.creative_id, creative.caused_by, creative.created_at_ms) == (accepted, "shift-1", 50_000)
    payload = read_bytes(creative.image_uri or "")
    manifest = read_manifest(payload, "image/jpeg", anchors=b"")
    assert manifest is not None
    assert manifest.record == read_metadata(payload)
    assert manifest.record["creative_id"] == accepted
    assert bench.reviews("waiting") == []
    (kept,) = bench.reviews("rejected")
    assert (kept.creative_id, kept.reason, kept.reviewed_by, kept.reviewed_at_ms) == (
        rejected,
        "too dark",
        "ann",
        60_000,
    )
    assert read_bytes(kept.image_uri or "")
    assert bench.counts(REVIEWS) == OffsetRecord(2, 2, 2, 0, 0, 1_000)


def test_what_is_accepted_is_what_would_have_been_published(make_bench: MakeBench) -> None:
    auto, manual = make_bench(), make_bench(approval="manual")
    published = auto.start([encode(shift())])
    manual.start([encode(shift())])
    accepted = manual.start([verdict(c.creative_id, "accepted") for c in published], topic=REVIEWS)
    without_place = [
        [msgspec.structs.replace(c, image_uri=None, image_sha256=None) for c in of_run]
        for of_run in (published, accepted)
    ]
    assert without_place[0] == without_place[1]
    assert auto.files() == manual.files()


def test_only_the_first_verdict_counts(make_bench: MakeBench) -> None:
    bench = make_bench(approval="manual")
    bench.start([encode(shift())])
    one, other = (review.creative_id for review in bench.reviews("waiting"))
    verdicts = [
        verdict(one, "accepted"),
        verdict(one, "accepted"),
        verdict(one, "rejected"),
        verdict(other, "rejected"),
        verdict(other, "accepted"),
    ]
    assert len(bench.start(verdicts, topic=REVIEWS)) == 1
    bench.assert_once(1)
    assert bench.counts(REVIEWS) == OffsetRecord(5, 5, 5, 3, 0, 1_000)


@pytest.mark.parametrize(
    "moment", ["before the commit", "after the commit", "before the broker has it", "after the broker has it"]
)
def test_a_kill_neither_loses_nor_doubles_what_was_accepted(make_bench: MakeBench, moment: str) -> None:
    bench = make_bench(approval="manual")
    bench.start([encode(shift())])
    verdicts = [verdict(review.creative_id, "accepted") for review in bench.reviews("waiting")]

    def commit(store: Store, changes: ChangeSet) -> None:
        if moment == "after the commit":
            Store.commit(store, changes)
        raise Killed

    if "broker" in moment:
        bench.producer.fail_with = Killed()
        bench.producer.acknowledged_before_failure = moment == "after the broker has it"
    with pytest.raises(Killed):
        bench.start(verdicts, topic=REVIEWS, commit=Store.commit if "broker" in moment else commit)
    bench.start(verdicts, topic=REVIEWS)
    bench.assert_once(2)
    assert bench.counts(REVIEWS) == OffsetRecord(2, 2, 2, 0, 0, 1_000)


def test_what_waits_or_was_rejected_is_not_proposed_again(make_bench: MakeBench) -> None:
    bench = make_bench(approval="manual", exploration=0.0)
    bench.start([encode(shift())])
    rejected, _ = bench.reviews("waiting")
    bench.start([verdict(rejected.creative_id, "rejected")], topic=REVIEWS)
    bench.start([encode(shift()), encode(shift("shift-2"))])
    prompts = [review.prompt for review in (*bench.reviews("waiting"), *bench.reviews("rejected"))]
    assert len(set(prompts)) == len(prompts) == 4


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"not json", "bad_json"),
        (verdict("gen-none", "accepted"), "unknown_creative"),
        (verdict("gen-none", "accepted", product_id="ü" * 100), "unknown_creative"),
        (verdict("x", "accepted").replace(b'"accepted"', b'"perhaps"'), "invalid_field"),
    ],
)
def test_a_verdict_on_nothing_is_dead_lettered(make_bench: MakeBench, payload: bytes, reason: str) -> None:
    bench = make_bench(approval="manual")
    bench.start([payload], topic=REVIEWS)
    (letter,) = bench.producer.dead_letters()
    assert (letter.reason, letter.topic, letter.payload) == (reason, REVIEWS, payload)
    assert bench.counts(REVIEWS) == OffsetRecord(1, 1, 0, 0, 1, 1_000)


def test_a_picture_that_was_changed_while_it_waited_is_not_published(make_bench: MakeBench) -> None:
    bench = make_bench(approval="manual")
    bench.start([encode(shift())])
    review, _ = bench.reviews("waiting")
    path = local_path(review.image_uri or "")
    assert path is not None
    payload = bytearray(path.read_bytes())
    payload[-10] ^= 1
    path.write_bytes(payload)
    assert bench.start([verdict(review.creative_id, "accepted")], topic=REVIEWS) == []
    (letter,) = bench.producer.dead_letters()
    assert letter.reason == "unreadable_image"
    assert "changed or damaged" in letter.detail
    assert review in bench.reviews("waiting")
