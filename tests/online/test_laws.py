"""Laws of the online core: what must hold for any users, any order of events and any splits and merges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from online.counts import Counts
from online.encoders import HashedImageEncoder, HashedTextEncoder
from online.features import FeatureBank
from online.forms import preference_model
from online.learner import PreferenceLearner
from online.lineage import match_groups
from online.model import PreferenceModel
from online.pipeline import Pipeline
from online.rows import LabelledRows, Rows
from online.settings import ModelForm, ModelSettings
from state.reading import open_view
from state.records import ImpressionRecord
from state.store import Store
from streams.settings import StreamSettings

CARDINALITIES = (3, 4, 5)
N_CREATIVES = 4
FORMS: tuple[ModelForm, ...] = ("shipped", "paper")

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def model_settings(form: ModelForm) -> ModelSettings:
    return ModelSettings(
        form=form,
        d_model=16,
        d_field=4,
        d_hidden=16,
        n_heads=2,
        learning_rate=0.01,
        user_weight_decay=0.1,
        batch_rows=32,
        replay_rows=200,
        ema_steps=8,
    )


def bank(form: ModelForm) -> FeatureBank:
    tokens = form == "paper"
    text, image = HashedTextEncoder(tokens=tokens), HashedImageEncoder(tokens=tokens)
    made = FeatureBank(text.dim, image.dim)
    for number, title in enumerate(("oak chair", "steel lamp of a long name")):
        made.put_title(number, text.encode(title).tobytes())
    for number in range(2 * N_CREATIVES):
        made.put_image(number, image.encode(None, f"c{number}").tobytes())
    return made


class Bench:
    """A new model of each form, with its features."""

    def __init__(self, form: ModelForm) -> None:
        self.bank = bank(form)
        torch.manual_seed(0)
        dims = (self.bank.titles().shape[1], self.bank.images().shape[1])
        self.model: PreferenceModel = preference_model(CARDINALITIES, *dims, model_settings(form)).eval()
        self.model.fit_features(self.bank.titles(), self.bank.images())

    def logits(self, user: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return e_{u|t} of both products, and the logits of every creative."""
        with torch.inference_mode():
            titles, images = self.model.titles(self.bank.titles()), self.model.images(self.bank.images())
            attributes = torch.tensor([user] * 2 * N_CREATIVES)
            title_index = torch.arange(2 * N_CREATIVES) // N_CREATIVES
            e_ut = self.model.users(attributes, titles, title_index)
            logits = self.model(e_ut, titles, title_index, images, torch.arange(2 * N_CREATIVES))
        return e_ut[::N_CREATIVES].numpy(), logits.numpy()


