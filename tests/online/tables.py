"""Tables of counts, drawn by Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@st.composite
def count_tables(draw, max_groups=5, max_creatives=6):
    shape = draw(st.tuples(st.integers(1, max_groups), st.integers(1, max_creatives)))
    n = draw(hnp.arrays(float, shape, elements=st.floats(0, 1e6, allow_subnormal=False)))
    share = draw(hnp.arrays(float, shape, elements=st.floats(0, 1, allow_subnormal=False)))
    return n, n * share
