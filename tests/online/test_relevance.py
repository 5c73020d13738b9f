"""Relevance: zero on average where an attribute does not matter; a search finds the one that does, once and anew."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from online.features import FeatureBank
from online.relevance import (
    ASKED_CLICKS,
    MAX_AXES,
    AttributeSearch,
    Finding,
    Sums,
    likeness,
    relevance,
)
from online.rows import LabelledRows, Rows
from state.store import ChangeSet, Store, Table

Floats = npt.NDArray[np.float64]

CARDINALITIES = (2, 5, 12)
N_PRODUCTS, N_CREATIVES, DIM = 6, 5, 6
CTR = 0.08
CREATIVES_OF = {p: np.arange(p * N_CREATIVES, (p + 1) * N_CREATIVES) for p in range(N_PRODUCTS)}
CATEGORY_OF: dict[int, str | None] = {p: "shoes" if p < 3 else "lamps" for p in range(N_PRODUCTS)}


def bank() -> FeatureBank:
    made = FeatureBank(DIM, DIM)
    rng = np.random.default_rng(0)
    for number in range(N_PRODUCTS * N_CREATIVES):
        made.put_image(number, rng.standard_normal(DIM).astype(np.float32).tobytes())
    return made


def draw(
    seed: int, n: int, drivers: dict[str, int | None], strength: float = 0.8
) -> tuple[LabelledRows, npt.NDArray[np.float64]]:
    """Rows and residuals of users who click by their driver's value times an image's first feature."""
    rng = np.random.default_rng(seed)
    attributes = np.stack([rng.integers(c, size=n) for c in CARDINALITIES], axis=1).astype(np.uint8)
    products = rng.integers(N_PRODUCTS, size=n)
    creatives = products * N_CREATIVES + rng.integers(N_CREATIVES, size=n)
    first = bank().images().numpy()[creatives, 0]
    taste = np.zeros(n)
    for product in range(N_PRODUCTS):
        driver = drivers[str(CATEGORY_OF[product])]
        if driver is not None:
            rows = products == product
            taste[rows] = strength * (2 * (attributes[rows, driver] % 2) - 1.0) * first[rows]
    clicks = rng.random(n) < 1 / (1 + (1 / CTR - 1) * np.exp(-taste))
    rows = Rows(products, creatives, attributes)
    return LabelledRows(rows, clicks.astype(np.float32), np.ones(n, np.float32)), clicks - clicks.mean()


def findings_of(
    search: AttributeSearch,
    seed: int,
    n: int,
    drivers: dict[str, int | None],
    category_of: dict[int, str | None] = CATEGORY_OF,
) -> list[Finding]:
    labelled, residuals = draw(seed, n, drivers)
    findings = []
    for start in range(0, n, 500):
        part = slice(start, start + 500)
        findings += search.observe_many(labelled.take(part), residuals[part], CREATIVES_OF, category_of)
    return findings


def search_all(
    search: AttributeSearch,
    seed: int,
    n: int,
    drivers: dict[str, int | None],
    category_of: dict[int, str | None] = CATEGORY_OF,
) -> list[tuple[list[int], int]]:
    return [(found.products, found.field) for found in findings_of(search, seed, n, drivers, category_of)]


@pytest.mark.parametrize("driver", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_the_attribute_that_decides_is_found_where_it_decides(driver: int, seed: int) -> None:
    found = search_all(AttributeSearch(CARDINALITIES, bank()), seed, 20_000, {"shoes": driver, "lamps": None})
    assert found
    assert all(finding == ([0, 1, 2], driver) for finding in found)


def test_without_a_driver_hardly_anything_is_found() -> None:
    n_searches = 2 * 30
    found = [
        search_all(AttributeSearch(CARDINALITIES, bank()), s, 12_000, {"shoes": None, "lamps": None}) for s in range(30)
    ]
    # Each search is asked about a dozen times on the way.
    n_misled = sum(len({tuple(products) for products, _ in each}) for each in found)
    assert n_misled <= 0.05 * n_searches


def test_a_search_ends_and_a_change_starts_it_anew_for_the_products_that_changed() -> None:
    search = AttributeSearch(CARDINALITIES, bank())
    n = int(2.4 * ASKED_CLICKS[-1] / CTR)
    assert search_all(search, 1, n, {"shoes": 0, "lamps": 1})
    assert search_all(search, 2, 20_000, {"shoes": 2, "lamps": 2}) == []
    search.restart([1], CATEGORY_OF)
    search.restart([2], CATEGORY_OF)
    assert {
        (tuple(products), field) for products, field in search_all(search, 3, 40_000, {"shoes": 2, "lamps": 0})
    } == {((1, 2), 2)}


def test_products_without_category_are_searched_only_when_their_tastes_have_changed() -> None:
    search = AttributeSearch(CARDINALITIES, bank())
    nowhere: dict[int, str | None] = dict.fromkeys(range(N_PRODUCTS))
    tastes: dict[str, int | None] = {"shoes": 1, "lamps": 1}
    assert search_all(search, 1, 20_000, tastes, nowhere) == []
    search.restart([4], nowhere)
    found = search_all(search, 1, 60_000, tastes, nowhere)
    assert found
    assert all(finding == ([4], 1) for finding in found)


def test_it_goes_on_from_the_state(tmp_path: Path) -> None:
    undisturbed, restarted = AttributeSearch(CARDINALITIES, bank()), AttributeSearch(CARDINALITIES, bank())
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        n_found = 0
        for step in range(12):
            labelled, residuals = draw(step, 1_000, {"shoes": 1, "lamps": 2})
            changes = [ChangeSet(), ChangeSet()]
            findings = []
            for search, change in zip((undisturbed, restarted), changes, strict=True):
                findings.append(search.observe_many(labelled, residuals, CREATIVES_OF, CATEGORY_OF))
                if step == 6:
                    search.restart([0, 2], CATEGORY_OF)
                search.write(change)
            found = [[(f.products, f.field, f.likeness.tobytes()) for f in of_search] for of_search in findings]
            assert found[0] == found[1], step
            n_found += len(found[0])
            assert list(changes[0]) == list(changes[1]), step
            store.commit(changes[1])
            restarted = AttributeSearch(CARDINALITIES, bank())
            with store.read() as txn:
                restarted.restore(txn)
        with store.read() as txn:
            assert txn.count(Table.SEARCHES) == 4  # two categories, the directions and the head
    assert n_found


# --- Labels that are taken back


def residuals_of(labelled: LabelledRows) -> Floats:
    return labelled.clicks.astype(np.float64) - 0.1


def sums_of(search: AttributeSearch) -> dict[bytes, Sums]:
    changes = ChangeSet()
    search.write(changes)
    return {
        key: msgspec.msgpack.decode(value, type=Sums)
        for key, value in changes.of(Table.SEARCHES)
        if key.startswith(b"search") and value is not None
    }


@settings(max_examples=20, deadline=None)
@given(n=st.integers(20, 160), share=st.floats(0.2, 1), seed=st.integers(0, 2**20))
def test_a_label_taken_back_for_a_click_leaves_the_sums_of_the_click(n: int, share: float, seed: int) -> None:
    labelled, _ = draw(seed, n, {"shoes": 0, "lamps": 1}, 2.0)
    late = (labelled.clicks > 0) & (np.random.default_rng(seed).random(n) < share)
    assume(late.any())
    at_once, corrected = AttributeSearch(CARDINALITIES, bank()), AttributeSearch(CARDINALITIES, bank())
    at_once.observe_many(labelled, residuals_of(labelled), CREATIVES_OF, CATEGORY_OF)
    missed = LabelledRows(labelled.rows, np.where(late, 0, labelled.clicks).astype(np.float32), labelled.weights)
    corrected.observe_many(missed, residuals_of(missed), CREATIVES_OF, CATEGORY_OF)
    rows, ones = labelled.rows.take(late), np.ones(late.sum(), np.float32)
    pairs = LabelledRows.concatenate([LabelledRows(rows, 0 * ones, -ones), LabelledRows(rows, ones, ones)])
    corrected.observe_many(pairs, residuals_of(pairs), CREATIVES_OF, CATEGORY_OF)
    expected, found = sums_of(at_once), sums_of(corrected)
    assert found.keys() == expected.keys()
    for key, sums_at_once in expected.items():
        assert (found[key].n_rows, found[key].n_clicks) == (sums_at_once.n_rows, sums_at_once.n_clicks)
        for name in ("scores", "squares", "by_value", "counts"):
            pair = [np.frombuffer(getattr(each, name)) for each in (found[key], sums_at_once)]
            assert pair[0] == pytest.approx(pair[1], abs=1e-9), name


def test_late_clicks_alone_are_not_looked_at() -> None:
    labelled, _ = draw(1, 6_000, {"shoes": 0, "lamps": 0})
    search = AttributeSearch(CARDINALITIES, bank())
    search.observe_many(labelled.take(slice(0, 10)), np.zeros(10), CREATIVES_OF, CATEGORY_OF)
    search.restart(range(N_PRODUCTS), CATEGORY_OF)
    rows, ones = labelled.rows, np.ones(len(labelled), np.float32)
    pairs = LabelledRows.concatenate([LabelledRows(rows, 0 * ones, -ones), LabelledRows(rows, ones, ones)])
    assert search.observe_many(pairs, residuals_of(pairs), CREATIVES_OF, CATEGORY_OF) == []
    assert {(each.n_rows, each.n_clicks > ASKED_CLICKS[0]) for each in sums_of(search).values()} == {(0, True)}


# --- Values that are clicked alike


def gaps_of(placed: Floats) -> tuple[Floats, Floats]:
    """Return the distances between values of one class, even or odd, and between those of two."""
    gaps = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    alike = np.arange(len(placed))[:, None] % 2 == np.arange(len(placed)) % 2
    pairs = np.triu(np.ones(gaps.shape, bool), 1)
    return gaps[alike & pairs], gaps[~alike & pairs]


@pytest.mark.parametrize("driver", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_finding_places_values_that_prefer_the_same_images_together(driver: int, seed: int) -> None:
    search = AttributeSearch(CARDINALITIES, bank())
    found = findings_of(search, seed, 40_000, {"shoes": driver, "lamps": None})[-1]
    assert found.likeness.shape == (CARDINALITIES[driver], MAX_AXES)
    within, between = gaps_of(found.likeness)
    assert within.mean() < 0.5 * between.mean()
    # Along the direction in which values differ most there are two places.
    within, between = gaps_of(found.likeness[:, :1])
    assert within.max() < 0.8 * between.min()


def value_sums(
    n_by_value: list[int], seed: int, taste: float, n_directions: int = 6
) -> tuple[Floats, Floats, Floats, Floats]:
    """Sums over users of which those with odd values prefer what those with even ones do not."""
    rng = np.random.default_rng(seed)
    counts = np.array(n_by_value, np.float64)
    codes = np.repeat(np.arange(len(n_by_value)), n_by_value)
    scores = rng.standard_normal((len(codes), n_directions))
    scores[:, 2] += taste * (2 * (codes % 2) - 1)
    by_value = np.stack([scores[codes == value].sum(axis=0) for value in range(len(n_by_value))])
    return scores.sum(axis=0), (scores**2).sum(axis=0), by_value, counts


def test_values_lie_by_class_and_one_that_nobody_has_in_the_middle() -> None:
    placed = likeness(*value_sums([400, 500, 300, 400, 0, 350, 400, 0], 1, 0.3))
    assert (placed[[4, 7]] == 0).all()
    seen = placed[[0, 1, 2, 3, 6, 5]]  # by turns even and odd
    within, between = gaps_of(seen)
    assert within.max() < 0.7 * between.min()
    within, between = gaps_of(seen[:, :1])
    assert within.max() < 0.3 * between.min()


def test_where_chance_explains_how_values_differ_they_lie_closer() -> None:
    spread = {
        taste: np.mean([np.linalg.norm(likeness(*value_sums([300] * 8, seed, taste))) for seed in range(10)])
        for taste in (0.0, 0.5)
    }
    assert spread[0.0] < 0.6 * spread[0.5]


def test_a_value_of_few_rows_lies_nearer_to_the_middle_of_what_tells_values_apart() -> None:
    few, many = [], []
    for seed in range(10):
        placed = likeness(*value_sums([1_000, 1_000, 1_000, 1_000, 4], seed, 0.5))
        few.append(abs(placed[4, 0]))
        many.append(abs(placed[0, 0]))
    assert np.mean(few) < 0.7 * np.mean(many)


def test_values_of_images_that_do_not_differ_all_lie_in_the_middle() -> None:
    scores, squares, by_value, counts = value_sums([100] * 4, 0, 0.5)
    placed = likeness(0 * scores, 0 * squares, 0 * by_value, counts)
    assert np.abs(placed).max() < 1e-9


# --- Relevance


def sums(n: int, seed: int, n_directions: int = 3) -> tuple[Floats, Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, n_directions))
    codes = [rng.integers(c, size=n) for c in CARDINALITIES]
    by_value = np.concatenate(
        [[scores[field == v].sum(axis=0) for v in range(c)] for field, c in zip(codes, CARDINALITIES, strict=True)]
    )
    counts = np.concatenate([np.bincount(field, minlength=c) for field, c in zip(codes, CARDINALITIES, strict=True)])
    return scores.sum(axis=0), (scores**2).sum(axis=0), by_value, counts.astype(np.float64)


def test_without_a_driver_the_bayes_factor_speaks_against_and_is_seldom_high() -> None:
    drawn = np.array([relevance(*sums(1_500, seed), 0.1, CARDINALITIES) for seed in range(300)])
    assert (np.median(drawn, axis=0) < 0).all()
    # Markov's inequality: chance exceeds a Bayes factor of b once in b times at most.
    assert ((drawn > np.log(20)).mean(axis=0) <= 1 / 20).all()


def test_values_that_nobody_has_and_images_that_do_not_differ_say_nothing() -> None:
    scores, squares, by_value, counts = sums(1_000, 0)
    found = relevance(scores, squares, by_value, counts, 0.1, CARDINALITIES)
    first = CARDINALITIES[0]
    more = relevance(
        scores,
        squares,
        np.insert(by_value, first, 0.0, axis=0),
        np.insert(counts, first, 0.0),
        0.1,
        (first + 1, *CARDINALITIES[1:]),
    )
    assert more == pytest.approx(found)
    assert (relevance(0 * scores, 0 * squares, 0 * by_value, counts, 0.1, CARDINALITIES) == 0).all()
