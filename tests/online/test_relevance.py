"""Relevance: zero on average where an attribute does not matter; a search finds the one that does, once and anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from online.features import FeatureBank
from online.relevance import ASKED_CLICKS, MIN_VALUE_CLICKS, AttributeSearch, relevance
from online.rows import Rows
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
) -> tuple[Rows, npt.NDArray[np.float64]]:
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
    return Rows(products, creatives, attributes), clicks - clicks.mean()


def search_all(
    search: AttributeSearch,
    seed: int,
    n: int,
    drivers: dict[str, int | None],
    category_of: dict[int, str | None] = CATEGORY_OF,
) -> list[tuple[list[int], int]]:
    rows, residuals = draw(seed, n, drivers)
    findings = []
    for start in range(0, n, 500):
        part = slice(start, start + 500)
        findings += search.observe_many(rows.take(part), residuals[part], CREATIVES_OF, category_of)
    return [(finding.products, finding.field) for finding in findings]


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
    # Each search is asked about seven times on the way.
    assert sum(len(each) for each in found) <= 0.05 * n_searches


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
        for step in range(12):
            rows, residuals = draw(step, 1_000, {"shoes": 1, "lamps": 2})
            changes = [ChangeSet(), ChangeSet()]
            findings = []
            for search, change in zip((undisturbed, restarted), changes, strict=True):
                findings.append(search.observe_many(rows, residuals, CREATIVES_OF, CATEGORY_OF))
                if step == 6:
                    search.restart([0, 2], CATEGORY_OF)
                search.write(change)
            assert findings[0] == findings[1], step
            assert list(changes[0]) == list(changes[1]), step
            store.commit(changes[1])
            restarted = AttributeSearch(CARDINALITIES, bank())
            with store.read() as txn:
                restarted.restore(txn)
        with store.read() as txn:
            assert txn.count(Table.SEARCHES) == 4  # two categories, the directions and the head


def sums(n: int, seed: int, n_directions: int = 3) -> tuple[Floats, Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, n_directions))
    codes = [rng.integers(c, size=n) for c in CARDINALITIES]
    by_value = np.concatenate(
        [[scores[field == v].sum(axis=0) for v in range(c)] for field, c in zip(codes, CARDINALITIES, strict=True)]
    )
    counts = np.concatenate([np.bincount(field, minlength=c) for field, c in zip(codes, CARDINALITIES, strict=True)])
    return scores.sum(axis=0), (scores**2).sum(axis=0), by_value, counts.astype(np.float64)


def test_without_a_driver_relevance_is_zero_on_average_and_one_in_spread() -> None:
    drawn = np.array([relevance(*sums(1_500, seed), 0.1, CARDINALITIES) for seed in range(300)])
    assert np.abs(drawn.mean(axis=0)).max() < 4 / np.sqrt(300)
    assert drawn.std(axis=0) == pytest.approx(np.ones(3), abs=0.2)


def test_values_of_few_clicks_and_images_that_do_not_differ_say_nothing() -> None:
    scores, squares, by_value, counts = sums(1_000, 0)
    few = 0.5 * MIN_VALUE_CLICKS / counts.max()
    assert (relevance(scores, squares, by_value, counts, few, CARDINALITIES) == 0).all()
    assert (relevance(0 * scores, 0 * squares, 0 * by_value, counts, 0.1, CARDINALITIES) == 0).all()
