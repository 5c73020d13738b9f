"""The learner: it learns who prefers what, predicts before it learns, and goes on from the state bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import roc_auc_score

from online.features import FeatureBank
from online.gated import GatedModel
from online.learner import Encoder, LearnerHead, PreferenceLearner
from online.mismatch import WeightsMismatchError
from online.model import FlatParameters
from online.relevance import AttributeSearch, Finding
from online.rows import Audience, LabelledRows, Rows
from online.settings import ModelSettings
from online.warm_up import ValueWarmUp
from state.store import ChangeSet, Store, Table

CARDINALITIES = (4, 5, 6)
DIM = 12
N_PRODUCTS, N_CREATIVES = 2, 4
SETTINGS = ModelSettings(
    d_model=16,
    d_field=4,
    d_hidden=16,
    learning_rate=0.01,
    user_weight_decay=0.1,
    batch_rows=64,
    replay_rows=1_000,
    ema_steps=16,
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


CATEGORIES: dict[int, str | None] = {0: "shoes", 1: "lamps"}


def step_by_step(model: PreferenceLearner, labelled: LabelledRows) -> None:
    """Predict, search and learn, as the stream does."""
    p_click, preference = model.predict_with_preference(labelled.rows, of_products())
    model.search(labelled, p_click, preference, of_products(), CATEGORIES)
    model.learn_many(labelled)


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
    assert isinstance(model, GatedModel)
    tastes = Encoder(model, weights, bank(), "taste")
    rows = draw(200, 5).rows
    creatives_of = {product: np.unique(rows.creatives[rows.products == product]) for product in range(N_PRODUCTS)}
    _, preference = learnt.model.predict_with_preference(rows, creatives_of)
    with torch.inference_mode():
        values = model.images(bank().images()).value.numpy()  # (C, D)
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
        for step in range(24):
            labelled = draw(150, 100 + step)
            changes = [ChangeSet(), ChangeSet()]
            for model, change in zip((undisturbed, restarted), changes, strict=True):
                step_by_step(model, labelled)
                if step == 2:
                    model.relearn([1], CATEGORIES)
                model.write(change)
            assert list(changes[0]) == list(changes[1]), step
            store.commit(changes[1])
            restarted = learner(seed=1)
            with store.read() as txn:
                restarted.restore(txn)
        with store.read() as txn:
            assert txn.count(Table.REPLAY) == 7  # 1,000 rows in blocks of 150


def head_of(model: PreferenceLearner) -> LearnerHead:
    changes = ChangeSet()
    model.write(changes)
    return decoded_head(changes)


def decoded_head(changes: ChangeSet) -> LearnerHead:
    value = changes.get(Table.LEARNER, b"head")
    assert value is not None
    return msgspec.msgpack.decode(value, type=LearnerHead)


def test_it_goes_on_from_the_state_bit_by_bit_while_an_attribute_is_averaged_anew(tmp_path: Path) -> None:
    undisturbed, restarted = learner(seed=2), learner(seed=2)
    for model in (undisturbed, restarted):
        learn(model, draw(4_000, 1))
        step_by_step(model, draw(64, 2))
        model.relearn([0], CATEGORIES)
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        for step in range(4):
            changes = [ChangeSet(), ChangeSet()]
            for model, change in zip((undisturbed, restarted), changes, strict=True):
                model.write(change)
                model.learn_many(draw(128, 100 + step))
            assert list(changes[0]) == list(changes[1]), step
            head = decoded_head(changes[1])
            # Learning has shown which attribute decides: its average alone starts anew.
            assert head.averaged_since == [head.n_steps - 2 * step, 0, 0, 0]
            store.commit(changes[1])
            restarted = learner(seed=2)
            with store.read() as txn:
                restarted.restore(txn)
            restarted.learn_many(draw(128, 100 + step))


def test_the_average_of_an_attribute_that_is_learnt_anew_follows_its_weights_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ValueWarmUp, "fill", lambda *_: None)
    settings = SETTINGS.model_copy(update={"ema_steps": 10_000})
    still, anew = learn(learner(settings), draw(4_000, 1)), learn(learner(settings), draw(4_000, 1))
    before = weights_of(anew)[1]
    anew.relearn([0, 1], CATEGORIES)
    # Rows of products that relearn weigh more: only the average is to differ here.
    anew._head.stressed_until.clear()
    anew._head.replay_floors.clear()
    for model in (still, anew):
        model.learn_many(draw(64, 2))
    (weights, average), (same, average_still) = weights_of(anew), weights_of(still)
    assert np.array_equal(weights, same)
    owners = anew.new_model().field_of_parameter().numpy()
    restarted = [field for field, since in enumerate(head_of(anew).averaged_since) if since]
    own = np.isin(owners, restarted)
    assert 0 < own.sum() < own.size
    assert average[~own] == pytest.approx(average_still[~own], abs=1e-6)
    assert average[own] == pytest.approx(before[own] + 0.8 * (weights - before)[own], abs=1e-5)
    assert np.abs(average - average_still)[own].max() > 1e-3


def weights_of(model: PreferenceLearner) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the weights, and their average."""
    changes = ChangeSet()
    model.write(changes)
    weights = changes.get(Table.LEARNER, b"weights")
    assert weights is not None
    return np.frombuffer(weights, np.float32), np.frombuffer(model.average_weights(), np.float32)


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


# --- Tastes that change


