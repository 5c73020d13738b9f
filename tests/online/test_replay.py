"""Replay: the last rows by whole blocks, drawn uniformly, without what a product has forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.replay import Replay, pack_rows, unpack_rows
from online.rows import LabelledRows, Rows


def block(n: int, product: int, mark: int) -> LabelledRows:
    return LabelledRows(
        Rows(np.full(n, product), np.full(n, mark), np.zeros((n, 1), np.uint8)),
        np.zeros(n, np.float32),
        np.ones(n, np.float32),
    )


def test_replay_keeps_the_last_rows_by_whole_blocks() -> None:
    replay = Replay(100)
    assert [replay.append(number, block(40, 0, number)) for number in range(5)] == [[], [], [], [0], [1]]
    sampled = replay.sample(500, {}, np.random.default_rng(0))
    assert set(sampled.rows.creatives.tolist()) == {2, 3, 4}


def test_replay_leaves_out_what_a_product_has_forgotten() -> None:
    replay = Replay(1_000)
    for number in range(4):
        replay.append(number, block(20, number % 2, number))
    sampled = replay.sample(2_000, {0: 1, 1: 3}, np.random.default_rng(0))
    # Block 0 and 1 lie below their product's floor, 2 and 3 do not.
    assert set(sampled.rows.creatives.tolist()) == {2, 3}
    assert 800 < len(sampled) < 1_200
    assert len(replay.sample(100, {0: 99, 1: 99}, np.random.default_rng(0))) == 0


def test_replay_is_uniform_over_rows() -> None:
    replay = Replay(1_000)
    replay.append(0, block(300, 0, 0))
    replay.append(1, block(100, 0, 1))
    sampled = replay.sample(20_000, {}, np.random.default_rng(0))
    assert np.mean(sampled.rows.creatives == 0) == pytest.approx(0.75, abs=0.015)
    assert len(Replay(10).sample(5, {}, np.random.default_rng(0))) == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.booleans(),
            st.binary(min_size=3, max_size=3),
            st.sampled_from([1, -1]),
        ),
        max_size=8,
    )
)
def test_rows_round_trip_through_their_bytes(rows: list[tuple[int, int, bool, bytes, int]]) -> None:
    attributes = np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, 3)
    labelled = LabelledRows(
        Rows(np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.int64), attributes),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[4] for row in rows], np.float32),
    )
    packed = pack_rows(labelled)
    assert len(packed) == len(rows) * (4 + 4 + 1 + 3)
    found = unpack_rows(packed, 3)
    for name in ("products", "creatives", "attributes"):
        assert (getattr(found.rows, name) == getattr(labelled.rows, name)).all()
    assert (found.clicks == labelled.clicks).all()
    assert (found.weights == labelled.weights).all()
