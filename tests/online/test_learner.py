"""The learner: it learns who prefers what, predicts before it learns, and goes on from the state bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from online.features import FeatureBank
from online.learner import Encoder, PreferenceLearner, Replay, pack_rows, unpack_rows
from online.mismatch import WeightsMismatchError
from online.rows import LabelledRows, Rows
from online.settings import ModelSettings
from state.store import ChangeSet, Store, Table

CARDINALITIES = (4, 5, 6)
DIM = 12
N_PRODUCTS, N_CREATIVES = 2, 4
SETTINGS = ModelSettings(
    d_model=16, d_field=4, d_hidden=16, learning_rate=0.01, batch_rows=64, replay_rows=1_000, ema_steps=16
)


def bank() -> FeatureBank:
    rng = np.random.default_rng(0)
    made = FeatureBank(DIM, DIM)
    for number in range(N_PRODUCTS):
        made.put_title(number, rng.standard_normal(DIM).astype(np.float32).tobytes())
    for number in range(N_PRODUCTS * N_CREATIVES):
        made.put_image(number, rng.standard_normal(DIM).astype(np.float32).tobytes())
    return made


def learner(settings: ModelSettings = SETTINGS, seed: int = 1) -> PreferenceLearner:
    return PreferenceLearner(CARDINALITIES, DIM, DIM, settings, bank(), seed)


def draw(n: int, seed: int, *, turned: bool = False) -> LabelledRows:
    """Users with the first attribute at 2 like the first two creatives of a product, the others the last two."""
    rng = np.random.default_rng(seed)
    products = rng.integers(N_PRODUCTS, size=n)
    places = rng.integers(N_CREATIVES, size=n)
    attributes = np.stack([rng.integers(2, c, size=n) for c in CARDINALITIES], axis=1).astype(np.uint8)
    likes = ((attributes[:, 0] == 2) == (places < 2)) != turned
    clicks = (rng.random(n) < np.where(likes, 0.5, 0.1)).astype(np.float32)
    return LabelledRows(Rows(products, products * N_CREATIVES + places, attributes), clicks, np.ones(n, np.float32))


def learn(model: PreferenceLearner, labelled: LabelledRows, batch: int = 200) -> PreferenceLearner:
    for start in range(0, len(labelled), batch):
        model.learn_many(labelled.take(slice(start, start + batch)))
    return model


@dataclass(frozen=True)
class Learnt:
    """A learner after some rows."""

    model: PreferenceLearner


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    return Learnt(learn(learner(), draw(6_000, 1)))


def of_products() -> dict[int, npt.NDArray[np.int64]]:
    return {p: np.arange(p * N_CREATIVES, (p + 1) * N_CREATIVES) for p in range(N_PRODUCTS)}


def test_it_learns_who_clicks_what(learnt: Learnt) -> None:
    test = draw(4_000, 2)
    p_click = learnt.model.predict_many(test.rows)
    # The best that can be had: 0.5 against 0.1 on halves of the rows.
    assert roc_auc_score(test.clicks, p_click) > 0.72
    assert roc_auc_score(test.clicks, learner().predict_many(test.rows)) < 0.6
    assert p_click.mean() == pytest.approx(0.3, abs=0.04)
    assert learnt.model.n_rows_learnt == 6_000


def test_preferences_point_to_what_a_user_likes(learnt: Learnt) -> None:
    rows = draw(1_000, 3).rows
    p_click, preference = learnt.model.predict_with_preference(rows, of_products())
    assert p_click == pytest.approx(learnt.model.predict_many(rows), abs=1e-6)
    likes = (rows.attributes[:, 0] == 2) == (rows.creatives % N_CREATIVES < 2)
    assert preference[likes].mean() > 0.3
    assert preference[~likes].mean() < -0.3


def test_preferences_of_a_user_average_zero_over_the_products_creatives(learnt: Learnt) -> None:
    user = np.array([[2, 3, 4]] * N_CREATIVES, np.uint8)
    rows = Rows(np.ones(N_CREATIVES, np.int64), np.arange(N_CREATIVES, 2 * N_CREATIVES), user)
    _, preference = learnt.model.predict_with_preference(rows, of_products())
    assert preference.sum() == pytest.approx(0, abs=1e-4)
    assert np.abs(preference).max() > 0.1


def test_a_prediction_does_not_depend_on_what_it_is_asked_with(learnt: Learnt) -> None:
    rows = draw(50, 4).rows
    together = learnt.model.predict_many(rows)
    alone = np.concatenate([learnt.model.predict_many(rows.take(slice(n, n + 1))) for n in range(50)])
    assert alone == pytest.approx(together, abs=1e-5)
    assert len(learnt.model.predict_many(rows.take(slice(0, 0)))) == 0


def test_users_with_other_attributes_have_other_embeddings_and_products_see_them_differently(learnt: Learnt) -> None:
    encoder = Encoder(learnt.model.new_model(), learnt.model.average_weights(), bank(), "embedding")
    users = np.array([[2, 2, 2], [3, 2, 2], [2, 3, 2], [0, 0, 0]], np.uint8)
    for product in range(N_PRODUCTS):
        embedded = encoder.embed_many(np.full(4, product), users)
        assert embedded.shape == (4, SETTINGS.d_model)
        gaps = np.linalg.norm(embedded[:, None] - embedded[None], axis=2)
        assert gaps[~np.eye(4, dtype=bool)].min() > 1e-3
    first, second = (encoder.embed_many(np.array([p]), users[:1])[0] for p in range(N_PRODUCTS))
    assert np.linalg.norm(first - second) > 1e-2


def test_tastes_are_what_decides_which_image_a_user_prefers(learnt: Learnt) -> None:
    weights = learnt.model.average_weights()
    model = learnt.model.new_model()
    tastes = Encoder(model, weights, bank(), "taste")
    rows = draw(200, 5).rows
    creatives_of = {product: np.unique(rows.creatives[rows.products == product]) for product in range(N_PRODUCTS)}
    _, preference = learnt.model.predict_with_preference(rows, creatives_of)
    with torch.inference_mode():
        values = model.image_value(model.embed_images(bank().images())).numpy()  # (C, D)
    centred = np.stack(
        [values[c] - values[creatives_of[p]].mean(axis=0) for p, c in zip(rows.products, rows.creatives, strict=True)]
    )
    scores = (tastes.embed_many(rows.products, rows.attributes) * centred).sum(axis=1)
    assert scores == pytest.approx(preference, abs=1e-4)


def test_a_label_that_is_taken_back_and_given_anew_moves_towards_the_click(learnt: Learnt) -> None:
    model = learn(learner(), draw(2_000, 1))
    row = draw(1, 9).rows
    one = np.ones(1, np.float32)
    before = model.predict_many(row)[0]
    for _ in range(20):
        model.learn_many(LabelledRows.concatenate([LabelledRows(row, 0 * one, -one), LabelledRows(row, one, one)]))
    assert model.predict_many(row)[0] > before


def test_the_seed_decides_everything() -> None:
    rows = draw(600, 1)
    a, b, c = (learn(learner(seed=seed), rows).average_weights() for seed in (1, 1, 2))
    assert a == b != c


def test_it_goes_on_from_the_state_bit_by_bit(tmp_path: Path) -> None:
    undisturbed, restarted = learner(), learner()
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        for step in range(12):
            labelled = draw(150, 100 + step)
            changes = [ChangeSet(), ChangeSet()]
            for model, change in zip((undisturbed, restarted), changes, strict=True):
                model.learn_many(labelled)
                if step == 6:
                    model.forget_product(1)
                model.write(change)
            assert list(changes[0]) == list(changes[1]), step
            store.commit(changes[1])
            restarted = learner(seed=1)
            with store.read() as txn:
                restarted.restore(txn)
        with store.read() as txn:
            assert txn.count(Table.REPLAY) == 7  # 1,000 rows in blocks of 150


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model, changes = learner(), ChangeSet()
    model.learn_many(draw(10, 1))
    model.write(changes)
    other = learner(SETTINGS.model_copy(update={"d_hidden": 24}))
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        with store.read() as txn, pytest.raises(WeightsMismatchError, match=r"the state holds a model of \d+ param"):
            other.restore(txn)
    with pytest.raises(WeightsMismatchError):
        Encoder(other.new_model(), model.average_weights(), bank(), "embedding")


# --- Replay


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
            st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.booleans(), st.binary(min_size=3, max_size=3)
        ),
        max_size=8,
    )
)
def test_rows_round_trip_through_their_bytes(rows: list[tuple[int, int, bool, bytes]]) -> None:
    attributes = np.frombuffer(b"".join(row[3] for row in rows), np.uint8).reshape(-1, 3)
    labelled = LabelledRows(
        Rows(np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.int64), attributes),
        np.array([row[2] for row in rows], np.float32),
        np.ones(len(rows), np.float32),
    )
    packed = pack_rows(labelled)
    assert len(packed) == len(rows) * (4 + 4 + 1 + 3)
    found = unpack_rows(packed, 3)
    for name in ("products", "creatives", "attributes"):
        assert (getattr(found.rows, name) == getattr(labelled.rows, name)).all()
    assert (found.clicks == labelled.clicks).all()
    assert (found.weights == 1).all()