def other_driver(n: int, seed: int) -> LabelledRows:
    """As `draw`, but for product 1 the second attribute decides."""
    labelled = draw(n, seed)
    rng = np.random.default_rng([seed, 1])
    rows = labelled.rows
    likes = (rows.attributes[:, 1] == 2) == (rows.creatives % N_CREATIVES < 2)
    clicks = (rng.random(n) < np.where(likes, 0.5, 0.1)).astype(np.float32)
    return LabelledRows(rows, np.where(rows.products == 1, clicks, labelled.clicks), labelled.weights)


def auroc(model: PreferenceLearner, asked: LabelledRows, product: int) -> float:
    of_product = asked.take(asked.rows.products == product)
    return float(roc_auc_score(of_product.clicks, model.predict_many(of_product.rows)))


def heeded(model: PreferenceLearner) -> list[int]:
    encoder = model.new_model()
    assert isinstance(encoder, GatedModel)
    flat = FlatParameters(encoder)
    flat.vector.copy_(torch.from_numpy(np.frombuffer(model.average_weights(), np.float32).copy()))
    return encoder.heeded_fields(bank().titles(np.arange(N_PRODUCTS))).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_another_attribute_that_decides_is_found_and_heeded(seed: int) -> None:
    model = learn(learner(seed=seed), draw(12_000, 10 + seed))
    assert heeded(model) == [0, 0]
    model.relearn([1], CATEGORIES)
    for step in range(40):
        step_by_step(model, other_driver(200, 1_000 + 100 * seed + step))
    assert heeded(model) == [0, 1]
    asked = other_driver(4_000, 99)
    assert auroc(model, asked, 0) > 0.7
    assert auroc(model, asked, 1) > 0.65


def test_an_attribute_is_averaged_anew_once_it_is_heeded_instead_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = learn(learner(), draw(2_000, 1))
    found = Finding([1], 1, np.random.default_rng(0).standard_normal((CARDINALITIES[1], 3)))
    monkeypatch.setattr(AttributeSearch, "observe_many", lambda *_: [found])
    assert heeded(model)[1] != 1
    step_by_step(model, draw(64, 2))
    assert heeded(model)[1] == 1
    n_steps = head_of(model).n_steps
    assert head_of(model).averaged_since == [0, n_steps - 1, 0, 0]
    step_by_step(model, draw(64, 3))  # told again, which changes nothing
    assert head_of(model).averaged_since == [0, n_steps - 1, 0, 0]


def test_the_attribute_stays_when_tastes_only_turn_round() -> None:
    model = learn(learner(), draw(12_000, 1))
    model.relearn([0, 1], CATEGORIES)
    for step in range(40):
        step_by_step(model, draw(200, 1_000 + step, turned=True))
    assert heeded(model) == [0, 0]
    asked = draw(4_000, 98, turned=True)
    assert min(auroc(model, asked, product) for product in range(N_PRODUCTS)) > 0.7


def test_rows_of_a_product_that_relearns_weigh_more() -> None:
    still, stressed = learn(learner(), draw(2_000, 1)), learn(learner(), draw(2_000, 1))
    stressed.relearn([1], CATEGORIES)
    assert still.average_weights() != learn(stressed, draw(64, 2)).average_weights()


@pytest.mark.parametrize(
    ("n_new", "n_late", "steps", "taken_back"),
    [
        pytest.param(180, 0, [60, 60, 60], [0, 0, 0], id="as many steps as new rows need"),
        pytest.param(180, 30, [80, 80, 80], [10, 10, 10], id="corrections are spread and give no step of their own"),
        pytest.param(0, 90, [180], [90], id="but one, where there is nothing else"),
        pytest.param(20, 1, [22], [1], id="a few rows are one step"),
    ],
)
def test_the_steps_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, n_new: int, n_late: int, steps: list[int], taken_back: list[int]
) -> None:
    taken: list[LabelledRows] = []
    monkeypatch.setattr(PreferenceLearner, "_step", lambda self, labelled: taken.append(labelled))
    late = draw(n_late, 2)
    pairs = [LabelledRows(late.rows, 0 * late.clicks, -late.weights), late]
    labelled = LabelledRows.concatenate([draw(n_new, 1), *pairs])
    learner(SETTINGS.model_copy(update={"replay_ratio": 0.0})).learn_many(labelled)
    assert [len(step) for step in taken] == steps
    assert [int((step.weights < 0).sum()) for step in taken] == taken_back


def test_a_floor_below_all_that_is_kept_is_forgotten(tmp_path: Path) -> None:
    model = learn(learner(), draw(1_000, 1))
    model.relearn([1], CATEGORIES)
    floors = []
    for step in range(8):
        learn(model, draw(200, 10 + step))
        floors.append(head_of(model).replay_floors)
    assert floors[0] == {1: 5}
    assert floors[-1] == {}


def test_audiences_that_go_through_the_model_together_are_told_what_each_is_alone(learnt: Learnt) -> None:
    model = learnt.model
    attributes = draw(9, 71).rows.attributes
    audiences = [
        Audience(1, attributes[:6], np.array([4, 6, 7])),
        Audience(0, attributes[6:], np.array([0, 1, 2, 3])),
    ]
    together = model.expect_many(audiences)
    assert [found.shape for found in together] == [(6, 3), (3, 4)]
    for audience, found in zip(audiences, together, strict=True):
        for column, creative in enumerate(audience.creatives.tolist()):
            n = len(audience.attributes)
            rows = Rows(np.full(n, audience.product), np.full(n, creative), audience.attributes)
            assert found[:, column] == pytest.approx(model.predict_many(rows), abs=1e-6)
    assert model.expect_many([]) == []
