"""What the model expects of groups, and how far it has proved right."""

from __future__ import annotations

import numpy as np
import pytest

from online.ctr import shrink
from online.expectation import (
    CAUTION,
    MAX_LOG_RELATIVE,
    MAX_SLOPE,
    PRIOR_INFORMATION,
    Expectations,
    expected_log_relative,
    group_ctrs,
    read_relative_ctrs,
    slope,
)
from online.rows import LabelledRows, Rows
from state.reading import open_view
from state.records import SlopeRecord
from state.store import ChangeSet, Store

CREATIVES = [4, 7, 9]
GROUPS = [2, 5]


def logit(p):
    return np.log(p / (1 - p))


def test_a_group_is_expected_to_prefer_what_its_users_would_click():
    p = np.array([[0.10, 0.02], [0.10, 0.02], [0.02, 0.10], [0.02, 0.10]], np.float32)
    table = expected_log_relative(p, np.array([0, 0, 1, 1]), 2)
    assert table[0] == pytest.approx([np.log(5) / 2, -np.log(5) / 2], abs=1e-5)
    assert table[1] == pytest.approx(-table[0], abs=1e-5)


def test_clicking_more_on_everything_is_no_preference():
    p = np.array([[0.02, 0.04], [0.10, 0.20]], np.float32)
    assert expected_log_relative(p, np.array([0, 1]), 2) == pytest.approx(np.zeros((2, 2)), abs=1e-6)


def test_a_group_without_users_is_expected_to_be_as_all_are():
    p = np.array([[0.02, 0.10], [0.10, 0.02]], np.float32)
    assert expected_log_relative(p, np.array([0, 2]), 3)[1] == pytest.approx([0, 0], abs=1e-6)


def test_expectations_are_bounded():
    p = np.array([[1e-6, 0.9], [0.9, 1e-6]], np.float32)
    assert np.abs(expected_log_relative(p, np.array([0, 1]), 2)).max() == MAX_LOG_RELATIVE


def labelled(creatives, clicks, weights=None):
    n = len(creatives)
    rows = Rows(np.zeros(n, np.int64), np.asarray(creatives), np.zeros((n, 1), np.uint8))
    return LabelledRows(
        rows, np.asarray(clicks, np.float32), np.asarray(np.ones(n) if weights is None else weights, np.float32)
    )


def observed(expectations, log_relative, true_slope, rng, n_rows=40_000, batch_rows=1_000):
    """Show creatives by chance to users who follow the expectation ``true_slope`` times."""
    for _ in range(n_rows // batch_rows):
        groups, columns = rng.integers(2, size=batch_rows), rng.integers(3, size=batch_rows)
        expected = log_relative[groups, columns]
        base = logit(0.06)
        clicks = (rng.random(batch_rows) < 1 / (1 + np.exp(-base - true_slope * expected))).astype(np.float32)
        predicted = (1 / (1 + np.exp(-base - expected))).astype(np.float32)
        given = labelled(np.array(CREATIVES)[columns], clicks)
        expectations.observe_many("p", "shoes", np.array(GROUPS)[groups], given, predicted)


@pytest.fixture
def log_relative():
    return np.array([[0.5, -0.5, 0.0], [-0.4, 0.5, -0.1]], np.float32)


@pytest.fixture
def expectations(log_relative):
    expectations = Expectations()
    expectations.put("p", GROUPS, CREATIVES, log_relative, 500)
    return expectations


def weight(expectations, log_relative):
    """Return the slope, read from what is expected of one cell."""
    return np.log(expectations.relative_ctrs("p", "shoes", [2], [4])[0, 0]) / log_relative[0, 0]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("true_slope", "low", "high"),
    [(1.0, 0.85, 1.2), (1.4, 1.2, 1.7), (0.5, 0.35, 0.65), (0.0, 0.0, 0.13), (-1.0, 0.0, 0.0)],
)
def test_the_slope_is_how_far_clicks_follow_the_expectation(expectations, log_relative, seed, true_slope, low, high):
    observed(expectations, log_relative, true_slope, np.random.default_rng(seed))
    assert low <= weight(expectations, log_relative) <= high


