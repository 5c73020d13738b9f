"""The learner: the preference model trained one micro-batch at a time.

Each step takes new labelled rows and as many replayed ones. Predictions come from a moving average
of the weights, which does better than the weights themselves. Everything random depends on the
seed and the number of the step, so that a replay of the log repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from online.features import FeatureBank
from online.mismatch import WeightsMismatchError
from online.model import FlatParameters, PreferenceModel, weight_decays
from online.relevance import attribute_relevance
from online.replay import Replay, pack_rows, unpack_rows
from online.rows import LabelledRows, Rows
from online.settings import ModelSettings, UserSpace
from state.records import number_key, split_number_key
from state.store import ChangeSet, ReadTransaction, Table

Predictions = npt.NDArray[np.float32]

AVERAGED_SHARE = 1 / 8
"""Share of the steps so far over which the weights that are used are averaged, until that is ``ema_steps``."""

REVIEWED_ROWS = (1_500, 2_100, 3_000, 4_200, 6_000, 8_500, 12_000, 17_000, 24_000)
"""Rows since a change of tastes at which it is asked whether another attribute decides them now."""

MIN_RELEVANCE = 5.0
"""Standard deviations from which an attribute is believed to."""

STRESS = 2.0
"""How many times a row counts whose product's tastes have changed lately."""

STRESSED_ROWS = 100_000
"""Rows of all products for which it does."""


class Review(msgspec.Struct, array_like=True):
    """Products whose tastes changed together, and how often it was asked what decides them now."""

    products: list[int]
    n_reviews: int = 0


class LearnerHead(msgspec.Struct, array_like=True):
    """The learner's small numbers.

    ``replay_floors`` maps a product whose tastes have changed to its first replay block that counts, and
    ``stressed_until`` to the number of learnt rows up to which its own weigh more; ``reviews`` are under way.
    """

    n_parameters: int
    n_steps: int
    n_blocks: int
    n_rows_learnt: int
    replay_floors: dict[int, int]
    stressed_until: dict[int, int]
    reviews: list[Review]


