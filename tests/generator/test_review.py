"""A person's verdict holds once, and only on what waits."""

from __future__ import annotations

import msgspec
import pytest

from generator.review import ReviewRecord, ReviewStatus, UnusableReview, judge
from streams.events import CreativeReviewed, Verdict

WAITING = ReviewRecord("gen-1", "p-1", 2, "shift-1", 50_000, "a prompt", 0.02, "file:///x.jpg", "waiting")


def verdict(word: Verdict, reason: str = "") -> CreativeReviewed:
    return CreativeReviewed(
        creative_id="gen-1", product_id="p-1", verdict=word, reviewed_by="ann", reviewed_at_ms=60_000, reason=reason
    )


@pytest.mark.parametrize("word", ["accepted", "rejected"])
def test_a_verdict_is_kept_with_its_reason_and_whose_it_is(word: Verdict) -> None:
    judged = judge(verdict(word, "too dark"), WAITING)
    assert judged == msgspec.structs.replace(
        WAITING, status=word, reason="too dark", reviewed_by="ann", reviewed_at_ms=60_000
    )


@pytest.mark.parametrize("status", ["accepted", "rejected"])
@pytest.mark.parametrize("word", ["accepted", "rejected"])
def test_the_first_verdict_holds(status: ReviewStatus, word: Verdict) -> None:
    assert judge(verdict(word), msgspec.structs.replace(WAITING, status=status)) is None


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        (None, "no creative 'gen-1' of product 'p-1' waits"),
        (
            msgspec.structs.replace(WAITING, status="refused", reason="safe: unsafe"),
            "refused by the checks .safe: unsafe",
        ),
    ],
)
def test_what_does_not_wait_cannot_be_accepted(record: ReviewRecord | None, detail: str) -> None:
    with pytest.raises(UnusableReview, match=detail) as caught:
        judge(verdict("accepted"), record)
    assert caught.value.reason == "unknown_creative"
