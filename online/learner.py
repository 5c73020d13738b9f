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

from online.averaging import WeightAverage
from online.features import FeatureBank
from online.forms import preference_model
from online.gated import GatedModel
from online.mismatch import WeightsMismatchError
from online.model import FlatParameters, ImageSide, PreferenceModel, TitleSide, weight_decays
from online.relevance import AttributeSearch, Finding
from online.replay import Replay, pack_rows, unpack_rows
from online.rows import Audience, Candidates, LabelledRows, Rows
from online.settings import ModelSettings, UserSpace
from online.warm_up import ValueWarmUp
from state.records import number_key, split_number_key
from state.store import ChangeSet, ReadTransaction, Table

Predictions = npt.NDArray[np.float32]

STRESS = 2.0
"""How many times a row counts whose product's tastes have changed lately."""

STRESSED_ROWS = 100_000
"""Rows of all products for which it does."""


class LearnerHead(msgspec.Struct, array_like=True):
    """The learner's small numbers.

    ``replay_floors`` maps a product whose tastes have changed to its first replay block that counts, and
    ``stressed_until`` to the number of learnt rows up to which its own weigh more. ``averaged_since`` are the steps
    from which the weights of each attribute are averaged.
    """

    n_parameters: int
    n_steps: int
    n_blocks: int
    n_rows_learnt: int
    replay_floors: dict[int, int]
    stressed_until: dict[int, int]
    averaged_since: list[int]


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
        self._model.freeze()
        self._bank = bank

    def embed_many(self, products: npt.NDArray[np.int64], attributes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return users as their products see them, (B, D) float32. Eq. 2."""
        distinct, index = np.unique(products, return_inverse=True)
        with torch.inference_mode():
            titles = self._model.titles(self._bank.titles(distinct))
            title_index = torch.from_numpy(index)
            embedded = self._model.users(torch.from_numpy(attributes.astype(np.int64)), titles, title_index)
            if self._space == "taste" and isinstance(self._model, GatedModel):
                embedded = self._model.tastes(embedded, titles, title_index)
        return np.asarray(embedded.numpy(), np.float32)


class PreferenceLearner:
    """Learns clicks from labelled rows and predicts them.

    Parameters
    ----------
    cardinalities, title_dim, image_dim
        Shape of the input; see `online.model.PreferenceModel`.
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
            self._model = self.new_model()
            self._average_model = self.new_model()
        self._flat = FlatParameters(self._model)
        self._decays = weight_decays(self._model, settings)
        self._average = FlatParameters(self._average_model.eval())
        self._average.vector.copy_(self._flat.vector)
        self._parameter = torch.nn.Parameter(self._flat.vector)
        self._parameter.grad = self._flat.gradient
        self._optimizer = torch.optim.Adam([self._parameter], lr=settings.learning_rate, fused=True)
        self._replay = Replay(settings.replay_rows)
        self._search = AttributeSearch(cardinalities, bank)
        self._warm_up = ValueWarmUp(cardinalities)
        self._averaging = WeightAverage(self._model.field_of_parameter(), len(self._shape[0]), settings.ema_steps)
        self._head = LearnerHead(len(self._flat.vector), 0, 0, 0, {}, {}, self._averaging.since)
        self._new_blocks: dict[int, bytes] = {}
        self._dropped_blocks: list[int] = []

    @property
    def n_rows_learnt(self) -> int:
        """Labelled rows learnt so far."""
        return self._head.n_rows_learnt

    def new_model(self) -> PreferenceModel:
        """Return a model of the same shape, with weights of its own."""
        return preference_model(*self._shape, self._settings)

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
            logits, preference = self._preferences(model, rows, creatives_of)
        return np.asarray(torch.sigmoid(logits).numpy(), np.float32), np.asarray(preference.numpy(), np.float32)

    def expect_many(self, audiences: Sequence[Audience]) -> list[Predictions]:
        """Return the probability that the users of each audience click each of its product's creatives, (U, C) each.

        Those of all products go through the model together: what little one has takes as long by itself.
        """
        if not audiences:
            return []
        model = self._average_model
        numbers = np.array([audience.product for audience in audiences])
        n_users = [len(audience.attributes) for audience in audiences]
        n_creatives = [len(audience.creatives) for audience in audiences]
        with torch.inference_mode():
            titles = model.titles(self._bank.titles(numbers))
            attributes = np.concatenate([audience.attributes for audience in audiences]).astype(np.int64)
            title_index = torch.arange(len(audiences)).repeat_interleave(torch.tensor(n_users))
            embedded = model.users(torch.from_numpy(attributes), titles, title_index)
            images = model.images(self._bank.images(np.concatenate([audience.creatives for audience in audiences])))
            images_of = zip(*(torch.split(part, n_creatives) for part in images), strict=True)
            crossed = [
                model.cross(users, tuple(part[place : place + 1] for part in titles), of_product)
                for place, (users, of_product) in enumerate(zip(torch.split(embedded, n_users), images_of, strict=True))
            ]
            return [np.asarray(torch.sigmoid(logits).numpy(), np.float32) for logits in crossed]

    def learn_many(self, labelled: LabelledRows, unlearnt: LabelledRows | None = None) -> None:
        """Take as many steps as the rows need, each on new and replayed rows.

        ``unlearnt`` are labels that are taken back and leave nothing in replay (see `forget`).
        """
        given = labelled if unlearnt is None else LabelledRows.concatenate([labelled, unlearnt])
        if not len(given):
            return
        if not self._head.n_steps:
            # The constants of the features are those of what is registered when learning starts.
            self._model.fit_features(self._bank.titles(), self._bank.images())
            self._average.vector.copy_(self._flat.vector)
        # Corrections give no step of their own: they come as pairs that weigh nothing together. Every step takes an
        # equal part from all over the rows, for corrections come last and would fill one alone.
        n_steps = max(1, round(float(given.weights.sum()) / self._settings.batch_rows))
        for step in range(n_steps):
            new = given.take(slice(step, None, n_steps))
            rng = np.random.default_rng([self._seed, self._head.n_steps])
            old = self._replay.sample(round(len(new) * self._settings.replay_ratio), self._head.replay_floors, rng)
            self._step(LabelledRows.concatenate([new, old]) if len(old) else new)
        self._remember(labelled)
        self._warm_up.observe_many(given)
        self._warm_up.fill(self._model, self._average_model)
        self._head.n_rows_learnt += len(labelled)

    def forget(self, rows: LabelledRows) -> None:
        """Remove rows from replay, those that were given and those that took them back."""
        for number, block in self._replay.forget(rows).items():
            if len(block):
                self._new_blocks[number] = pack_rows(block)
            else:
                self._dropped_blocks.append(number)

    def search(
        self,
        labelled: LabelledRows,
        p_click: Predictions,
        preference: Predictions,
        creatives_of: Mapping[int, npt.NDArray[np.int64]],
        category_of: Mapping[int, str | None],
    ) -> None:
        """Search for the attributes that decide the tastes of each category, and heed those that are found.

        Parameters
        ----------
        labelled
            Rows that have not been learnt yet, and labels that are taken back.
        p_click, preference
            What `predict_with_preference` said of them, (B,).
        creatives_of, category_of
            The creatives and the category of each product, by registration number.
        """
        gated = self._gated_models()
        if not gated:
            return
        p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
        common = 1 / (1 + (1 - p) / p * np.exp(preference.astype(np.float64)))  # without any preference
        residuals = labelled.clicks - common
        for found in self._search.observe_many(labelled, residuals, creatives_of, category_of):
            self._heed(found, gated)

    def _heed(self, found: Finding, gated: list[GatedModel]) -> None:
        """Let products heed the attribute that was found to decide."""
        restarted = {found.field} if self._heeded(found.products) != {found.field} else set()
        fresh, likeness = self._fresh_model(), torch.from_numpy(found.likeness.astype(np.float32))
        for model in gated:
            model.heed(self._bank.titles(), self._chosen(found.products), found.field, likeness, fresh)
        self._averaging.restart(restarted, self._head.n_steps)

    def _heeded(self, products: Sequence[int]) -> set[int]:
        """Return the attributes that products heed most; none where the form has no gates."""
        gated = self._gated_models()
        return set(gated[-1].heeded_fields(self._bank.titles(np.array(products))).tolist()) if gated else set()

    def _gated_models(self) -> list[GatedModel]:
        """Return the model and its average; none where the form has no gates that could be told anything."""
        return [model for model in (self._model, self._average_model) if isinstance(model, GatedModel)]

    def relearn(self, products: Sequence[int], category_of: Mapping[int, str | None]) -> None:
        """Learn the tastes of products anew, for they have changed.

        Their rows so far stay out of replay, new ones weigh more for a while, and it is searched again which attribute
        decides.
        """
        for product in products:
            self._head.replay_floors[product] = self._head.n_blocks
            self._head.stressed_until[product] = self._head.n_rows_learnt + STRESSED_ROWS
        if self._gated_models():
            self._search.restart(products, category_of)
        self._averaging.restart(self._heeded(products), self._head.n_steps)

    def remembered(self, product: int) -> LabelledRows:
        """Return the rows of a product, by registration number, that are replayed: since its tastes last changed."""
        return self._replay.of_product(product, self._head.replay_floors.get(product, 0))

    def relearnt(self) -> list[int]:
        """Return the products, by registration number, whose tastes have changed lately."""
        return [product for product, until in self._head.stressed_until.items() if until > self._head.n_rows_learnt]

    def _chosen(self, products: Sequence[int]) -> Tensor:
        chosen = torch.zeros(len(self._bank.titles()), dtype=torch.bool)
        chosen[torch.tensor(list(products))] = True
        return chosen

    def _fresh_model(self) -> GatedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._head.n_steps)
            return GatedModel(*self._shape, self._settings)

    def _preferences(
        self, model: PreferenceModel, rows: Rows, creatives_of: Mapping[int, npt.NDArray[np.int64]]
    ) -> tuple[Tensor, Tensor]:
        """Return click logits and preferences, both (B,)."""
        titles, title_index, e_ut = self._users(model, rows)
        candidates = Candidates.of(rows, creatives_of)
        images = model.images(self._bank.images(candidates.creatives))
        image_index, owners = torch.from_numpy(candidates.creative_index), torch.from_numpy(candidates.owners)
        logits = model(e_ut, titles, title_index, images, image_index)
        return logits, model.preferences(e_ut, titles, title_index, images, image_index, owners)

    def _users(self, model: PreferenceModel, rows: Rows) -> tuple[TitleSide, Tensor, Tensor]:
        """Return the distinct products, each row's among them (B,), and e_{u|t} (B, D)."""
        products, index = np.unique(rows.products, return_inverse=True)
        title_index = torch.from_numpy(index)
        titles = model.titles(self._bank.titles(products))
        return titles, title_index, model.users(torch.from_numpy(rows.attributes.astype(np.int64)), titles, title_index)

    def _images(self, model: PreferenceModel, rows: Rows) -> tuple[ImageSide, Tensor]:
        """Return the distinct creatives, and each row's among them (B,)."""
        creatives, index = np.unique(rows.creatives, return_inverse=True)
        return model.images(self._bank.images(creatives)), torch.from_numpy(index)

    def _logits(self, model: PreferenceModel, rows: Rows) -> Tensor:
        titles, title_index, e_ut = self._users(model, rows)
        logits: Tensor = model(e_ut, titles, title_index, *self._images(model, rows))
        return logits

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
        self._averaging.add(self._average.vector, self._flat.vector, self._head.n_steps)

    def _stress(self, products: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        stress = np.ones(len(products), np.float32)
        for product, until in list(self._head.stressed_until.items()):
            if self._head.n_rows_learnt >= until:
                del self._head.stressed_until[product]
            else:
                stress[products == product] = STRESS
        return stress

    def _remember(self, labelled: LabelledRows) -> None:
        if not len(labelled) or not self._settings.replay_rows:
            return
        number = self._head.n_blocks
        self._head.n_blocks += 1
        self._new_blocks[number] = pack_rows(labelled)
        self._dropped_blocks += self._replay.append(number, labelled)
        floors = self._head.replay_floors
        self._head.replay_floors = {product: floor for product, floor in floors.items() if floor > self._replay.oldest}

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        self._search.write(changes)
        self._warm_up.write(changes)
        state = self._optimizer.state[self._parameter]
        changes.put(Table.LEARNER, b"head", msgspec.msgpack.encode(self._head))
        changes.put(Table.LEARNER, b"weights", self._flat.vector.numpy().tobytes())
        changes.put(Table.LEARNER, b"average", self.average_weights())
        if state:
            changes.put(Table.LEARNER, b"first_moment", state["exp_avg"].numpy().tobytes())
            changes.put(Table.LEARNER, b"second_moment", state["exp_avg_sq"].numpy().tobytes())
        for number, block in self._new_blocks.items():
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
        self._averaging.since = self._head.averaged_since
        self._flat.vector.copy_(_vector(txn, b"weights"))
        self._average.vector.copy_(_vector(txn, b"average"))
        if self._head.n_steps:
            self._optimizer.state[self._parameter] = {
                "step": torch.tensor(float(self._head.n_steps)),
                "exp_avg": _vector(txn, b"first_moment"),
                "exp_avg_sq": _vector(txn, b"second_moment"),
            }
        self._search.restore(txn)
        self._warm_up.restore(txn)
        n_fields = len(self._shape[0])
        for key, block in txn.scan(Table.REPLAY):
            self._replay.append(split_number_key(key), unpack_rows(block, n_fields))


def _vector(txn: ReadTransaction, key: bytes) -> Tensor:
    value = txn.get(Table.LEARNER, key)
    assert value is not None, key
    return torch.from_numpy(np.frombuffer(value, np.float32).copy())
