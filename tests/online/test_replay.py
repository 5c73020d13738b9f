"""Replay: the last rows by whole blocks, drawn uniformly, without what a product has forgotten."""

from __future__ import annotations

import itertools
from collections import Counter

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
    # None above it: nothing can come in their place.
    assert len(replay.sample(100, {0: 99, 1: 99}, np.random.default_rng(0))) == 0


def test_what_is_learnt_anew_keeps_its_share() -> None:
    replay = Replay(1_000)
    for number, (n, product) in enumerate([(300, 0), (100, 1), (90, 2), (10, 0)]):
        replay.append(number, block(n, product, number))
    sampled = replay.sample(20_000, {0: 3}, np.random.default_rng(0))
    assert len(sampled) == 20_000
    found = np.bincount(sampled.rows.creatives, minlength=4) / 20_000
    # The 10 rows of product 0 above its floor stand for all 310 that it has; the others' shares stay.
    assert found == pytest.approx([0, 100 / 500, 90 / 500, 310 / 500], abs=0.015)


def test_rows_below_a_floor_are_replaced_by_those_of_any_product_that_is_learnt_anew() -> None:
    replay = Replay(1_000)
    for number, (n, product) in enumerate([(100, 0), (100, 1), (100, 2), (10, 1), (30, 2)]):
        replay.append(number, block(n, product, number))
    # Product 0 has none above its floor, 1 and 2 have 10 and 30; product 3 has fallen out altogether.
    sampled = replay.sample(20_000, {0: 9, 1: 3, 2: 4, 3: 2}, np.random.default_rng(0))
    assert len(sampled) == 20_000
    found = np.bincount(sampled.rows.creatives, minlength=5) / 20_000
    assert found == pytest.approx([0, 0, 0, 0.25, 0.75], abs=0.015)


def test_rows_below_a_floor_are_left_out_where_there_are_none_above_any() -> None:
    replay = Replay(1_000)
    replay.append(0, block(300, 0, 0))
    replay.append(1, block(100, 1, 1))
    sampled = replay.sample(8_000, {0: 1}, np.random.default_rng(0))
    assert set(sampled.rows.creatives.tolist()) == {1}
    assert len(sampled) == pytest.approx(8_000 / 4, rel=0.06)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=8),
    st.dictionaries(st.integers(0, 4), st.integers(0, 9)),
    st.integers(0, 99),
)
def test_no_row_below_its_floor_and_none_taken_back_is_ever_drawn(
    blocks: list[tuple[int, int, int]], floors: dict[int, int], seed: int
) -> None:
    replay = Replay(1_000)
    for number, (product, n, n_taken_back) in enumerate(blocks):
        rows = block(n, product, number)
        taken_back = rows.take(slice(0, n_taken_back))
        back = LabelledRows(taken_back.rows, taken_back.clicks, -taken_back.weights)
        replay.append(number, LabelledRows.concatenate([rows, back]))
    sampled = replay.sample(200, floors, np.random.default_rng(seed))
    products, numbers = sampled.rows.products, sampled.rows.creatives
    assert all(number >= floors.get(product, 0) for product, number in zip(products, numbers, strict=True))
    assert (sampled.weights > 0).all()
    emptied = {number for number, (_, n, n_taken_back) in enumerate(blocks) if n_taken_back >= n}
    assert not emptied & set(numbers.tolist())


def test_the_rows_of_a_product_are_those_from_its_floor_on_without_what_was_taken_back() -> None:
    replay = Replay(100)
    assert not len(replay.of_product(1, 0))
    for number in range(3):
        replay.append(number, LabelledRows.concatenate([block(2, 1, number), block(2, 2, number)]))
    replay.append(3, corrected(0, 2))
    assert replay.of_product(1, 1).rows.creatives.tolist() == [1, 1, 2]


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


def corrected(label: int, creative: int, n: int = 1) -> LabelledRows:
    """A label that is taken back."""
    rows = block(n, 1, creative)
    return LabelledRows(rows.rows, np.full(n, label, np.float32), np.full(n, -1, np.float32))


def test_a_label_that_is_taken_back_is_not_replayed() -> None:
    replay = Replay(1_000)
    replay.append(0, block(3, 1, 7))
    replay.append(1, LabelledRows.concatenate([block(5, 1, 8), corrected(0, 7, 2)]))
    sampled = replay.sample(8_000, {}, np.random.default_rng(0))
    assert (sampled.weights > 0).all()
    # One of three rows of creative 7 is left beside five of creative 8, of ten rows in all.
    assert np.mean(sampled.rows.creatives == 7) == pytest.approx(1 / 6, abs=0.02)
    assert len(sampled) == pytest.approx(8_000 * 6 / 10, rel=0.05)


