"""Shift detection: no alarm while tastes stay, one soon after they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.settings import ShiftSettings
from online.shift import CellCounts, Shift, ShiftDetection, Stretch, contradiction_scores, locate_change, sum_cells
from state.store import ChangeSet, Store, Table

# Fixed here, so that the cases stay what they are when the defaults are tuned.
SETTINGS = ShiftSettings(
    warm_up_impressions=2_000, threshold=40.0, delta=0.15, min_impressions=200, cool_down_impressions=3_000
)
BATCH = 100
CELLS: CellCounts = {(1, "a"): (60, 6), (2, "a"): (40, 1)}


def feed(
    detection: ShiftDetection,
    n: int,
    scores: Callable[[int], npt.NDArray[np.float64]],
    product: str = "p",
    cells: CellCounts = CELLS,
) -> Iterator[tuple[int, Shift]]:
    """Feed n impressions in batches; yield each shift with the number of impressions up to it."""
    for end in range(BATCH, n + 1, BATCH):
        shift = detection.observe(product, scores(BATCH), cells)
        if shift is not None:
            yield end, shift


def null_scores(seed: int, mean: float = 0.0) -> Callable[[int], npt.NDArray[np.float64]]:
    """Scores of users whose clicks have nothing to do with what was seen in them, at 6% CTR."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> npt.NDArray[np.float64]:
        p = np.full(n, 0.06, np.float32)
        clicks = (rng.random(n) < 0.06).astype(np.float32)
        return contradiction_scores(clicks, p, rng.standard_normal(n).astype(np.float32)) + mean

    return draw