BENCHES = {form: Bench(form) for form in FORMS}
USERS = st.tuples(*(st.integers(0, cardinality - 1) for cardinality in CARDINALITIES))


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(first=USERS, second=USERS)
def test_two_users_with_other_attributes_have_other_embeddings(
    form: ModelForm, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    assume(first != second)
    a, b = BENCHES[form].logits(first)[0], BENCHES[form].logits(second)[0]
    assert np.linalg.norm(a - b, axis=1).min() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(first=USERS, second=USERS)
def test_what_users_see_in_images_depends_on_the_user(
    form: ModelForm, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    assume(first != second)
    a, b = BENCHES[form].logits(first)[1], BENCHES[form].logits(second)[1]
    # Users who only differ in how much they click would differ by the same in every creative of a product.
    gaps = (a - b).reshape(2, N_CREATIVES)
    assert (gaps - gaps.mean(axis=1, keepdims=True)).std(axis=1).min() > 1e-6


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(user=USERS)
def test_preferences_average_zero_over_a_products_creatives_and_are_the_users_part(
    form: ModelForm, user: tuple[int, ...]
) -> None:
    bench = BENCHES[form]
    n = 2 * N_CREATIVES
    with torch.inference_mode():
        titles, images = bench.model.titles(bench.bank.titles()), bench.model.images(bench.bank.images())
        title_index = torch.arange(n) // N_CREATIVES
        e_ut = bench.model.users(torch.tensor([user] * n), titles, title_index)
        found = bench.model.preferences(e_ut, titles, title_index, images, torch.arange(n), title_index).numpy()
    assert found.reshape(2, N_CREATIVES).sum(axis=1) == pytest.approx(np.zeros(2), abs=1e-4)
    # Two users' logits of a creative differ by their preferences and by a constant of the product.
    other = (0, 0, 0)
    with torch.inference_mode():
        e_other = bench.model.users(torch.tensor([other] * n), titles, title_index)
        other_found = bench.model.preferences(e_other, titles, title_index, images, torch.arange(n), title_index)
    gaps = (bench.logits(user)[1] - bench.logits(other)[1] - found + other_found.numpy()).reshape(2, N_CREATIVES)
    assert gaps - gaps.mean(axis=1, keepdims=True) == pytest.approx(np.zeros((2, N_CREATIVES)), abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_the_same_seed_gives_the_same_state(form: ModelForm, seed: int, sizes: list[int]) -> None:
    found = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        features = bank(form)
        dims = (features.titles().shape[1], features.images().shape[1])
        model = PreferenceLearner(CARDINALITIES, *dims, model_settings(form), features, seed)
        for size in sizes:
            products = rng.integers(2, size=size)
            creatives = products * N_CREATIVES + rng.integers(N_CREATIVES, size=size)
            codes = np.stack([rng.integers(c, size=size) for c in CARDINALITIES], axis=1).astype(np.uint8)
            clicks = (rng.random(size) < 0.3).astype(np.float32)
            model.learn_many(LabelledRows(Rows(products, creatives, codes), clicks, np.ones(size, np.float32)))
        found.append(model.average_weights())
    assert found[0] == found[1]


N_USERS = 30
EVENTS = st.tuples(st.integers(0, N_USERS - 1), st.integers(0, 2))


@FEW
@given(data=st.data())
def test_sums_over_groups_are_the_creatives_totals_after_any_splits_and_merges(data: st.DataObject) -> None:
    counts, totals = Counts(half_life_ms=1e6), Counter[str]()
    labels, ids, next_id, now_ms = np.zeros(N_USERS, np.uint8), [0], 1, 0
    successors: dict[int, int] = {}
    late: list[ImpressionRecord] = []
    for _ in range(data.draw(st.integers(1, 6))):
        shown = [
            record(f"c{creative}", ids[int(labels[user])], now_ms)
            for user, creative in data.draw(
                st.lists(st.tuples(st.integers(0, N_USERS - 1), st.integers(0, 2)), max_size=12)
            )
        ]
        counts.count_impressions(shown, now_ms)
        totals.update(each.creative_id for each in shown)
        late += shown
        clicked = [late.pop() for _ in range(data.draw(st.integers(0, len(late))))]
        counts.count_clicks(((each, follow(each.group_id, successors)) for each in clicked), now_ms)
        totals.update(f"{each.creative_id} clicked" for each in clicked)
        new_labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=N_USERS, max_size=N_USERS)), np.uint8)
        if data.draw(st.booleans()):  # a mere renaming, or nearly: groups survive it
            new_labels = np.where(np.arange(N_USERS) % 10 == 0, new_labels, (labels + 1) % len(ids)).astype(np.uint8)
        k = int(new_labels.max()) + 1
        lineage = match_groups(labels, ids, new_labels, k, next_id, 0.5)
        next_id += len(lineage.born)
        for old, heir in lineage.merged.items():
            counts.hand_over("p", old, heir, now_ms)
        successors |= lineage.merged
        labels, ids = new_labels, lineage.group_ids
        now_ms += 1_000
        found = Counter[str]()
        for (_, creative_id), cell in counts.cells_of("p").items():
            assert 0 <= cell.n_clicks <= cell.n_impressions
            assert 0 <= cell.live_clicks <= cell.live_impressions + 1e-9
            found[creative_id] += cell.n_impressions
            found[f"{creative_id} clicked"] += cell.n_clicks
        assert +found == +totals


def record(creative_id: str, group_id: int, now_ms: int) -> ImpressionRecord:
    return ImpressionRecord("p", creative_id, b"", group_id, now_ms, 0, None, None, False, False)


def follow(group_id: int, successors: dict[int, int]) -> int:
    while group_id in successors:
        group_id = successors[group_id]
    return group_id


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), start=st.integers(0, 2_000))
@example(seed=5, start=1_115)  # a sum over a batch's rows in another order put a user into another group
def test_permuting_the_events_of_a_batch_leaves_the_counts(
    log: Any, new_pipeline: Callable[[], Pipeline], streams: StreamSettings, seed: int, start: int
) -> None:
    head = log.messages[:start]
    # A correction concerns what came before it: there order matters.
    batch = [m for m in log.messages[start : start + 600] if m.topic != streams.topics.corrections]
    # Products and creatives come first: what is shown must be known.
    known = [message for message in batch if message.topic in (streams.topics.products, streams.topics.creatives)]
    batch = [message for message in batch if message not in known]
    order = np.random.default_rng(seed).permutation(len(batch))
    found = []
    for messages in (known + batch, known + [batch[place] for place in order]):
        with TemporaryDirectory() as folder, Store(Path(folder), map_size_mib=64, sync=False) as store:
            pipeline = new_pipeline()
            for part in (head, messages):
                if part:
                    with store.read() as txn:
                        changes, _ = pipeline.run(part, txn)
                    store.commit(changes)
            with open_view(store) as view:
                cells = view.cells()
        found.append({(c.product_id, c.group_id, c.creative_id): (c.n_impressions, c.n_clicks) for c in cells})
    assert found[0] == found[1]
