"""Beta posteriors in SQL, against SciPy and the exact comparison of `online.significance`."""

from __future__ import annotations

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc, ndtr, polygamma
from scipy.special import erfcx as exact_erfcx

from offline.posterior import Cumulants, ctr_quantile, erfcx, logit_cumulants, normal_cdf, p_above
from online.significance import p_better

PARAMETERS = ["alpha_a", "beta_a", "alpha_b", "beta_b"]


def evaluated(frame, make):
    """Return the columns that ``make`` adds to a frame, as DuckDB works them out."""
    table = ibis.memtable(pa.Table.from_pandas(frame, preserve_index=False))
    return table.mutate(**make(table)).to_pyarrow().to_pandas()


def compared(frame):
    """Return P(A > B) of rows of Beta parameters; cumulants are columns of their own, as they are in pairs."""
    table = ibis.memtable(pa.Table.from_pandas(frame, preserve_index=False))
    table = table.mutate(
        **{
            f"{name}_{side}": value
            for side in "ab"
            for name, value in logit_cumulants(table[f"alpha_{side}"], table[f"beta_{side}"])._asdict().items()
        }
    )
    a, b = (Cumulants(*(table[f"{name}_{side}"] for name in Cumulants._fields)) for side in "ab")
    return table.mutate(p=p_above(a, b)).to_pyarrow().to_pandas()["p"].to_numpy()


def parameters_from(lowest):
    return st.floats(np.log(lowest), np.log(3_000.0)).map(np.exp)


def test_erfcx_and_the_normal():
    x = np.concatenate([np.linspace(-25, 40, 4_001), np.geomspace(40, 1e6, 200)])
    found = evaluated(pd.DataFrame({"x": x}), lambda t: {"scaled": erfcx(t.x), "chance": normal_cdf(t.x)})
    assert found["scaled"].to_numpy() == pytest.approx(exact_erfcx(x), rel=1e-8)
    assert found["chance"].to_numpy() == pytest.approx(ndtr(x), abs=1e-8)


def test_below_its_lowest_erfcx_stays_finite():
    found = evaluated(pd.DataFrame({"x": [-26.0, -30.0, -1e9]}), lambda t: {"scaled": erfcx(t.x)})
    assert found["scaled"].nunique() == 1
    assert np.isfinite(found["scaled"]).all()


def test_cumulants_are_polygammas():
    alpha, beta = (a.ravel() for a in np.meshgrid(np.geomspace(0.3, 3_000, 25), np.geomspace(0.3, 3_000, 25)))
    found = evaluated(
        pd.DataFrame({"alpha": alpha, "beta": beta}), lambda t: logit_cumulants(t.alpha, t.beta)._asdict()
    )
    for n, name in enumerate(Cumulants._fields):
        exact = polygamma(n, alpha) + (-1) ** (n + 1) * polygamma(n, beta)
        assert found[name].to_numpy() == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("lowest", "error"), [(8.0, 7e-4), (4.0, 7e-4), (2.0, 3e-3), (1.0, 1.2e-2), (0.3, 5e-2)])
def test_comparisons_are_within_their_error(lowest, error):
    # p_better itself is exact to 5e-4 where all parameters are at least 8, and to 1e-4 below.
    @given(st.lists(st.tuples(*[parameters_from(lowest)] * 4), min_size=20, max_size=400))
    @settings(max_examples=4, deadline=None)
    def check(rows):
        frame = pd.DataFrame(rows, columns=PARAMETERS)
        assert compared(frame) == pytest.approx(p_better(*(frame[name] for name in PARAMETERS)), abs=error)

    check()


@given(st.lists(st.tuples(*[parameters_from(1.0)] * 4), min_size=1, max_size=200))
@settings(max_examples=3, deadline=None)
def test_one_of_two_is_better(rows):
    frame = pd.DataFrame(rows, columns=PARAMETERS)
    turned = frame.rename(columns=dict(zip(PARAMETERS, PARAMETERS[2:] + PARAMETERS[:2], strict=True)))
    assert compared(frame) + compared(turned[PARAMETERS]) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(("lowest", "error"), [(8.0, 4e-4), (2.0, 4e-3), (1.0, 1.2e-2)])
@pytest.mark.parametrize(("z", "chance"), [(-1.959963984540054, 0.025), (1.959963984540054, 0.975)])
def test_ends_of_intervals(lowest, error, z, chance):
    rng = np.random.default_rng(3)
    alpha, beta = lowest * np.exp(rng.uniform(0, 1, (2, 5_000)) ** 2 * np.log(3_000 / lowest))
    frame = pd.DataFrame({"alpha": alpha, "beta": beta})[alpha < 0.3 * (alpha + beta)]
    found = evaluated(frame, lambda t: {"end": ctr_quantile(logit_cumulants(t.alpha, t.beta), z)})["end"]
    assert betainc(frame["alpha"].to_numpy(), frame["beta"].to_numpy(), found.to_numpy()) == pytest.approx(
        chance, abs=error
    )
