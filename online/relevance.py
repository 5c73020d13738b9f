"""Relevance: which attribute decides what users prefer, found from clicks without learning it first.

A preference model takes long to find the attribute by gradients: through a gate that is nearly flat, or closed after
a change of tastes, hardly any comes. A score test of every attribute against every direction in which images differ
needs some hundred clicks of a category. Its sums are taken from residuals of predictions made before learning, along
directions that nothing has learnt, so that it cannot confirm what the model learnt by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.features import FeatureBank
from online.rows import Candidates, LabelledRows, Rows
from state.records import SEPARATOR
from state.store import ChangeSet, ReadTransaction, Table

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

N_DIRECTIONS = 48
"""Directions of images that are looked at: those along which the creatives of a product differ most."""

N_FITTED_CREATIVES = 8_192
"""Creatives, at most, from which the directions are taken."""

ASKED_CLICKS = tuple(round(100 * 1.2**look) for look in range(19))
"""Clicks of a search at which its sums are looked at; after the last it ends."""

TASTE_SPREAD = 0.45
"""Standard deviation, in logits, of what a value's users prefer in a product's images if the attribute decides."""

MIN_RELEVANCE = 6.0
"""Logarithm of the Bayes factor from which an attribute is believed to decide, ..."""

MIN_LEAD = 3.0
"""... if it is as far ahead of every other."""


@dataclass(frozen=True)
class Finding:
    """An attribute, by its place among them, that decides the tastes for some products (registration numbers).

    ``likeness`` are its values as they have been clicked, (V, R): those that prefer the same images lie together.
    """

    products: list[int]
    field: int
    likeness: Floats


class Sums(msgspec.Struct, array_like=True):
    """What one search has added up; Q directions, V values of all attributes together.

    ``products`` are those whose rows count, by registration number; ``suspected`` is the attribute that stood out when
    they were last looked at. ``scores`` and ``squares`` (Q,) are sums over
    rows, ``by_value`` (V, Q) and ``counts`` (V,) over those with each value: float64 bytes.
    """

    products: list[int]
    since_change: bool
    suspected: int | None = None
    n_asked: int = 0
    n_rows: int = 0
    n_clicks: int = 0
    scores: bytes = b""
    squares: bytes = b""
    by_value: bytes = b""
    counts: bytes = b""

    @property
    def ended(self) -> bool:
        """Whether the search is over."""
        return self.n_asked == len(ASKED_CLICKS)

    def start_anew(self) -> None:
        """Forget what was added up."""
        self.suspected = None
        self.n_asked = self.n_rows = self.n_clicks = 0
        self.scores = self.squares = self.by_value = self.counts = b""


def relevance(
    scores: Floats, squares: Floats, by_value: Floats, counts: Floats, ctr: float, cardinalities: Sequence[int]
) -> Floats:
    """Return how much sooner an attribute explains which images are clicked than chance does, log Bayes factors (N,).

    It is a score test of the interaction between attribute and image, as a random effect: if the attribute decides,
    the mean scores of its values are spread as tastes are (`TASTE_SPREAD`); if not, they are equal. Attributes of
    few and of many values are so compared fairly, and looking often raises a false alarm seldom. An attribute that goes
    with the one that decides (age with child age) shows a part of it.

    Parameters
    ----------
    scores, squares
        Sums over rows of (residual of the click) x (image along a direction), and of its square, (Q,).
    by_value, counts
        The same sums, and the rows, by value of the attributes one after the other, (V, Q) and (V,).
    ctr
        Clicks by impressions.
    cardinalities
        Number of values of each attribute; their sum is V.
    """
    n_rows = counts[: cardinalities[0]].sum()
    variances = squares / n_rows - (scores / n_rows) ** 2  # (Q,)
    seen = variances > 0
    # In units of a row's deviation, a preference of one deviation of the image moves the mean by sqrt(ctr).
    spread = ctr * TASTE_SPREAD**2 / max(int(seen.sum()), 1)
    found = np.zeros(len(cardinalities))
    start = 0
    for field, cardinality in enumerate(cardinalities):
        n = counts[start : start + cardinality]
        means = by_value[start : start + cardinality][n > 0][:, seen] / np.sqrt(variances[seen])
        start += cardinality
        n = n[n > 0, None]
        means = means / n  # (V, Q)
        kept = n / (1 + spread * n)  # precision of a value's mean, its own spread included
        explained = _scatter(means, n) - _scatter(means, kept)
        by_chance = np.log1p(spread * n).sum() + np.log(kept.sum() / n.sum())
        found[field] = (explained - by_chance).sum() / 2
    return found


def _scatter(means: Floats, weights: Floats) -> Floats:
    """Return the weighted squares of means, (V, Q), about their weighted mean, (Q,)."""
    middle = (weights * means).sum(axis=0) / weights.sum()
    return np.asarray((weights * (means - middle) ** 2).sum(axis=0))


def likeness(scores: Floats, squares: Floats, by_value: Floats, counts: Floats) -> Floats:
    """Return the values of one attribute as they have been clicked, (V, R): those that prefer the same images together.

    They are the mean scores of each value, shrunk as far as it has few rows, along the `MAX_AXES` directions in which
    values differ most, each shrunk as far as chance explains it.

    Parameters
    ----------
    scores, squares
        Sums over all rows, (Q,), as in `relevance`.
    by_value, counts
        The attribute's own, (V, Q) and (V,).
    """
    n_rows = counts.sum()
    means = scores / n_rows
    deviations = np.sqrt(np.maximum(squares / n_rows - means**2, 1e-30))
    # In units of the standard error, so that a value that nobody has lies in the middle.
    excess = (by_value - counts[:, None] * means) / (np.sqrt(np.maximum(counts, 1.0))[:, None] * deviations)  # (V, Q)
    left, sizes, _ = np.linalg.svd(excess, full_matrices=False)
    left, sizes = left[:, :MAX_AXES], sizes[:MAX_AXES]
    by_chance = np.sqrt(max((counts > 0).sum() - 1, 1)) + np.sqrt(len(scores))
    shrunk = sizes**2 / (sizes**2 + by_chance**2)  # (R,)
    # Back to means by row, each value shrunk towards the middle as far as it has few: along a direction that hardly
    # differs more than others.
    share = np.sqrt(counts / n_rows)[:, None]
    return np.asarray(left * shrunk * share / (share**2 + 1.0 / np.maximum(sizes**2, 1e-30)))


MAX_AXES = 3
"""Directions in which the values of an attribute are told apart at first."""


class AttributeSearch:
    """Searches, for every category, which attribute decides its tastes.

    A product without category is searched for itself, and only once its tastes have changed.

    Parameters
    ----------
    cardinalities
        Number of codes of each attribute.
    bank
        The images' features.
    """

    def __init__(self, cardinalities: Sequence[int], bank: FeatureBank) -> None:
        self._cardinalities = tuple(cardinalities)
        self._starts = np.cumsum([0, *self._cardinalities[:-1]])
        self._bank = bank
        self._directions = np.zeros((0, 0), np.float32)
        self._n_fitted = 0
        self._searches: dict[bytes, Sums] = {}
        self._search_of: dict[int, bytes] = {}
        self._n_products = 0
        self._changed: dict[bytes, None] = {}
        self._new_directions = False

    def observe_many(
        self,
        labelled: LabelledRows,
        residuals: Floats,
        creatives_of: Mapping[int, Ints],
        category_of: Mapping[int, str | None],
    ) -> list[Finding]:
        """Take in rows; return what was found by now.

        Parameters
        ----------
        labelled, residuals
            Rows that have not been learnt yet, or whose labels are taken back, and click less its predicted probability
            without any preference, (B,).
        creatives_of, category_of
            The creatives and the category of each product, by registration number.
        """
        self._admit(category_of)
        self._fit(creatives_of)
        scores = residuals[:, None] * self._values(labelled.rows, creatives_of)  # (B, Q)
        findings = []
        products, index = np.unique(labelled.rows.products, return_inverse=True)
        for key, positions in self._by_search(products).items():
            search = self._searches[key]
            chosen = np.isin(index, positions)
            self._add(search, scores[chosen], labelled.take(chosen))
            self._changed[key] = None
            # After a restart late clicks can be more than all the rows since then.
            if search.n_rows > search.n_clicks >= ASKED_CLICKS[search.n_asked]:
                findings += self._ask(search)
        return findings

    def restart(self, products: Iterable[int], category_of: Mapping[int, str | None]) -> None:
        """Search anew for products whose tastes have changed, each together with those of its category."""
        for product in products:
            key = _key(product, category_of[product])
            search = self._searches.get(key)
            if search is None or search.ended or not search.since_change:
                for other in [] if search is None else search.products:
                    self._search_of.pop(other, None)
                search = self._searches[key] = Sums([], since_change=True)
            self._include(product, key)

    def _include(self, product: int, key: bytes) -> None:
        if self._search_of.get(product) != key:
            self._searches[key].products.append(product)
            self._search_of[product] = key
            self._changed[key] = None

    def _admit(self, category_of: Mapping[int, str | None]) -> None:
        """Search for new products with their category; tastes of a product without one are not searched at first."""
        for product in range(self._n_products, len(category_of)):
            category = category_of[product]
            if category is None:
                continue
            key = _key(product, category)
            search = self._searches.setdefault(key, Sums([], since_change=False))
            if not search.since_change and not search.ended:
                self._include(product, key)
        self._n_products = len(category_of)

    def _by_search(self, products: Ints) -> dict[bytes, list[int]]:
        """Return the searches that go on, and the places of their products among some."""
        found: dict[bytes, list[int]] = {}
        for position, product in enumerate(products.tolist()):
            key = self._search_of.get(product)
            if key is not None and not self._searches[key].ended:
                found.setdefault(key, []).append(position)
        return found

    def _fit(self, creatives_of: Mapping[int, Ints]) -> None:
        """Choose the directions; again when there are twice as many creatives, and all searches start anew then."""
        n_creatives = len(self._bank.images())
        if n_creatives < 2 * self._n_fitted or not n_creatives:
            return
        step = -(-n_creatives // N_FITTED_CREATIVES)
        chosen = [numbers for product, numbers in sorted(creatives_of.items()) if product % step == 0]
        images = self._bank.images(np.concatenate(chosen)).double().numpy()  # (C, D)
        deviation = images.std(axis=0)
        scale = np.where(deviation > 1e-4, deviation, 1.0)
        own = _own(images / scale, np.repeat(np.arange(len(chosen)), [len(numbers) for numbers in chosen]))
        variances, vectors = np.linalg.eigh(own.T @ own)
        best = np.flatnonzero(variances > 1e-9 * max(variances[-1], 1e-30))[-N_DIRECTIONS:]
        directions = vectors[:, best] / scale[:, None]
        # Laid out as after a restart: the layout decides how a product with it is rounded.
        self._directions = np.ascontiguousarray(directions, np.float32)
        self._n_fitted = n_creatives
        self._new_directions = True
        for key, search in self._searches.items():
            if not search.ended:
                search.start_anew()
                self._changed[key] = None

    def _values(self, rows: Rows, creatives_of: Mapping[int, Ints]) -> Floats:
        """Return each row's image along the directions, less the mean of its product's creatives, (B, Q)."""
        candidates = Candidates.of(rows, creatives_of)
        projected = (self._bank.images(candidates.creatives).numpy() @ self._directions).astype(np.float64)  # (C, Q)
        return _own(projected, candidates.owners)[candidates.creative_index]

    def _add(self, search: Sums, scores: Floats, labelled: LabelledRows) -> None:
        n_values, n_directions = sum(self._cardinalities), scores.shape[1]
        counts = _array(search.counts, n_values)
        by_value = _array(search.by_value, n_values * n_directions).reshape(n_values, n_directions)
        weighted = labelled.weights[:, None] * scores  # (B, Q)
        codes = labelled.rows.attributes.astype(np.int64) + self._starts  # (B, N)
        n_fields = codes.shape[1]
        counts += np.bincount(codes.ravel(), weights=np.repeat(labelled.weights, n_fields), minlength=n_values)
        for direction in range(n_directions):
            weights = np.repeat(weighted[:, direction], n_fields)
            by_value[:, direction] += np.bincount(codes.ravel(), weights=weights, minlength=n_values)
        search.counts, search.by_value = counts.tobytes(), by_value.tobytes()
        search.scores = (_array(search.scores, n_directions) + weighted.sum(axis=0)).tobytes()
        search.squares = (_array(search.squares, n_directions) + (weighted * scores).sum(axis=0)).tobytes()
        search.n_rows += round(float(labelled.weights.sum()))
        search.n_clicks += round(float((labelled.weights * labelled.clicks).sum()))

    def _ask(self, search: Sums) -> list[Finding]:
        by_value = np.frombuffer(search.by_value).reshape(-1, self._directions.shape[1])
        scores, squares, counts = (np.frombuffer(sums) for sums in (search.scores, search.squares, search.counts))
        ctr = search.n_clicks / search.n_rows
        found = relevance(scores, squares, by_value, counts, ctr, self._cardinalities)
        while not search.ended and search.n_clicks >= ASKED_CLICKS[search.n_asked]:
            search.n_asked += 1
        if search.ended:
            search.scores = search.squares = search.by_value = search.counts = b""
        before, search.suspected = search.suspected, _standing_out(found)
        # After a change an attribute is heeded that has been right for long: another one has to stand out twice.
        if search.suspected is None or (search.since_change and search.suspected != before):
            return []
        values = slice(
            self._starts[search.suspected], self._starts[search.suspected] + self._cardinalities[search.suspected]
        )
        placed = likeness(scores, squares, by_value[values], counts[values])
        return [Finding(list(search.products), search.suspected, placed)]

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for key in self._changed:
            changes.put(Table.SEARCHES, key, msgspec.msgpack.encode(self._searches[key]))
        if self._changed:
            changes.put(Table.SEARCHES, _HEAD, msgspec.msgpack.encode((self._n_products, self._n_fitted)))
        if self._new_directions:
            changes.put(Table.SEARCHES, _DIRECTIONS, self._directions.tobytes())
        self._changed.clear()
        self._new_directions = False

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        head = txn.get(Table.SEARCHES, _HEAD)
        if head is None:
            return
        self._n_products, self._n_fitted = msgspec.msgpack.decode(head, type=tuple[int, int])
        directions = txn.get(Table.SEARCHES, _DIRECTIONS)
        assert directions is not None
        self._directions = np.frombuffer(directions, np.float32).reshape(self._bank.images().shape[1], -1)
        for key, value in txn.scan(Table.SEARCHES, prefix=_SEARCH):
            search = self._searches[key] = msgspec.msgpack.decode(value, type=Sums)
            self._search_of |= dict.fromkeys(search.products, key)


_HEAD, _DIRECTIONS, _SEARCH = b"head", b"directions", b"search" + SEPARATOR


def _key(product: int, category: str | None) -> bytes:
    if category is None:
        return _SEARCH + b"product" + SEPARATOR + str(product).encode()
    return _SEARCH + b"category" + SEPARATOR + category.encode()


def _own(values: Floats, owners: Ints) -> Floats:
    """Return values of creatives, (C, Q), less the mean over their product's; ``owners`` (C,) are in order."""
    sizes = np.bincount(owners)
    means = np.add.reduceat(values, np.cumsum(sizes) - sizes) / sizes[:, None]  # (P, Q)
    return values - means[owners]


def _standing_out(found: Floats) -> int | None:
    """Return the attribute whose relevance, (N,), is high and well ahead of every other's."""
    best = int(found.argmax())
    others = np.delete(found, best)
    stands_out = found[best] >= MIN_RELEVANCE and (not len(others) or found[best] - others.max() >= MIN_LEAD)
    return best if stands_out else None


def _array(value: bytes, size: int) -> Floats:
    return np.frombuffer(value).copy() if value else np.zeros(size)
