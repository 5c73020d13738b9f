"""Warm-up: a value never learnt stands at its field's mean and is learnt from there; learnt values are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from online.features import FeatureBank
from online.forms import preference_model
from online.learner import PreferenceLearner
from online.rows import LabelledRows, Rows
from online.settings import ModelForm, ModelSettings
from online.warm_up import ValueWarmUp
from state.store import ChangeSet, Store

CARDINALITIES = (3, 4)
DIMS = {"shipped": (8, 8), "paper": (24 * 8, 49 * 8)}


def settings(form: ModelForm) -> ModelSettings:
    return ModelSettings(form=form, d_model=8, d_field=2, d_hidden=8, n_heads=2, batch_rows=32, replay_rows=200)


def learner(form: ModelForm) -> PreferenceLearner:
    bank = FeatureBank(*DIMS[form])
    rng = np.random.default_rng(0)
    bank.put_title(0, rng.standard_normal(DIMS[form][0]).astype(np.float32).tobytes())
    for creative in range(3):
        bank.put_image(creative, rng.standard_normal(DIMS[form][1]).astype(np.float32).tobytes())
    return PreferenceLearner(CARDINALITIES, *DIMS[form], settings(form), bank, 1)


def labelled(attributes: npt.ArrayLike, seed: int = 0, weight: float = 1.0) -> LabelledRows:
    users = np.asarray(attributes, np.uint8).reshape(-1, len(CARDINALITIES))
    rng = np.random.default_rng(seed)
    n = len(users)
    clicks = (rng.random(n) < 0.3).astype(np.float32)
    rows = Rows(np.zeros(n, np.int64), rng.integers(3, size=n), users)
    return LabelledRows(rows, clicks, np.full(n, weight, np.float32))


def values(weights: bytes, form: ModelForm) -> npt.NDArray[np.float32]:
    """Return the embeddings of a model's weights, (V, d_field)."""
    model = preference_model(CARDINALITIES, *DIMS[form], settings(form))
    start = 0
    for name, parameter in model.named_parameters():
        if name == "fields.weight":
            flat = np.frombuffer(weights, np.float32)[start : start + parameter.numel()]
            return flat.reshape(parameter.shape)
        start += parameter.numel()
    raise AssertionError(form)


def weights_of(model: PreferenceLearner) -> tuple[bytes, bytes]:
    changes = ChangeSet()
    model.write(changes)
    found = {key: value for _, key, value in changes}
    weights, average = found[b"weights"], found[b"average"]
    assert weights is not None
    assert average is not None
    return weights, average


@pytest.mark.parametrize("form", ["shipped", "paper"])
def test_a_value_never_learnt_stands_at_the_mean_of_the_learnt_ones(form: ModelForm) -> None:
    model = learner(form)
    # Of the first field codes 1 and 2, the second three times as often; of the second field 0, 2 and 3 alike.
    users = [[2, 0], [2, 2], [2, 3], [1, 0], [2, 2], [2, 3], [2, 0], [1, 2], [2, 3], [2, 0], [1, 2], [2, 3]]
    for step in range(5):
        model.learn_many(labelled(users, step))
        for weights in weights_of(model):
            embedded = values(weights, form)
            assert embedded[0] == pytest.approx(0.25 * embedded[1] + 0.75 * embedded[2], abs=1e-5)
            assert embedded[4] == pytest.approx(embedded[[3, 5, 6]].mean(axis=0), abs=1e-5)


@pytest.mark.parametrize("form", ["shipped", "paper"])
def test_it_is_learnt_from_there(form: ModelForm) -> None:
    model = learner(form)
    for step in range(5):
        model.learn_many(labelled([[2, 2], [1, 3]] * 20, step))
    before = values(weights_of(model)[0], form)
    model.learn_many(labelled([[0, 2]] * 10, 9))
    after = values(weights_of(model)[0], form)
    step_length = np.abs(after[0] - before[0]).max()
    assert 0 < step_length < 0.1
    assert not np.allclose(after[0], (after[1] + after[2]) / 2, atol=1e-6)
    assert after[3] == pytest.approx((after[5] * 110 + after[6] * 100) / 210, abs=1e-5)  # still the mean


def test_nothing_changes_where_every_value_has_been_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = [[a, b] for a in range(3) for b in range(4)]
    with_warm_up, without = learner("shipped"), learner("shipped")
    for step in range(3):
        with_warm_up.learn_many(labelled(everyone, step))
    monkeypatch.setattr(ValueWarmUp, "fill", lambda *_: None)
    for step in range(3):
        without.learn_many(labelled(everyone, step))
    assert weights_of(with_warm_up) == weights_of(without)


def test_a_field_without_any_learnt_value_stays() -> None:
    model = preference_model(CARDINALITIES, 8, 8, settings("shipped"))
    before = model.fields.weight.detach().clone()
    ValueWarmUp(CARDINALITIES).fill(model)
    assert torch.equal(model.fields.weight, before)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_corrections_and_batches_leave_the_counts_as_they_are(
    users: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole, parts = ValueWarmUp(CARDINALITIES), ValueWarmUp(CARDINALITIES)
    whole.observe_many(labelled(users))
    cut = data.draw(st.integers(0, len(users)))
    parts.observe_many(labelled(users[:cut]))
    parts.observe_many(labelled(users[cut:]))
    corrected = users[: data.draw(st.integers(0, len(users)))]
    parts.observe_many(LabelledRows.concatenate([labelled(corrected, weight=-1.0), labelled(corrected)]))
    written = [ChangeSet(), ChangeSet()]
    for warm_up, changes in zip((whole, parts), written, strict=True):
        warm_up.write(changes)
    assert list(written[0]) == list(written[1])


def test_it_goes_on_from_the_state_bit_by_bit(tmp_path: Path) -> None:
    undisturbed, restarted = learner("shipped"), learner("shipped")
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        for step, users in enumerate([[[2, 2]] * 40, [[2, 3], [1, 2]] * 10, [[0, 0]] * 5]):
            changes = [ChangeSet(), ChangeSet()]
            for model, change in zip((undisturbed, restarted), changes, strict=True):
                model.learn_many(labelled(users, step))
                model.write(change)
            assert list(changes[0]) == list(changes[1]), step
            store.commit(changes[1])
            restarted = learner("shipped")
            with store.read() as txn:
                restarted.restore(txn)