def taste_scores(seed: int, sign: float, strength: float = 0.6) -> Callable[[int], npt.NDArray[np.float64]]:
    """Scores where the preference that the model sees is true (sign 1) or has turned round (sign -1)."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> npt.NDArray[np.float64]:
        seen = strength * rng.standard_normal(n)
        base = np.log(0.06 / 0.94)
        p_seen = 1 / (1 + np.exp(-(base + seen)))
        p_true = 1 / (1 + np.exp(-(base + sign * seen)))
        clicks = (rng.random(n) < p_true).astype(np.float32)
        return contradiction_scores(clicks, p_seen.astype(np.float32), seen.astype(np.float32))

    return draw


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(null_scores(1), id="clicks that nothing explains"),
        pytest.param(taste_scores(2, 1), id="tastes that stay"),
        pytest.param(null_scores(3, mean=-0.1), id="a model that still learns"),
    ],
)
def test_no_alarm_in_100_000_impressions_without_a_change(scores: Callable[[int], npt.NDArray[np.float64]]) -> None:
    assert list(feed(ShiftDetection(SETTINGS), 100_000, scores)) == []


def test_the_default_settings_raise_few_false_alarms() -> None:
    n_alarms = sum(len(list(feed(ShiftDetection(ShiftSettings()), 50_000, taste_scores(seed, 1)))) for seed in range(8))
    assert n_alarms <= 4  # in 400,000 impressions


def test_a_suspicion_that_does_not_hold_is_no_shift() -> None:
    detection = ShiftDetection(SETTINGS)
    rng = np.random.default_rng(0)
    list(feed(detection, 3_000, null_scores(1)))
    jump = np.zeros(BATCH)
    jump[:5] = 15.0  # a few clicks of users who hardly ever click
    assert detection.observe("p", jump, CELLS) is None  # over the threshold, but too little evidence
    assert list(feed(detection, 3_000, lambda n: rng.normal(-0.1, 0.1, n))) == []


@pytest.mark.parametrize("seed", range(4))
def test_tastes_that_turn_round_are_found_and_placed(seed: int) -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, 10_000, taste_scores(seed, 1))) == []
    found = list(feed(detection, 1_500, taste_scores(100 + seed, -1)))
    assert len(found) == 1
    after, shift = found[0]
    assert shift.product_id == "p"
    assert shift.statistic >= SETTINGS.threshold
    # The change is placed where it was, to within some batches, and its evidence is what came since.
    assert abs(shift.n_impressions - after) <= 400
    n_batches = shift.n_impressions // BATCH
    assert shift.cells == {key: (n * n_batches, x * n_batches) for key, (n, x) in CELLS.items()}


def test_one_product_changing_says_nothing_of_another() -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, 5_000, taste_scores(0, 1))) == []
    assert list(feed(detection, 5_000, taste_scores(2, 1), product="q")) == []
    assert [shift.product_id for _, shift in feed(detection, 2_000, taste_scores(3, -1), product="q")] == ["q"]
    assert list(feed(detection, 5_000, taste_scores(4, 1))) == []


def test_no_shift_in_warm_up_nor_in_cool_down() -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, SETTINGS.warm_up_impressions, taste_scores(1, -1))) == []
    found = list(feed(detection, 20_000, taste_scores(2, -1)))
    assert len(found) >= 2
    gaps = np.diff([after for after, _ in found])
    assert (gaps >= SETTINGS.cool_down_impressions).all()


def test_a_shift_waits_for_its_evidence() -> None:
    detection = ShiftDetection(SETTINGS.model_copy(update={"min_impressions": 3_000}))
    list(feed(detection, 4_000, taste_scores(0, 1)))
    found = list(feed(detection, 6_000, taste_scores(2, -1)))
    assert found
    assert all(shift.n_impressions >= 3_000 for _, shift in found)


def test_a_detector_goes_on_from_the_state(tmp_path: Path) -> None:
    undisturbed = ShiftDetection(SETTINGS)
    before, after = taste_scores(0, 1), taste_scores(2, -1)
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        restarted = ShiftDetection(SETTINGS)
        outcomes: list[list[Shift | None]] = [[], []]
        for n_batch in range(80):
            scores = (before if n_batch < 60 else after)(BATCH)
            changes = ChangeSet()
            outcomes[0].append(undisturbed.observe("p", scores, CELLS))
            outcomes[1].append(restarted.observe("p", scores, CELLS))
            restarted.write(changes)
            store.commit(changes)
            restarted = ShiftDetection(SETTINGS)
            with store.read() as txn:
                restarted.restore(txn)
    assert outcomes[0] == outcomes[1]
    assert sum(shift is not None for shift in outcomes[0]) == 1


def test_a_detector_that_is_restarted_starts_with_its_warm_up(tmp_path: Path) -> None:
    detection = ShiftDetection(SETTINGS)
    list(feed(detection, 3_000, taste_scores(0, 1)))
    changes = ChangeSet()
    detection.write(changes)
    detection.restart("p")
    detection.restart("never seen")
    detection.write(changes)
    assert changes.get(Table.DETECTORS, b"p") is None
    assert list(feed(detection, SETTINGS.warm_up_impressions, taste_scores(2, -1))) == []


@pytest.mark.parametrize(
    ("sums", "delta", "expected"),
    [
        ([-5.0, -5.0, 3.0, 4.0], 0.0, (2, 7.0)),
        ([5.0, -9.0, 3.0, 4.0], 0.0, (2, 7.0)),
        ([5.0, -1.0, 3.0, 4.0], 0.0, (0, 11.0)),
        ([-1.0, -1.0], 0.0, (2, 0.0)),
        ([3.0, 4.0], 0.5, (2, 0.0)),  # 10 scores tolerate 5: neither is an excess
        ([3.0, 7.0], 0.5, (1, 2.0)),
        ([], 0.1, (0, 0.0)),
    ],
)
def test_a_change_lies_where_the_stretch_since_says_most(
    sums: list[float], delta: float, expected: tuple[int, float]
) -> None:
    stretches = [Stretch(10, total, {}) for total in sums]
    assert locate_change(stretches, delta) == expected


cell_counts = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from("ab")), st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4
)


@given(st.lists(cell_counts, max_size=5))
def test_cells_of_stretches_add_up(of_each: list[CellCounts]) -> None:
    total = sum_cells([Stretch(1, 0.0, cells) for cells in of_each])
    assert set(total) == {key for cells in of_each for key in cells}
    for key, (n, x) in total.items():
        assert n == sum(cells.get(key, (0, 0))[0] for cells in of_each)
        assert x == sum(cells.get(key, (0, 0))[1] for cells in of_each)


def test_scores_contradict_when_clicks_come_where_they_were_not_expected() -> None:
    p = np.full(4, 0.5, np.float32)
    preference = np.array([1, 1, -1, -1], np.float32)
    scores = contradiction_scores(np.array([1, 0, 0, 1], np.float32), p, preference)
    assert scores.tolist() == pytest.approx([-1, 1, -1, 1])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_scores_are_finite_for_users_who_are_all_alike_and_predictions_that_are_sure(n: int) -> None:
    for p in (0.0, 1.0):
        scores = contradiction_scores(np.ones(n, np.float32), np.full(n, p, np.float32), np.ones(n, np.float32))
        assert np.isfinite(scores).all()
        assert (scores == 0).all()  # nothing was seen in anyone, so nothing is contradicted
