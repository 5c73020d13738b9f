"""The core: late clicks are signed pairs everywhere, and a change of a category's tastes is one of all its products."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from online.core import OnlineCore
from online.encoders import HashedImageEncoder, HashedTextEncoder
from online.features import FeatureBank
from online.registry import Registry
from online.rows import LabelledRows
from online.settings import OnlineSettings
from online.shift import Observed, Shift
from state.records import ImpressionRecord
from state.store import ChangeSet
from streams.events import Creative, Product, ShiftScope

CATEGORIES = {"chair": "chairs", "bench": "chairs", "lamp": "lamps", "spot": "lamps", "vase": None, "bowl": None}
CREATIVES = ("a", "b")
GROUP = 7


def open_nothing(uri: str) -> bytes:
    raise FileNotFoundError(uri)


@pytest.fixture
def registry() -> Registry:
    text, image = HashedTextEncoder(), HashedImageEncoder()
    made = Registry(lambda: text, lambda: image, open_nothing, FeatureBank(text.dim, image.dim))
    for product_id, category in CATEGORIES.items():
        made.put_product(
            Product(product_id=product_id, title=product_id, updated_at_ms=0, category=category), ChangeSet()
        )
        for creative_id in CREATIVES:
            made.put_creative(Creative(creative_id=creative_id, product_id=product_id, created_at_ms=0), 0, ChangeSet())
    return made


class Watched:
    """A core of which the groups differ, and what its parts were told."""

    def __init__(self, online: OnlineSettings, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core = OnlineCore(online, registry, registry._bank)
        self.shifts: list[Shift] = []
        self.observed: list[Observed] = []
        self.relearnt: list[list[int]] = []
        self.restarted: list[tuple[str, str | None]] = []
        self.recalibrated: list[str] = []
        self.given: dict[str, list[LabelledRows]] = {"calibration": [], "expectations": [], "search": [], "learnt": []}
        core, learner = self.core, self.core.learner
        groups = SimpleNamespace(distinct=True)
        monkeypatch.setattr(core.grouping, "groups_of", lambda product_id: groups)
        monkeypatch.setattr(core.grouping, "current_group", lambda product_id, group_id: group_id)
        monkeypatch.setattr(core._detection, "observe_many", self._observe)
        monkeypatch.setattr(learner, "relearn", lambda products, categories: self.relearnt.append(list(products)))
        monkeypatch.setattr(core.expectations, "restart", lambda *key: self.restarted.append(key))
        monkeypatch.setattr(core._calibration, "restart", self.recalibrated.append)
        monkeypatch.setattr(
            core._calibration, "observe_many", lambda given, *_: self.given["calibration"].append(given)
        )
        monkeypatch.setattr(core.expectations, "observe_many", lambda *told: self.given["expectations"].append(told[3]))
        monkeypatch.setattr(learner, "search", lambda given, *_: self.given["search"].append(given))
        monkeypatch.setattr(learner, "learn_many", lambda given, *_: self.given["learnt"].append(given))

    def _observe(self, observed: list[Observed], before_ms: int) -> list[Shift]:
        self.observed += observed
        return self.shifts


@pytest.fixture
def watched(online: OnlineSettings, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(online, registry, monkeypatch)


def record(product_id: str, creative_id: str, *, clicked: bool, code: int = 2) -> ImpressionRecord:
    codes = bytes([code, 2, 0])
    return ImpressionRecord(product_id, creative_id, codes, GROUP, 0, 0, None, None, clicked, True)


def signed(given: LabelledRows) -> list[tuple[int, float, float]]:
    return sorted(zip(given.rows.creatives.tolist(), given.clicks.tolist(), given.weights.tolist(), strict=True))


LABELLED = [
    record("chair", "a", clicked=True),
    record("chair", "a", clicked=False),
    record("chair", "b", clicked=False),
    record("lamp", "b", clicked=True),
]
LATE = [record("chair", "a", clicked=True, code=3), record("spot", "a", clicked=True)]
CHAIR = [(0, 0.0, 1.0), (0, 1.0, 1.0), (1, 0.0, 1.0)]
"""New labels of the product, by number of the creative."""

CHAIR_LATE = [(0, 0.0, -1.0), (0, 1.0, 1.0)]
LAMP = [(5, 1.0, 1.0)]
SPOT_LATE = [(6, 0.0, -1.0), (6, 1.0, 1.0)]


def test_late_clicks_enter_everything_that_learns_from_labels_as_signed_pairs(watched: Watched) -> None:
    watched.core.learn(LABELLED, LATE, 0)
    everything = [CHAIR + CHAIR_LATE, LAMP, SPOT_LATE]
    for part in ("calibration", "expectations"):  # product by product
        assert [signed(given) for given in watched.given[part]] == [sorted(rows) for rows in everything], part
    for part in ("search", "learnt"):
        assert [signed(given) for given in watched.given[part]] == [sorted(CHAIR + CHAIR_LATE + LAMP + SPOT_LATE)], part
    attributes = watched.given["learnt"][0].rows.attributes[:, 0]
    assert sorted(attributes.tolist()) == [2] * 4 + [2, 2] + [3, 3]  # a pair is twice the same row


def test_the_evidence_of_a_change_counts_new_labels_only_and_its_scores_are_weighted(watched: Watched) -> None:
    watched.core.learn(LABELLED, LATE, 0)
    by_product = {item.product_id: item for item in watched.observed}
    assert {product_id: item.cells for product_id, item in by_product.items()} == {
        "chair": {(GROUP, "a"): (2, 1), (GROUP, "b"): (1, 0)},
        "lamp": {(GROUP, "b"): (1, 1)},
        "spot": {},
    }
    weights = {product_id: sorted(item.weights.tolist()) for product_id, item in by_product.items()}
    assert weights == {"chair": [-1, 1, 1, 1, 1], "lamp": [1], "spot": [-1, 1]}
    for item in watched.observed:
        assert item.scores.shape == item.weights.shape
        assert item.category == CATEGORIES[item.product_id]


def test_late_clicks_alone_are_learnt_too_and_nothing_at_all_is_not(watched: Watched) -> None:
    watched.core.learn([], LATE[1:], 0)
    assert [signed(given) for given in watched.given["learnt"]] == [SPOT_LATE]
    assert [item.cells for item in watched.observed] == [{}]
    assert watched.core.learn([], [], 0) == []
    assert len(watched.given["learnt"]) == 1


@pytest.mark.parametrize(
    ("shifts", "relearnt"),
    [
        pytest.param([], None, id="no change"),
        pytest.param([("chair", "product")], ["chair"], id="a product's own"),
        pytest.param([("chair", "category")], ["chair", "bench"], id="a category's, of all its products"),
        pytest.param([("bench", "category"), ("chair", "category")], ["chair", "bench"], id="named twice, learnt once"),
        pytest.param(
            [("spot", "product"), ("chair", "category")], ["chair", "bench", "spot"], id="a category's and a product's"
        ),
        pytest.param([("vase", "product")], ["vase"], id="products without a category have none in common"),
    ],
)
def test_a_category_whose_tastes_change_is_learnt_anew_as_a_whole(
    watched: Watched, registry: Registry, shifts: list[tuple[str, ShiftScope]], relearnt: list[str] | None
) -> None:
    watched.shifts = [Shift(product_id, scope, 9.0, 100, {}) for product_id, scope in shifts]
    assert watched.core.learn(LABELLED, [], 0) == watched.shifts
    expected = [] if relearnt is None else [[registry.products[product_id].number for product_id in relearnt]]
    assert watched.relearnt == expected
    assert watched.restarted == [(product_id, CATEGORIES[product_id]) for product_id in relearnt or []]
    assert watched.recalibrated == sorted({str(CATEGORIES[name]) for name, scope in shifts if scope == "category"})


def test_scores_go_by_the_slope_of_the_category(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    slopes = {CATEGORIES["spot"]: 1.7}
    monkeypatch.setattr(watched.core._calibration, "slope", lambda category: slopes.get(category, 1.0))
    told: list[float] = []
    monkeypatch.setattr("online.core.indifference_scores", lambda clicks, p, own, slope: told.append(slope) or own)
    watched.core.learn(LABELLED, [], 0)
    assert {item.product_id: slope for item, slope in zip(watched.observed, told, strict=True)} == {
        product_id: slopes.get(category, 1.0)
        for product_id, category in CATEGORIES.items()
        if product_id in {item.product_id for item in watched.observed}
    }


def test_products_whose_groups_do_not_differ_are_not_watched(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    restarted: list[str] = []
    monkeypatch.setattr(watched.core._detection, "restart", restarted.append)
    groups = {"chair": SimpleNamespace(distinct=False), "lamp": None, "spot": SimpleNamespace(distinct=True)}
    monkeypatch.setattr(watched.core.grouping, "groups_of", groups.get)
    watched.core.learn(LABELLED, LATE, 0)
    assert [item.product_id for item in watched.observed] == ["spot"]
    assert restarted == ["chair", "lamp"]
    assert [signed(given) for given in watched.given["calibration"]] == [SPOT_LATE]
    # What is expected of groups is compared with clicks all the same.
    assert len(watched.given["expectations"]) == 3


def test_a_correction_moves_the_score_as_if_the_click_had_been_known(watched: Watched) -> None:
    missed = [record("chair", "a", clicked=False, code=3), record("chair", "b", clicked=False)]
    known = [record("chair", "a", clicked=True, code=3), missed[1]]
    totals = []
    for labelled, late in ((known, []), (missed, [known[0]])):
        watched.observed.clear()
        watched.core.learn(labelled, late, 0)
        (item,) = watched.observed
        totals.append(float((item.scores * item.weights).sum()))
        assert int(item.weights.sum()) == 2
    assert np.diff(totals)[0] == pytest.approx(0, abs=1e-6)
