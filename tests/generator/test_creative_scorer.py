from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from generator.comparison import Comparison, Floats
from generator.creative_scorer import Audience, Candidate, GrmScorer, ScoresUnusable, scores_of

AUDIENCE = Audience("p0", "a lamp", 1, np.zeros((11, 128), np.float32))


def candidates(brightnesses: Sequence[int]) -> list[Candidate]:
    return [Candidate(f"prompt {b}", Image.new("RGB", (8, 8), (b, b, b))) for b in brightnesses]


class Brighter:
    """Stands for a GRM whose logits are differences of brightness: the case whose scores are known."""

    temperature = 2.0

    def logits(self, comparisons: Sequence[Comparison]) -> Floats:
        def brightness(picture: Any) -> float:
            return float(np.asarray(picture.open()).mean())

        assert all(row.title == "a lamp" and row.group_feature is AUDIENCE.feature for row in comparisons)
        return np.array([brightness(row.first) - brightness(row.second) for row in comparisons])


@given(st.lists(st.integers(0, 255), max_size=5))
def test_scores_differ_by_the_calibrated_logits_of_the_pairs(brightnesses: list[int]) -> None:
    grm: Any = Brighter()
    scores = GrmScorer(grm, "grm-v000001").score_many(AUDIENCE, candidates(brightnesses))
    assert scores.shape == (len(brightnesses),)
    assert scores.sum() == pytest.approx(0, abs=1e-9)
    wanted = np.array(brightnesses, float) / Brighter.temperature
    np.testing.assert_allclose(scores - scores[:1], wanted - wanted[:1], atol=1e-9)


@pytest.mark.parametrize("scores", [[1.0], [float("nan"), 0.0], [[1.0, 2.0]], [float("inf"), 0.0]])
def test_scores_that_rank_nothing_are_refused(scores: Any) -> None:
    class Broken:
        name = "broken"

        def score_many(self, audience: Audience, candidates: Sequence[Candidate]) -> Any:
            return scores

    with pytest.raises(ScoresUnusable, match=r"broken gave the scores .* allowed are 2 finite numbers"):
        scores_of(Broken(), AUDIENCE, candidates([1, 2]))