def test_what_is_taken_back_is_the_newest_equal_row_so_that_a_restart_finds_the_same() -> None:
    blocks = [
        block(40, 1, 7),
        block(40, 1, 8),
        LabelledRows.concatenate([block(30, 1, 7), corrected(0, 7)]),
        block(40, 1, 9),
    ]
    replay, again = Replay(100), Replay(100)
    dropped = [number for n, rows in enumerate(blocks) for number in replay.append(n, rows)]
    assert dropped == [0]
    for number, rows in enumerate(blocks[1:], start=1):
        again.append(number, rows)
    first, second = (r.sample(5_000, {}, np.random.default_rng(0)) for r in (replay, again))
    assert np.array_equal(first.rows.creatives, second.rows.creatives)


def test_a_label_whose_row_has_fallen_out_takes_nothing_else_back() -> None:
    replay = Replay(1_000)
    replay.append(0, block(10, 2, 7))
    replay.append(1, corrected(0, 7))
    replay.append(2, LabelledRows.concatenate([block(1, 1, 8), corrected(0, 8)]))  # in one block with its row
    assert len(replay.sample(1_300, {}, np.random.default_rng(0))) == pytest.approx(1_000, abs=60)


# --- Forgotten users


histories = st.sampled_from([[0], [1], [0, 1], [1, 0], [0, 1, 0]])
"""The labels of an impression, one after the other: each but the last is taken back."""

impressions = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 1), histories, st.lists(st.integers(0, 5), min_size=3, max_size=3)),
    min_size=1,
    max_size=12,
)
"""User, attribute, labels, and the micro-batches in which they are learnt."""

Impressions = list[tuple[int, int, list[int], list[int]]]


def learnt_rows(labels: list[int], attribute: int) -> list[LabelledRows]:
    """Return the rows of an impression's labels: the first one given, then of each the last taken back, it given."""
    rows = [labelled_row(labels[0], attribute, 1)]
    for before, after in itertools.pairwise(labels):
        pair = [labelled_row(before, attribute, -1), labelled_row(after, attribute, 1)]
        rows.append(LabelledRows.concatenate(pair))
    return rows


def labelled_row(label: int, attribute: int, weight: int) -> LabelledRows:
    rows = Rows(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([[attribute]], np.uint8))
    return LabelledRows(rows, np.array([label], np.float32), np.array([weight], np.float32))


def filled(replay: Replay, shown: Impressions) -> Replay:
    """Learn impressions' labels in their micro-batches."""
    batches: dict[int, list[LabelledRows]] = {}
    for _, attribute, labels, when in shown:
        for number, rows in zip(sorted(when), learnt_rows(labels, attribute), strict=False):
            batches.setdefault(number, []).append(rows)
    for number in sorted(batches):
        replay.append(number, LabelledRows.concatenate(batches[number]))
    return replay


def live(replay: Replay) -> list[tuple[int, int, float, float]]:
    """Return the rows in order: block, attribute, label, and whether it counts."""
    if not replay._blocks:
        return []
    rows, numbers = replay._rows()
    columns = (numbers, rows.rows.attributes[:, 0], rows.clicks, rows.weights)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(impressions, st.integers(0, 2), st.integers(1, 30))
def test_forgotten_rows_are_as_if_they_had_never_been_there(shown: Impressions, user: int, n_kept: int) -> None:
    replay = filled(Replay(n_kept), shown)
    gone = [rows for each in shown if each[0] == user for rows in learnt_rows(each[2], each[1])]
    kept_all = sum(len(block) for block in filled(Replay(1_000), shown)._blocks) <= n_kept
    if gone:
        before = {block.number: block.rows for block in replay._blocks}
        changed = replay.forget(LabelledRows.concatenate(gone))
        # What has changed is what has to be written, and a restart gives the same.
        stored = {**before, **changed}
        restarted = Replay(n_kept)
        for number, rows in stored.items():
            if len(rows):
                restarted.append(number, unpack_rows(pack_rows(rows), 1))
        assert live(restarted) == live(replay)
        assert restarted.oldest == replay.oldest
    if kept_all:
        without = filled(Replay(1_000), [each for each in shown if each[0] != user])
        for name in ("all", "live"):
            found, expected = (
                Counter(row[1:] for row in live(each) if name == "all" or row[3]) for each in (replay, without)
            )
            assert found == expected, name
