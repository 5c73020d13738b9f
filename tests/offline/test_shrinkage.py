"""Shrinkage in SQL, against `online.ctr.shrink`."""

from __future__ import annotations

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offline.shrinkage import shrink
from online.ctr import shrink as shrink_one


def cells_of(tables, *, empty):
    """Return the cells of products' tables of counts, (n, x) each (G, C); ``empty``: also those without counts."""
    return pd.DataFrame(
        [
            (f"p{number}", group, f"c{creative:02}", float(n[group, creative]), float(x[group, creative]), len(n))
            for number, (n, x) in enumerate(tables)
            for group, creative in np.ndindex(n.shape)
            if empty or n[group, creative] > 0
        ],
        columns=["product_id", "group_id", "creative_id", "n", "x", "n_groups"],
    )


def check(tables, *, empty):
    expected = {}
    for number, (n, x) in enumerate(tables):
        one = shrink_one(n, x)
        for group, creative in np.ndindex(n.shape):
            values = one.ctr[group, creative], one.alpha[group, creative], one.beta[group, creative]
            expected[f"p{number}", group, f"c{creative:02}"] = values
    cells = cells_of(tables, empty=empty)
    found = shrink(ibis.memtable(pa.Table.from_pandas(cells, preserve_index=False))).to_pyarrow().to_pandas()
    assert len(found) == len(cells)
    keys = zip(found["product_id"], found["group_id"], found["creative_id"], strict=True)
    assert found[["ctr", "ctr_alpha", "ctr_beta"]].to_numpy() == pytest.approx(
        np.array([expected[key] for key in keys]), rel=1e-7
    )


@st.composite
def tables(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    n = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0, 3.0, 40.0, 700.0, 20_000.5])))
    share = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0])))
    n[0, 0] += 1.0
    return n, n * share


@given(st.lists(tables(), min_size=1, max_size=30), st.booleans())
@settings(max_examples=5, deadline=None)
def test_as_for_one_product(of_products, empty):
    check(of_products, empty=empty)


@pytest.mark.parametrize("empty", [True, False])
def test_many_products_at_once(empty):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(60):
        shape = tuple(rng.integers(1, (6, 12)))
        n = rng.integers(1, rng.choice([3, 50, 2_000]), shape) * rng.choice([1.0, 0.37])
        made.append((n, np.minimum(n, rng.binomial(np.ceil(n).astype(int), rng.beta(1, 15, shape)))))
    check(made, empty=empty)
