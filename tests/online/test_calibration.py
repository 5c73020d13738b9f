"""How far users follow the preferences that the model sees in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from online.calibration import SLOPE_RANGE, PreferenceCalibration
from online.rows import LabelledRows, Rows
from state.store import ChangeSet, Store


def labelled(clicks: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> LabelledRows:
    """Labels of whatever rows; all given but where ``weights`` say otherwise."""
    labels = np.asarray(clicks, np.float32)
    n = len(labels)
    rows = Rows(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 1), np.uint8))
    return LabelledRows(rows, labels, np.asarray(np.ones(n) if weights is None else weights, np.float32))


def observed(
    calibration: PreferenceCalibration,
    true_slope: float,
    rng: np.random.Generator,
    *,
    n_rows: int,
    strength: float = 0.4,
    category: str | None = None,
) -> None:
    for _ in range(n_rows // 1_000):
        preference = strength * rng.standard_normal(1_000)
        base = np.log(0.06 / 0.94)
        clicks = (rng.random(1_000) < 1 / (1 + np.exp(-base - true_slope * preference))).astype(np.float32)
        p_click = (1 / (1 + np.exp(-base - preference))).astype(np.float32)
        calibration.observe_many(labelled(clicks), p_click, preference, category)


def test_preferences_are_believed_at_first() -> None:
    assert PreferenceCalibration().slope() == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("true_slope", [0.7, 1.0, 1.3])
def test_the_slope_is_how_far_users_follow_their_preferences(seed: int, true_slope: float) -> None:
    calibration = PreferenceCalibration()
    observed(calibration, true_slope, np.random.default_rng(seed), n_rows=200_000)
    assert calibration.slope() == pytest.approx(true_slope, abs=0.07)


def test_a_change_of_tastes_in_one_category_of_ten_is_not_the_habit_soon() -> None:
    calibration, rng = PreferenceCalibration(), np.random.default_rng(4)
    observed(calibration, 1.2, rng, n_rows=200_000)
    before = calibration.slope()
    observed(calibration, -1.2, rng, n_rows=2_000)
    assert calibration.slope() > before - 0.1


@pytest.mark.parametrize(("true_slope", "bound"), [(-3.0, SLOPE_RANGE[0]), (5.0, SLOPE_RANGE[1])])
def test_the_slope_is_bounded(true_slope: float, bound: float) -> None:
    calibration = PreferenceCalibration()
    observed(calibration, true_slope, np.random.default_rng(5), n_rows=100_000)
    assert calibration.slope() == bound


def test_users_without_preferences_tell_nothing() -> None:
    calibration = PreferenceCalibration()
    observed(calibration, 0.0, np.random.default_rng(6), n_rows=50_000, strength=0.0)
    assert calibration.slope() == 1


def test_a_label_that_is_taken_back_and_given_anew_is_as_if_it_had_been_known() -> None:
    rng = np.random.default_rng(8)
    clicks = (rng.random(2_000) < 0.3).astype(np.float32)
    late = (clicks > 0) & (rng.random(2_000) < 0.5)
    p_click, preference = np.full(2_000, 0.3, np.float32), rng.standard_normal(2_000)
    at_once, corrected = PreferenceCalibration(), PreferenceCalibration()
    at_once.observe_many(labelled(clicks), p_click, preference)
    corrected.observe_many(labelled(np.where(late, 0, clicks)), p_click, preference)
    assert abs(corrected.slope() - at_once.slope()) > 0.01
    n_late = int(late.sum())
    pairs = labelled([0] * n_late + [1] * n_late, [-1] * n_late + [1] * n_late)
    corrected.observe_many(pairs, np.tile(p_click[late], 2), np.tile(preference[late], 2))
    assert corrected.slope() == pytest.approx(at_once.slope(), abs=1e-9)


def test_a_category_has_a_slope_of_its_own() -> None:
    calibration, rng = PreferenceCalibration(), np.random.default_rng(9)
    for _ in range(50):  # side by side
        observed(calibration, 1.0, rng, n_rows=1_000, category="lamps")
        observed(calibration, 1.5, rng, n_rows=1_000, category="shoes")
    assert calibration.slope("lamps") == pytest.approx(1.0, abs=0.12)
    assert calibration.slope("shoes") == pytest.approx(1.5, abs=0.12)
    assert calibration.slope() == pytest.approx(1.25, abs=0.1)
    # Nothing is known of a third, nor any more of one whose tastes have changed: they are as all.
    calibration.restart("shoes")
    assert calibration.slope("hats") == calibration.slope("shoes") == calibration.slope()


def test_a_few_impressions_hardly_move_the_slope_of_a_category() -> None:
    calibration, rng = PreferenceCalibration(), np.random.default_rng(10)
    observed(calibration, 1.2, rng, n_rows=100_000, category="lamps")
    observed(calibration, 0.2, rng, n_rows=1_000, category="shoes")
    assert 0 < calibration.slope() - calibration.slope("shoes") < 0.5


def test_a_change_of_tastes_is_not_the_habit_of_its_category_soon() -> None:
    calibration, rng = PreferenceCalibration(), np.random.default_rng(11)
    observed(calibration, 1.3, rng, n_rows=50_000, category="lamps")
    before = calibration.slope("lamps")
    observed(calibration, 0.0, rng, n_rows=1_000, category="lamps")
    assert calibration.slope("lamps") > before - 0.15


def test_the_slope_survives_the_state(tmp_path: Path) -> None:
    calibration = PreferenceCalibration()
    observed(calibration, 1.3, np.random.default_rng(7), n_rows=50_000, category="lamps")
    changes = ChangeSet()
    calibration.write(changes)
    with Store(tmp_path, sync=False) as store:
        store.commit(changes)
        again = PreferenceCalibration()
        with store.read() as txn:
            again.restore(txn)
    assert (again.slope(), again.slope("lamps")) == (calibration.slope(), calibration.slope("lamps"))
    assert again.slope("lamps") != again.slope()
    nothing = ChangeSet()
    calibration.write(nothing)
    assert len(nothing) == 0