class Encoder:
    """A preference model with fixed weights: the users as one encoder version sees them.

    Parameters
    ----------
    model, weights
        The model, and what it is set to: float32 bytes.
    bank
        Features of the registered products.
    space
        ``embedding``: users are their e_{u|t}; ``taste``: what of it decides which images they prefer.
    """

    def __init__(self, model: PreferenceModel, weights: bytes, bank: FeatureBank, space: UserSpace) -> None:
        self._space = space
        self._model = model.eval()
        flat = FlatParameters(self._model)
        n_found = len(weights) // 4
        if n_found != len(flat.vector):
            raise WeightsMismatchError(n_found, len(flat.vector))
        flat.vector.copy_(torch.from_numpy(np.frombuffer(weights, np.float32).copy()))
        self._bank = bank

    def embed_many(self, products: npt.NDArray[np.int64], attributes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return users as their products see them, (B, D) float32. Eq. 2."""
        distinct, index = np.unique(products, return_inverse=True)
        with torch.inference_mode():
            e_t = self._model.embed_titles(self._bank.titles(distinct))  # (P, D)
            embedded = self._model.embed_users(
                torch.from_numpy(attributes.astype(np.int64)), e_t, torch.from_numpy(index)
            )
            if self._space == "taste":
                embedded = self._model.tastes(embedded, e_t, torch.from_numpy(index))
        return np.asarray(embedded.numpy(), np.float32)


class PreferenceLearner:
    """Learns clicks from labelled rows and predicts them.

    Parameters
    ----------
    cardinalities, title_dim, image_dim
        Shape of the input; see `PreferenceModel`.
    settings
        The model and its training.
    bank
        Features of the registered products and creatives.
    seed
        Seed of the first weights and of replay.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        title_dim: int,
        image_dim: int,
        settings: ModelSettings,
        bank: FeatureBank,
        seed: int,
    ) -> None:
        self._settings = settings
        self._bank = bank
        self._seed = seed
        self._shape = (tuple(cardinalities), title_dim, image_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = PreferenceModel(cardinalities, title_dim, image_dim, settings)
            self._average_model = self.new_model()
        self._flat = FlatParameters(self._model)
        self._decays = weight_decays(self._model, settings)
        self._average = FlatParameters(self._average_model.eval())
        self._average.vector.copy_(self._flat.vector)
        self._parameter = torch.nn.Parameter(self._flat.vector)
        self._parameter.grad = self._flat.gradient
        self._optimizer = torch.optim.Adam([self._parameter], lr=settings.learning_rate, fused=True)
        self._replay = Replay(settings.replay_rows)
        self._head = LearnerHead(len(self._flat.vector), 0, 0, 0, {}, {}, [])
        self._new_blocks: list[tuple[int, bytes]] = []
        self._dropped_blocks: list[int] = []

    @property
    def n_rows_learnt(self) -> int:
        """Labelled rows learnt so far."""
        return self._head.n_rows_learnt

    def new_model(self) -> PreferenceModel:
        """Return a model of the same shape, with weights of its own."""
        return PreferenceModel(*self._shape, self._settings)

    def average_weights(self) -> bytes:
        """Return the averaged weights, float32 bytes."""
        return self._average.vector.numpy().tobytes()

    def predict_many(self, rows: Rows) -> Predictions:
        """Return the probability of a click, (B,) float32."""
        if not len(rows):
            return np.zeros(0, np.float32)
        with torch.inference_mode():
            return np.asarray(torch.sigmoid(self._logits(self._average_model, rows)).numpy(), np.float32)

    def predict_with_preference(
        self, rows: Rows, creatives_of: Mapping[int, npt.NDArray[np.int64]]
    ) -> tuple[Predictions, Predictions]:
        """Return the probability of a click, and how much the user prefers this creative, both (B,).

        The preference is the user-by-image part of the logit, less its mean over the product's
        creatives, which ``creatives_of`` names by product (registration numbers).
        """
        if not len(rows):
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        model = self._average_model
        with torch.inference_mode():
            logits, _, preference = self._preferences(model, rows, creatives_of)
        return np.asarray(torch.sigmoid(logits).numpy(), np.float32), np.asarray(preference.numpy(), np.float32)

    def learn_many(self, labelled: LabelledRows) -> None:
        """Take as many steps as the rows need, each on new and replayed rows."""
        if not self._head.n_steps:
            # The constants of the features are those of what is registered when learning starts.
            self._model.title_standard.fit(self._bank.titles())
            self._model.image_standard.fit(self._bank.images())
            self._average.vector.copy_(self._flat.vector)
        for start in range(0, len(labelled), self._settings.batch_rows):
            new = labelled.take(slice(start, start + self._settings.batch_rows))
            rng = np.random.default_rng([self._seed, self._head.n_steps])
            old = self._replay.sample(round(len(new) * self._settings.replay_ratio), self._head.replay_floors, rng)
            self._step(LabelledRows.concatenate([new, old]) if len(old) else new)
        self._remember(labelled)
        self._head.n_rows_learnt += len(labelled)

    def relearn(self, products: Sequence[int]) -> None:
        """Learn the tastes of products anew, for they have changed.

        Their rows so far stay out of replay, and new ones weigh more for a while. Attributes that no other product
        heeds start afresh: the user embeddings that were right are wrong now. Later it is asked whether another
        attribute decides these tastes; then their title gates are turned to it, for hardly any gradient comes
        through a gate that is closed.
        """
        for product in products:
            self._head.replay_floors[product] = self._head.n_blocks
            self._head.stressed_until[product] = self._head.n_rows_learnt + STRESSED_ROWS
        # A product that changes again is reviewed with those that it changes with now.
        for review in self._head.reviews:
            review.products = [product for product in review.products if product not in products]
        self._head.reviews = [review for review in self._head.reviews if review.products]
        self._head.reviews.append(Review(list(products)))
        idle = self._model.idle_fields(self._bank.titles()[~self._chosen(products)])
        self._start_afresh(idle, ~idle)

    def _chosen(self, products: Sequence[int]) -> Tensor:
        chosen = torch.zeros(len(self._bank.titles()), dtype=torch.bool)
        chosen[torch.tensor(list(products))] = True
        return chosen

    def _start_afresh(self, fields: Tensor, like: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._head.n_steps)
            fresh = self.new_model()
        for model in (self._model, self._average_model):
            model.start_afresh(fresh, fields, like)

    def review(self, creatives_of: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Turn products whose tastes have changed to the attribute that decides them now, once it is plain.

        ``creatives_of`` names the creatives by product (registration numbers).
        """
        for review in self._head.reviews:
            rows = self._replay.rows_of(review.products, self._head.replay_floors)
            if len(rows) < REVIEWED_ROWS[review.n_reviews]:
                continue
            review.n_reviews += 1
            relevance = self._relevance(rows, creatives_of)
            best = int(relevance.argmax())
            chosen = self._chosen(review.products)
            titles = self._bank.titles()
            heeded = int(self._model.heeded_fields(titles[chosen]).mode().values)
            if best == heeded or relevance[best] < max(MIN_RELEVANCE, relevance[heeded] + MIN_RELEVANCE / 2):
                continue
            idle = self._model.idle_fields(titles[~chosen])
            for model in (self._model, self._average_model):
                model.redirect_gates(titles, chosen, best)
            self._start_afresh(idle & (torch.arange(len(idle)) == best), ~idle)
            review.n_reviews = len(REVIEWED_ROWS)
        self._head.reviews = [review for review in self._head.reviews if review.n_reviews < len(REVIEWED_ROWS)]

    def _relevance(
        self, labelled: LabelledRows, creatives_of: Mapping[int, npt.NDArray[np.int64]]
    ) -> npt.NDArray[np.float64]:
        model, rows = self._average_model, labelled.rows
        with torch.inference_mode():
            logits, own, preference = self._preferences(model, rows, creatives_of)
            residuals = torch.from_numpy(labelled.clicks) - torch.sigmoid(logits - preference)  # (B,)
        return attribute_relevance(residuals.double().numpy(), own.double().numpy(), rows.attributes, self._shape[0])

    def _preferences(
        self, model: PreferenceModel, rows: Rows, creatives_of: Mapping[int, npt.NDArray[np.int64]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return click logits (B,), image values less their product mean (B, D), and preferences for them (B,)."""
        e_t, titles, e_ut = self._embed(model, rows)
        logits, value, images = self._score(model, rows, e_t, titles, e_ut)
        means = torch.stack(
            [
                model.image_value(model.embed_images(self._bank.images(creatives_of[int(product)]))).mean(dim=0)
                for product in np.unique(rows.products)
            ]
        )  # (P, D)
        own = value[images] - means[titles]  # (B, D)
        return logits, own, (model.tastes(e_ut, e_t, titles) * own).sum(dim=-1)

    def _embed(self, model: PreferenceModel, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return e_t of the distinct products (P, D), each row's among them (B,), and e_{u|t} (B, D)."""
        products, product_index = np.unique(rows.products, return_inverse=True)
        titles = torch.from_numpy(product_index)
        e_t = model.embed_titles(self._bank.titles(products))  # (P, D)
        e_ut = model.embed_users(torch.from_numpy(rows.attributes.astype(np.int64)), e_t, titles)  # (B, D)
        return e_t, titles, e_ut

    def _score(
        self, model: PreferenceModel, rows: Rows, e_t: Tensor, titles: Tensor, e_ut: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return click logits (B,), the distinct images' values (C, D), and each row's image among them (B,)."""
        creatives, creative_index = np.unique(rows.creatives, return_inverse=True)
        images = torch.from_numpy(creative_index)
        e_v = model.embed_images(self._bank.images(creatives))  # (C, D)
        value = model.image_value(e_v)  # (C, D)
        return model(e_ut, e_t, titles, e_v, value, images), value, images

    def _logits(self, model: PreferenceModel, rows: Rows) -> Tensor:
        return self._score(model, rows, *self._embed(model, rows))[0]

    def _step(self, labelled: LabelledRows) -> None:
        logits = self._logits(self._model, labelled.rows)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(labelled.clicks), reduction="none"
        )
        weights = labelled.weights * self._stress(labelled.rows.products)
        loss = (losses * torch.from_numpy(weights)).sum() / len(labelled)
        self._flat.gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        self._flat.vector.addcmul_(self._flat.vector, self._decays, value=-self._settings.learning_rate)
        self._optimizer.step()
        self._head.n_steps += 1
        # The average spans the last part of all steps: a fixed span would hold the first steps' weights for long.
        span = min(self._settings.ema_steps, 1 + AVERAGED_SHARE * self._head.n_steps)
        rate = 1 / span
        self._average.vector.lerp_(self._flat.vector, rate)

    def _stress(self, products: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        stress = np.ones(len(products), np.float32)
        for product, until in list(self._head.stressed_until.items()):
            if self._head.n_rows_learnt >= until:
                del self._head.stressed_until[product]
            else:
                stress[products == product] = STRESS
        return stress

    def _remember(self, labelled: LabelledRows) -> None:
        # A label that was taken back must not come back by replay; its correction stays.
        kept = labelled.take(labelled.weights > 0)
        if not len(kept) or not self._settings.replay_rows:
            return
        number = self._head.n_blocks
        self._head.n_blocks += 1
        self._new_blocks.append((number, pack_rows(kept)))
        self._dropped_blocks += self._replay.append(number, kept)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        state = self._optimizer.state[self._parameter]
        changes.put(Table.LEARNER, b"head", msgspec.msgpack.encode(self._head))
        changes.put(Table.LEARNER, b"weights", self._flat.vector.numpy().tobytes())
        changes.put(Table.LEARNER, b"average", self.average_weights())
        if state:
            changes.put(Table.LEARNER, b"first_moment", state["exp_avg"].numpy().tobytes())
            changes.put(Table.LEARNER, b"second_moment", state["exp_avg_sq"].numpy().tobytes())
        for number, block in self._new_blocks:
            changes.put(Table.REPLAY, number_key(number), block)
        for number in self._dropped_blocks:
            changes.delete(Table.REPLAY, number_key(number))
        self._new_blocks.clear()
        self._dropped_blocks.clear()

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, if it holds a learner."""
        head = txn.get(Table.LEARNER, b"head")
        if head is None:
            return
        self._head = msgspec.msgpack.decode(head, type=LearnerHead)
        if self._head.n_parameters != len(self._flat.vector):
            raise WeightsMismatchError(self._head.n_parameters, len(self._flat.vector))
        self._flat.vector.copy_(_vector(txn, b"weights"))
        self._average.vector.copy_(_vector(txn, b"average"))
        if self._head.n_steps:
            self._optimizer.state[self._parameter] = {
                "step": torch.tensor(float(self._head.n_steps)),
                "exp_avg": _vector(txn, b"first_moment"),
                "exp_avg_sq": _vector(txn, b"second_moment"),
            }
        n_fields = len(self._shape[0])
        for key, block in txn.scan(Table.REPLAY):
            self._replay.append(split_number_key(key), unpack_rows(block, n_fields))


def _vector(txn: ReadTransaction, key: bytes) -> Tensor:
    value = txn.get(Table.LEARNER, key)
    assert value is not None, key
    return torch.from_numpy(np.frombuffer(value, np.float32).copy())
