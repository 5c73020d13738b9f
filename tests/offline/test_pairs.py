"""Pairs from GAIP rows."""

from __future__ import annotations

import itertools

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.pairs import HELD_OUT, MIXED, TRAIN, HeldOutShareError, PairFloorError, make_pairs, pairs_schema
from offline.rows import gaip_schema
from online.significance import p_better


def pairs_of(rows, *, floor, held_out_share=0.25, held_out_by="product"):
    """Return the pairs of GAIP rows as DuckDB makes them."""
    pairs = make_pairs(ibis.memtable(rows), floor=floor, held_out_share=held_out_share, held_out_by=held_out_by)
    return pairs.to_pyarrow()


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
            st.tuples(st.sampled_from("PQR"), st.integers(0, 2), st.sampled_from("abcde")), unique=True, max_size=40
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
    found = pairs_of(gaip_rows(given_cells), floor=floor)
    names = ["product_id", "group_id", "creative_w", "creative_l"]
    assert [tuple(row[name] for name in names) for row in found.to_pylist()] == expected
    assert found.schema.names == pairs_schema().names


def test_columns_of_a_pair():
    found = pairs_of(gaip_rows([("P", 0, "a", 50.0, 950.0), ("P", 0, "b", 100.0, 900.0)]), floor=0.8)
    assert found.to_pylist() == [
        {
            "snapshot_id": "s",
            "product_id": "P",
            "group_id": 0,
            "creative_w": "b",
            "creative_l": "a",
            "weight": pytest.approx(float(p_better(100, 900, 50, 950)), abs=6e-4),
            "split": "train",
            "ctr_w": 0.1,
            "ctr_l": 0.05,
            "prompt_w": "prompt b",
            "prompt_l": None,
            "image_uri_w": "file:///b.png",
            "image_uri_l": "file:///a.png",
        }
    ]


@given(cells(), st.floats(0.5, 0.99))
@settings(max_examples=5, deadline=None)
def test_laws_of_pairs(given_cells, floor):
    found = pairs_of(gaip_rows(given_cells), floor=floor).to_pylist()
    keys = [(row["product_id"], row["group_id"], row["creative_w"], row["creative_l"]) for row in found]
    assert len(set(keys)) == len(keys)
    assert not {(p, g, loser, winner) for p, g, winner, loser in keys} & set(keys)
    assert all(floor <= row["weight"] <= 1.0 for row in found)
    assert all(row["ctr_w"] > row["ctr_l"] for row in found)
    # Every pair of a plain loop is there, and no other.
    parameters = {cell[:3]: cell[3:] for cell in given_cells}
    expected, unsure = set(), set()
    for one, other in itertools.permutations(parameters, 2):
        if one[:2] != other[:2]:
            continue
        alpha, beta = parameters[one]
        other_alpha, other_beta = parameters[other]
        higher = alpha / (alpha + beta) > other_alpha / (other_alpha + other_beta)
        chance = p_better(alpha, beta, other_alpha, other_beta)
        if higher and chance >= floor:
            expected.add((*one, other[2]))
        if higher and abs(chance - floor) < 1.2e-2:  # the error of both chances together
            unsure.add((*one, other[2]))
    assert set(keys) ^ expected <= unsure


@given(cells(), st.randoms(use_true_random=False))
@settings(max_examples=3, deadline=None)
def test_order_of_rows_does_not_matter(given_cells, random):
    shuffled = list(given_cells)
    random.shuffle(shuffled)
    assert pairs_of(gaip_rows(shuffled), floor=0.6).equals(pairs_of(gaip_rows(given_cells), floor=0.6))


@pytest.mark.parametrize("floor", [0.49, 1.0, float("nan")])
def test_floors_without_sense_are_refused(floor):
    with pytest.raises(PairFloorError):
        pairs_of(gaip_rows([]), floor=floor)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_without_sense_are_refused(share):
    with pytest.raises(HeldOutShareError):
        pairs_of(gaip_rows([]), floor=0.8, held_out_share=share)


def many_cells(n_products, n_groups=2, n_creatives=5):
    rng = np.random.default_rng(0)
    return [
        (f"P{p:04d}", g, f"P{p:04d}-{c}", alpha, 1_000 - alpha)
        for p in range(n_products)
        for g in range(n_groups)
        for c, alpha in enumerate(rng.uniform(20, 120, n_creatives))
    ]


def test_thousands_of_groups_in_one_go():
    found = pairs_of(gaip_rows(many_cells(150, n_groups=3, n_creatives=8)), floor=0.5)
    assert found.num_rows == 150 * 3 * 8 * 7 // 2


def test_no_product_is_both_learnt_from_and_held_out():
    rows = gaip_rows(many_cells(200))
    found = pairs_of(rows, floor=0.5, held_out_share=0.25).to_pylist()
    products = {split: {row["product_id"] for row in found if row["split"] == split} for split in (TRAIN, HELD_OUT)}
    assert not products[TRAIN] & products[HELD_OUT]
    assert len(products[TRAIN]) + len(products[HELD_OUT]) == 200
    assert 30 < len(products[HELD_OUT]) < 70
    # Products that come later change nothing for those that were there.
    more = pairs_of(gaip_rows(many_cells(220)), floor=0.5, held_out_share=0.25).to_pylist()
    assert {row["product_id"] for row in more if row["split"] == HELD_OUT} >= products[HELD_OUT]


def test_no_creative_is_both_learnt_from_and_held_out():
    found = pairs_of(gaip_rows(many_cells(100)), floor=0.5, held_out_share=0.4, held_out_by="creative").to_pylist()
    creatives = {
        split: {row[side] for row in found if row["split"] == split for side in ("creative_w", "creative_l")}
        for split in (TRAIN, HELD_OUT, MIXED)
    }
    assert creatives[TRAIN]
    assert creatives[HELD_OUT]
    assert not creatives[TRAIN] & creatives[HELD_OUT]
    mixed = [row for row in found if row["split"] == MIXED]
    assert mixed
    assert not [row for row in mixed if {row["creative_w"], row["creative_l"]} <= creatives[TRAIN]]
    assert not [row for row in mixed if {row["creative_w"], row["creative_l"]} <= creatives[HELD_OUT]]


@pytest.mark.parametrize("by", ["product", "creative"])
def test_nothing_needs_to_be_held_out(by):
    found = pairs_of(gaip_rows(many_cells(20)), floor=0.5, held_out_share=0.0, held_out_by=by)
    assert set(found["split"].to_pylist()) == {TRAIN}