def test_nothing_counts_before_it_has_proved_right(expectations):
    assert (expectations.relative_ctrs("p", "shoes", GROUPS, CREATIVES) == 1).all()
    assert slope(None, None) == slope(SlopeRecord(0.0, 0.0), SlopeRecord(0.0, 0.0)) == 0


@pytest.mark.parametrize(
    ("of_all", "of_category", "expected"),
    [
        ((96, 96), None, 0.86),  # a new category is as the others are, but for a standard error of a tenth
        ((96, 96), (396, 396), 0.999),
        ((96, 96), (-10, 36), 0.0),
        ((96, 96), (0, 36), 0.086),
        ((-50, 40), None, 0.0),
        ((2, 0), None, 0.0),  # half a standard deviation, which chance explains
        ((9.6, 96), None, 0.0),
        ((19.2, 96), None, 0.092),
        (None, (16, 36), 0.4),
        ((1e6, 100), None, MAX_SLOPE),
        ((126, 96), (520, 396), 1.31),
    ],
)
def test_a_category_has_the_slope_of_all_until_it_shows_its_own(of_all, of_category, expected):
    records = [record and SlopeRecord(*record) for record in (of_all, of_category)]
    assert slope(*records) == pytest.approx(expected, abs=0.005)


def test_caution_is_in_standard_errors_of_the_slope_of_all_alone():
    for information in (12.0, 96.0, 9_996.0):
        record = SlopeRecord(0.7 * (information + PRIOR_INFORMATION), information)
        error = (information + PRIOR_INFORMATION) ** -0.5
        assert slope(record, None) == pytest.approx(0.7 - CAUTION * error, abs=1e-9)
    # What a category has shown itself is not held against it: only the belief that it starts from is cautious.
    of_category = SlopeRecord(0.7 * 9_996, 9_996)
    without, with_all = slope(None, of_category), slope(SlopeRecord(70, 96), of_category)
    assert 0 < with_all - without < PRIOR_INFORMATION / 9_996


def test_what_chance_explains_is_not_believed_in_most_worlds(log_relative):
    found = []
    for seed in range(40):
        expectations = Expectations()
        expectations.put("p", GROUPS, CREATIVES, log_relative, 500)
        observed(expectations, log_relative, 0.0, np.random.default_rng(seed), n_rows=2_000)
        # A category of its own: what is believed of it is what all have shown.
        found.append(np.log(expectations.relative_ctrs("p", "hats", [2], [4])[0, 0]) / log_relative[0, 0])
    assert np.mean(np.array(found) == 0) >= 0.75  # without caution in half of them


def test_a_click_that_comes_late_is_as_if_it_had_been_known(log_relative):
    rng = np.random.default_rng(9)
    n = 4_000
    places, columns = rng.integers(2, size=n), rng.integers(3, size=n)
    groups, creatives = np.array(GROUPS)[places], np.array(CREATIVES)[columns]
    p_click = (0.2 * np.exp(log_relative[places, columns])).astype(np.float32)
    clicks = rng.random(n) < p_click
    late = clicks & (rng.random(n) < 0.5)
    weights = []
    for corrected in (False, True):
        expectations = Expectations()
        expectations.put("p", GROUPS, CREATIVES, log_relative, 500)
        labels = clicks & ~late if corrected else clicks
        expectations.observe_many("p", "shoes", groups, labelled(creatives, labels), p_click)
        if corrected:
            assert weight(expectations, log_relative) < weights[0] - 0.05
            signs = np.repeat([-1, 1], late.sum())
            pairs = labelled(np.tile(creatives[late], 2), signs > 0, signs)
            expectations.observe_many("p", "shoes", np.tile(groups[late], 2), pairs, np.tile(p_click[late], 2))
        weights.append(weight(expectations, log_relative))
    assert weights[1] == pytest.approx(weights[0], abs=1e-6)


