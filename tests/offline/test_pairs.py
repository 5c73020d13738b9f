"""Pairs from GAIP rows."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.pairs import DuplicateRowError, PairFloorError, make_pairs, pairs_schema
from offline.snapshot import gaip_schema
from online.significance import p_better


def gaip_rows(cells):
    """Return GAIP rows of (product, group, creative, alpha, beta)."""
    schema = gaip_schema(1)
    rows = [
        {
            "snapshot_id": "s",
            "product_id": product_id,
            "title": "A chair",
            "category": None,
            "group_id": group_id,
            "group_share": 0.5,
            "groups_distinct": True,
            "encoder_version": 1,
            "creative_id": creative_id,
            "image_uri": f"file:///{creative_id}.png",
            "prompt": None if creative_id == "a" else f"prompt {creative_id}",
            "group_feature": [0.0] * 11,
            "n_impressions": 1,
            "n_clicks": 0,
            "live_impressions": 1.0,
            "live_clicks": 0.0,
            "ctr": alpha / (alpha + beta),
            "ctr_low": 0.0,
            "ctr_high": 1.0,
            "ctr_alpha": alpha,
            "ctr_beta": beta,
        }
        for product_id, group_id, creative_id, alpha, beta in cells
    ]
    return pa.Table.from_pylist(rows, schema=schema)


@st.composite
def cells(draw):
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from("PQR"), st.integers(0, 2), st.sampled_from("abcde")), unique=True, max_size=30
        )
    )
    parameters = st.floats(1, 500)
    return [(*key, draw(parameters), draw(parameters)) for key in keys]


@pytest.mark.parametrize(
    ("given_cells", "floor", "expected"),
    [
        pytest.param([], 0.8, [], id="no rows"),
        pytest.param([("P", 0, "a", 50.0, 950.0)], 0.8, [], id="one creative"),
        pytest.param(
            [("P", 0, "a", 50.0, 950.0), ("P", 0, "b", 100.0, 900.0)],
            0.8,
            [("P", 0, "b", "a")],
            id="the better one wins",
        ),
        pytest.param([("P", 0, "a", 50.0, 950.0), ("P", 0, "b", 52.0, 948.0)], 0.8, [], id="too close to call"),
        pytest.param([("P", 0, "a", 50.0, 950.0), ("P", 0, "b", 50.0, 950.0)], 0.5, [], id="a tie has no winner"),
        pytest.param([("P", 0, "a", 50.0, 950.0), ("P", 1, "b", 99.0, 901.0)], 0.5, [], id="other groups are no pair"),
        pytest.param(
            [("P", 0, "a", 50.0, 950.0), ("Q", 0, "b", 99.0, 901.0)], 0.5, [], id="other products are no pair"
        ),
        pytest.param(
            [
                ("P", 0, "a", 90.0, 910.0),
                ("P", 1, "a", 20.0, 980.0),
                ("P", 1, "b", 90.0, 910.0),
                ("P", 0, "b", 20.0, 980.0),
            ],
            0.9,
            [("P", 0, "a", "b"), ("P", 1, "b", "a")],
            id="groups that conflict",
        ),
        pytest.param(
            [
                ("Q", 0, "a", 20.0, 980.0),
                ("Q", 0, "c", 150.0, 850.0),
                ("P", 3, "a", 5.0, 95.0),
                ("Q", 0, "b", 70.0, 930.0),
            ],
            0.9,
            [("Q", 0, "b", "a"), ("Q", 0, "c", "a"), ("Q", 0, "c", "b")],
            id="three in order",
        ),
    ],
)
def test_pairs(given_cells, floor, expected):
    found = make_pairs(gaip_rows(given_cells), floor=floor)
    names = ["product_id", "group_id", "creative_w", "creative_l"]
    assert [tuple(row[name] for name in names) for row in found.to_pylist()] == expected
    assert found.schema.equals(pairs_schema(), check_metadata=False)


def test_columns_of_a_pair():
    rows = gaip_rows([("P", 0, "a", 50.0, 950.0), ("P", 0, "b", 100.0, 900.0)]).replace_schema_metadata({"k": "v"})
    found = make_pairs(rows, floor=0.8)
    assert found.to_pylist() == [
        {
            "snapshot_id": "s",
            "product_id": "P",
            "group_id": 0,
            "creative_w": "b",
            "creative_l": "a",
            "weight": pytest.approx(float(p_better(100, 900, 50, 950))),
            "ctr_w": 0.1,
            "ctr_l": 0.05,
            "prompt_w": "prompt b",
            "prompt_l": None,
            "image_uri_w": "file:///b.png",
            "image_uri_l": "file:///a.png",
        }
    ]
    assert found.schema.metadata == {b"k": b"v"}


@given(cells(), st.floats(0.5, 0.99))
@settings(max_examples=100, deadline=None)
def test_laws_of_pairs(given_cells, floor):
    found = make_pairs(gaip_rows(given_cells), floor=floor).to_pylist()
    keys = [(row["product_id"], row["group_id"], row["creative_w"], row["creative_l"]) for row in found]
    assert len(set(keys)) == len(keys)
    assert not {(p, g, loser, winner) for p, g, winner, loser in keys} & set(keys)
    assert all(floor <= row["weight"] <= 1.0 for row in found)
    assert all(row["ctr_w"] > row["ctr_l"] for row in found)
    # Every pair of a plain loop is there, and no other.
    parameters = {cell[:3]: cell[3:] for cell in given_cells}
    expected = set()
    for one, other in itertools.permutations(parameters, 2):
        if one[:2] != other[:2]:
            continue
        alpha, beta = parameters[one]
        other_alpha, other_beta = parameters[other]
        higher = alpha / (alpha + beta) > other_alpha / (other_alpha + other_beta)
        if higher and p_better(alpha, beta, other_alpha, other_beta) >= floor:
            expected.add((*one, other[2]))
    assert set(keys) == expected


@given(cells(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_of_rows_does_not_matter(given_cells, random):
    shuffled = list(given_cells)
    random.shuffle(shuffled)
    assert make_pairs(gaip_rows(shuffled), floor=0.6).equals(make_pairs(gaip_rows(given_cells), floor=0.6))


def test_rows_may_come_in_chunks():
    cells_of = [
        ("P", 0, "a", 50.0, 950.0),
        ("P", 0, "b", 100.0, 900.0),
        ("Q", 1, "a", 10.0, 990.0),
        ("Q", 1, "b", 99.0, 901.0),
    ]
    chunked = pa.concat_tables([gaip_rows([cell]) for cell in reversed(cells_of)])
    assert make_pairs(chunked, floor=0.8).equals(make_pairs(gaip_rows(cells_of), floor=0.8))


@pytest.mark.parametrize("floor", [0.49, 1.0, float("nan")])
def test_floors_without_sense_are_refused(floor):
    with pytest.raises(PairFloorError):
        make_pairs(gaip_rows([]), floor=floor)


def test_duplicate_rows_are_refused():
    rows = gaip_rows([("P", 0, "a", 50.0, 950.0), ("P", 2, "b", 9.0, 9.0), ("P", 2, "b", 100.0, 900.0)])
    with pytest.raises(DuplicateRowError, match="creative 'b' has two rows in group 2 of product 'P'"):
        make_pairs(rows, floor=0.8)


def test_thousands_of_groups_in_one_go():
    rng = np.random.default_rng(0)
    cells_of = [
        (f"P{p:04d}", g, f"c{c}", alpha, 1_000 - alpha)
        for p in range(150)
        for g in range(3)
        for c, alpha in enumerate(rng.uniform(20, 120, 8))
    ]
    found = make_pairs(gaip_rows(cells_of), floor=0.5)
    assert found.num_rows == 150 * 3 * 8 * 7 // 2