def test_tastes_that_turn_round_take_the_trust_away_before_anybody_says_so(expectations, log_relative):
    rng = np.random.default_rng(4)
    observed(expectations, log_relative, 1.0, rng)
    observed(expectations, log_relative, -1.0, rng, n_rows=12_000)
    assert weight(expectations, log_relative) < 0.2


def test_a_change_of_tastes_starts_the_slope_anew(expectations, log_relative):
    observed(expectations, log_relative, 1.0, np.random.default_rng(5))
    expectations.restart("p", "shoes")
    assert weight(expectations, log_relative) < 0.1


def test_products_of_a_category_share_their_slope_and_what_becomes_of_it(expectations, log_relative):
    for product_id in ("q", "r"):
        expectations.put(product_id, GROUPS, CREATIVES, log_relative, 500)
    observed(expectations, log_relative, 1.0, np.random.default_rng(6))
    assert (expectations.relative_ctrs("q", "shoes", GROUPS, CREATIVES) != 1).any()
    expectations.restart("p", "shoes")
    assert np.log(expectations.relative_ctrs("q", "shoes", GROUPS, CREATIVES)) == pytest.approx(0, abs=0.05)
    assert np.log(expectations.relative_ctrs("r", None, GROUPS, CREATIVES)).max() > 0.3


def test_unknown_products_groups_and_creatives_are_expected_to_be_as_all_are(expectations, log_relative):
    observed(expectations, log_relative, 1.0, np.random.default_rng(7))
    assert (expectations.relative_ctrs("unknown", "shoes", GROUPS, CREATIVES) == 1).all()
    found = expectations.relative_ctrs("p", "shoes", [5, 77], [9, 4, 55])
    assert (found[1] == 1).all()
    assert (found[:, 2] == 1).all()
    assert (found[0, :2] < 1).all()
    before = weight(expectations, log_relative)
    nobody = np.array([77, 2, 77]), np.array([4, 55, 55])
    group_ids, creatives = nobody
    expectations.observe_many("p", "shoes", group_ids, labelled(creatives, np.ones(3)), np.full(3, 0.1, np.float32))
    assert weight(expectations, log_relative) == pytest.approx(before, abs=1e-3)


def test_expectations_survive_the_state(expectations, log_relative, tmp_path):
    observed(expectations, log_relative, 1.0, np.random.default_rng(8))
    changes = ChangeSet()
    expectations.write(changes)
    with Store(tmp_path, sync=False) as store:
        store.commit(changes)
        again = Expectations()
        with store.read() as txn:
            again.restore(txn)
            again.bring_in("p", txn)
            again.bring_in("unknown", txn)
        assert again.n_impressions() == {"p": 500}
        expected = expectations.relative_ctrs("p", "shoes", GROUPS, CREATIVES)
        assert (again.relative_ctrs("p", "shoes", GROUPS, CREATIVES) == expected).all()
        with open_view(store) as view:
            assert (read_relative_ctrs(view, "p", "shoes", GROUPS, CREATIVES) == expected).all()
    nothing = ChangeSet()
    again.write(nothing)
    assert len(nothing) == 0


def test_groups_not_shown_to_differ_have_all_users_ctrs_as_far_as_nothing_is_expected():
    for_all = shrink([[400.0, 400.0]], [[30.0, 20.0]])
    n, x = np.full((2, 2), 200.0), np.array([[30.0, 0.0], [0.0, 20.0]])
    same = group_ctrs(for_all, n, x, np.ones((2, 2)), spread=0.25, distinct=False)
    assert same.ctr == pytest.approx(np.repeat(for_all.ctr, 2, axis=0))
    assert same.ctr_low == pytest.approx(np.repeat(for_all.ctr_low, 2, axis=0))
    told = group_ctrs(for_all, n, x, np.array([[1.0, 2.0], [1.0, 0.5]]), spread=0.25, distinct=False)
    assert told.ctr.argmax(axis=1).tolist() == [1, 0]
    counted = group_ctrs(for_all, n, x, np.ones((2, 2)), spread=0.25, distinct=True)
    assert counted.ctr.argmax(axis=1).tolist() == [0, 1]
