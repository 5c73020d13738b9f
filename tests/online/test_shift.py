"""Shift detection: hardly an alarm while tastes stay, one soon after they change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from online.settings import FALSE_ALARMS, ShiftSettings
from online.shift import (
    MAX_PREFERENCE,
    CellCounts,
    Observed,
    Shift,
    ShiftDetection,
    Sum,
    indifference_scores,
)
from state.store import ChangeSet, Store, Table
from streams.events import ShiftScope

# Fixed here, so that the cases stay what they are when the defaults are tuned: a product's sum raises the alarm at
# 12 nats. That of a category does so at 8.6, which follows.
SCALE, SHARE = FALSE_ALARMS["product"]
SETTINGS = ShiftSettings(
    warm_up_impressions=500,
    false_alarms_per_million=SCALE / SHARE * math.exp(-12),
    min_impressions=200,
    cool_down_impressions=3_000,
)
BATCH = 100
CELLS: CellCounts = {(1, "a"): (60, 6), (2, "a"): (40, 1)}

Draw = Callable[[int], npt.NDArray[np.float64]]


@pytest.mark.parametrize(
    ("per_million", "scope", "nats"),
    [
        (500, "category", 0.58),
        (500, "product", 3.95),
        (5, "category", 5.18),
        (5, "product", 8.56),
        (0.01, "category", 11.40),
        (0.01, "product", 14.77),
    ],
)
def test_fewer_accepted_false_alarms_raise_the_threshold(per_million: float, scope: ShiftScope, nats: float) -> None:
    found = ShiftSettings(false_alarms_per_million=per_million).threshold(scope)
    assert found == pytest.approx(nats, abs=0.01)


@pytest.mark.parametrize("per_million", [0.1, 5, 50])
def test_the_false_alarms_of_both_scopes_together_are_those_accepted(per_million: float) -> None:
    settings = ShiftSettings(false_alarms_per_million=per_million)
    by_scope = [scale * math.exp(-settings.threshold(scope)) for scope, (scale, _) in FALSE_ALARMS.items()]
    assert sum(by_scope) == pytest.approx(per_million)


def given(product: str, category: str | None, scores: npt.NDArray[np.float64], cells: CellCounts) -> Observed:
    """New labels."""
    return Observed(product, category, scores, np.ones(len(scores), np.float32), cells)


def feed(
    detection: ShiftDetection, n: int, scores: Draw, product: str = "p", cells: CellCounts = CELLS
) -> Iterator[tuple[int, Shift]]:
    """Feed n impressions in batches; yield each shift with the number of impressions up to it."""
    for end in range(BATCH, n + 1, BATCH):
        for shift in detection.observe_many([given(product, None, scores(BATCH), cells)]):
            yield end, shift


def logistic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def taste_scores(seed: int, sign: float, strength: float = 0.6, ctr: float = 0.06) -> Draw:
    """Scores where the preference that the model sees is true (1), has turned round (-1) or means nothing (0)."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> npt.NDArray[np.float64]:
        seen = strength * rng.standard_normal(n)
        base = np.log(ctr / (1 - ctr))
        clicks = (rng.random(n) < logistic(base + sign * seen)).astype(np.float32)
        own = np.clip(seen, -MAX_PREFERENCE, MAX_PREFERENCE)
        return indifference_scores(clicks, logistic(base + seen).astype(np.float32), own, 1.0)

    return draw


def constant(value: float) -> Draw:
    return lambda n: np.full(n, value)


@pytest.mark.parametrize(
    ("strength", "ctr"), [(0.0, 0.06), (0.1, 0.06), (0.3, 0.06), (0.6, 0.06), (0.9, 0.06), (0.6, 0.01), (0.6, 0.3)]
)
def test_no_alarm_in_100_000_impressions_while_tastes_stay(strength: float, ctr: float) -> None:
    scores = taste_scores(1, 1, strength, ctr)
    assert list(feed(ShiftDetection(SETTINGS), 100_000, scores)) == []


def test_the_default_settings_raise_few_false_alarms() -> None:
    n_alarms = sum(
        len(list(feed(ShiftDetection(ShiftSettings()), 50_000, taste_scores(seed, 1)))) for seed in range(20)
    )
    # A million impressions of products without a category, whose tastes are known exactly: 0.4 alarms are expected, and
    # more than two have a probability below 1%.
    assert n_alarms <= 2


@pytest.mark.parametrize("seed", range(6))
def test_tastes_that_turn_round_are_found_and_placed(seed: int) -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, 10_000, taste_scores(seed, 1))) == []
    found = list(feed(detection, 1_500, taste_scores(100 + seed, -1)))
    assert len(found) == 1
    after, shift = found[0]
    assert shift.product_id == "p"
    assert shift.statistic >= SETTINGS.threshold("product")
    # The change is placed where it was, to within some batches, and its evidence is what came since.
    assert abs(shift.n_impressions - after) <= 400
    n_batches = shift.n_impressions // BATCH
    assert shift.cells == {key: (n * n_batches, x * n_batches) for key, (n, x) in CELLS.items()}


def test_one_product_changing_says_nothing_of_another() -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, 5_000, taste_scores(1, 1))) == []
    assert list(feed(detection, 5_000, taste_scores(2, 1), product="q")) == []
    assert [shift.product_id for _, shift in feed(detection, 2_000, taste_scores(3, -1), product="q")] == ["q"]
    assert list(feed(detection, 5_000, taste_scores(4, 1))) == []


def test_no_shift_in_warm_up_nor_in_cool_down() -> None:
    detection = ShiftDetection(SETTINGS)
    assert list(feed(detection, SETTINGS.warm_up_impressions, constant(1.0))) == []
    found = [after for after, _ in feed(detection, 10_000, constant(1.0))]
    # 100 a batch is over the threshold at once; evidence needs two batches.
    assert found == [200, 200 + 3_200, 200 + 2 * 3_200, 200 + 3 * 3_200]


def test_a_shift_waits_for_its_evidence() -> None:
    detection = ShiftDetection(SETTINGS.model_copy(update={"min_impressions": 1_000}))
    list(feed(detection, 500, constant(-1.0)))
    ((after, shift),) = feed(detection, 3_000, constant(0.1))
    assert (after, shift.n_impressions) == (1_000, 1_000)
    assert shift.statistic == pytest.approx(100)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        pytest.param([5, 8], (200, 13), id="two batches that speak for a change"),
        pytest.param([-50, 5, 8], (200, 13), id="what came before the change is no evidence"),
        pytest.param([5, -50, 5, 8], (200, 13), id="nor is a suspicion that did not hold"),
        pytest.param([13, -1, 2], (200, 12), id="the sum still stands when there is enough evidence"),
        pytest.param([13, -2, 1], (300, 12), id="a sum that fell back has to rise again"),
        pytest.param([13, -14, 0], None, id="a suspicion that is taken back is no shift"),
        pytest.param([11, 0, 0], None, id="a sum under the threshold"),
        pytest.param([0, 0, 0], None, id="nothing at all"),
    ],
)
def test_sums(batches: list[float], expected: tuple[int, float] | None) -> None:
    detection = ShiftDetection(SETTINGS)
    list(feed(detection, SETTINGS.warm_up_impressions, constant(0.0)))
    found = [shift for total in batches for _, shift in feed(detection, BATCH, constant(total / BATCH))]
    if expected is None:
        assert found == []
    else:
        assert found[0].n_impressions == expected[0]
        assert found[0].statistic == pytest.approx(expected[1])


# --- Labels that are taken back


def corrections(old: npt.ArrayLike, new: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Scores and weights of labels that are taken back and of those given in their place."""
    scores = np.concatenate([np.atleast_1d(old), np.atleast_1d(new)]).astype(np.float64)
    return scores, np.repeat(np.array([-1, 1], np.float32), len(scores) // 2)


@pytest.mark.parametrize(
    ("value", "old", "new", "expected"),
    [
        pytest.param(5.0, [0.5], [-1.0], (3.5, 100), id="a click that speaks against a change"),
        pytest.param(5.0, [-1.0], [0.5], (6.5, 100), id="one that speaks for it"),
        pytest.param(5.0, [0.2, -0.1], [-0.3, 0.4], (5.0, 100), id="two that cancel"),
        pytest.param(5.0, [1.0, 1.0], [-1.0, -2.0], (0.0, 0), id="a sum that was wrong starts anew"),
        pytest.param(5.0, [1.0, 1.0], [-1.0, -8.0], (0.0, 0), id="and never falls below zero"),
    ],
)
def test_a_label_taken_back_adds_the_difference_and_no_score(
    value: float, old: list[float], new: list[float], expected: tuple[float, int]
) -> None:
    total = Sum(value, 100)
    total.add(*corrections(old, new))
    assert total.value == pytest.approx(expected[0])
    assert total.n_scores == expected[1]


def test_a_sum_of_a_batch_with_corrections_is_that_of_the_labels_that_hold() -> None:
    rng = np.random.default_rng(0)
    scores, wrong = rng.uniform(0.1, 0.5, 50), rng.uniform(-0.2, 0.5, 20)
    at_once, corrected = Sum(), Sum()
    at_once.add(scores, np.ones(50, np.float32))
    corrected.add(np.concatenate([wrong, scores[20:]]), np.ones(50, np.float32))
    assert corrected.value != pytest.approx(at_once.value)
    corrected.add(*corrections(wrong, scores[:20]))
    assert corrected.value == pytest.approx(at_once.value)
    assert corrected.n_scores == at_once.n_scores == 50


def test_corrections_bring_the_alarm_but_neither_warm_up_nor_evidence() -> None:
    detection = ShiftDetection(SETTINGS)
    pairs = Observed("p", None, *corrections([-0.1] * 40, [0.1] * 40), {})
    for _ in range(20):  # no label is new: the warm-up is not over, however many are corrected
        assert detection.observe_many([pairs]) == []
    assert detection._detectors["p"].n_seen == 0
    list(feed(detection, SETTINGS.warm_up_impressions, constant(0.0)))
    assert list(feed(detection, 200, constant(0.05))) == []  # 10 nats of the 12
    (shift,) = detection.observe_many([pairs])
    assert shift.statistic == pytest.approx(18)
    assert shift.n_impressions == 200
    assert shift.cells == {key: (2 * n, 2 * x) for key, (n, x) in CELLS.items()}


def test_corrections_take_a_suspicion_of_a_category_back() -> None:
    alarms = {}
    for taken_back in (False, True):
        detection = ShiftDetection(SETTINGS)
        everybody = dict.fromkeys(PRODUCTS, constant(0.0))
        list(feed_category(detection, 600, everybody))
        # 20 of each of five products: 2 nats a batch, of 8.6.
        assert list(feed_category(detection, 80, dict.fromkeys(PRODUCTS, constant(0.02)))) == []
        if taken_back:
            pairs = corrections([0.02] * 30, [-0.02] * 30)
            assert detection.observe_many([Observed(product, "lamps", *pairs, {}) for product in PRODUCTS]) == []
        alarms[taken_back] = [at for at, _ in feed_category(detection, 200, dict.fromkeys(PRODUCTS, constant(0.02)))]
    assert alarms[False][0] == 20
    assert alarms[True][0] == 80  # 6 nats later


PRODUCTS = [f"p{number}" for number in range(5)]


def feed_category(
    detection: ShiftDetection, n: int, scores: dict[str, Draw], category: str | None = "lamps"
) -> Iterator[tuple[int, Shift]]:
    """Feed n impressions of every product, 20 of each in a batch; yield shifts with the impressions of a product."""
    for end in range(20, n + 1, 20):
        observed = [given(product, category, draw(20), CELLS) for product, draw in scores.items()]
        for shift in detection.observe_many(observed):
            yield end, shift


@pytest.mark.parametrize("sign", [-1.0, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_products_of_a_category_are_found_together_and_sooner_than_one_by_one(seed: int, sign: float) -> None:
    found = {}
    for category in ("lamps", None):
        detection = ShiftDetection(SETTINGS)
        before = {product: taste_scores(10 * seed + place, 1) for place, product in enumerate(PRODUCTS)}
        after = {product: taste_scores(100 + 10 * seed + place, sign) for place, product in enumerate(PRODUCTS)}
        assert list(feed_category(detection, 3_000, before, category)) == []
        found[category] = list(feed_category(detection, 6_000, after, category))
    first, shift = found["lamps"][0]
    together = [shift.product_id for at, shift in found["lamps"] if at == first]
    assert shift.scope == "category"
    assert len(together) >= 4
    assert shift.statistic >= SETTINGS.threshold("category")
    assert all(shift.scope == "product" for _, shift in found[None])
    # The median of the products' own alarms.
    assert first < sorted(at for at, _ in found[None])[2]


def test_a_category_keeps_out_the_product_whose_tastes_stay() -> None:
    detection = ShiftDetection(SETTINGS)
    list(feed_category(detection, 3_000, {product: taste_scores(place, 1) for place, product in enumerate(PRODUCTS)}))
    after = {product: taste_scores(50 + place, -1) for place, product in enumerate(PRODUCTS)}
    after["p2"] = constant(-0.05)
    assert {shift.product_id for _, shift in feed_category(detection, 1_500, after)} == {"p0", "p1", "p3", "p4"}


OF_EXACT_TASTES: dict[ShiftScope, float] = {"category": 2_200.0, "product": 5_300.0}
"""False alarms in a million impressions at a threshold of 0, where tastes are known exactly.

Learnt tastes are cautious, so that the sums of categories rise a third as often.
"""


@pytest.mark.parametrize("per_million", [2, 5])
def test_false_alarms_of_exact_tastes_are_as_frequent_as_is_known(per_million: float) -> None:
    settings = ShiftSettings(false_alarms_per_million=per_million)
    expected = 2.5 * sum(scale * math.exp(-settings.threshold(scope)) for scope, scale in OF_EXACT_TASTES.items())
    alarms = 0
    for seed in range(10):  # 250,000 impressions each
        detection = ShiftDetection(settings)
        scores = {product: taste_scores(10 * seed + place, 1) for place, product in enumerate(PRODUCTS)}
        alarms += len({at for at, _ in feed_category(detection, 50_000, scores)})
    # Half of them would do no harm, but mean that changes are found later than they could be.
    assert abs(alarms - expected) <= 3 * math.sqrt(expected)


def test_a_product_that_moves_to_another_category_starts_anew_there() -> None:
    detection = ShiftDetection(SETTINGS)
    list(feed_category(detection, 2_000, {"p": constant(0.005)}, "lamps"))
    found = list(feed_category(detection, 2_000, {"p": constant(0.1)}, "chairs"))
    assert found[0][0] > SETTINGS.warm_up_impressions
    assert found[0][1].n_impressions <= found[0][0]


def test_a_detector_that_is_restarted_starts_with_its_warm_up() -> None:
    detection, changes = ShiftDetection(SETTINGS), ChangeSet()
    list(feed(detection, 3_000, taste_scores(0, 1)))
    detection.write(changes)
    assert changes.get(Table.DETECTORS, b"product\0p") is not None
    detection.restart("p")
    detection.restart("never seen")
    detection.write(changes)
    assert [(key, value) for key, value in changes.of(Table.DETECTORS)] == [(b"product\0p", None)]
    assert list(feed(detection, SETTINGS.warm_up_impressions, constant(1.0))) == []


def test_a_detector_goes_on_from_the_state(tmp_path: Path) -> None:
    undisturbed = ShiftDetection(SETTINGS)
    before, after = taste_scores(0, 1), taste_scores(2, -1)
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        restarted = ShiftDetection(SETTINGS)
        outcomes: list[list[list[Shift]]] = [[], []]
        for n_batch in range(80):
            scores = (before if n_batch < 60 else after)(BATCH)
            changes = ChangeSet()
            observed = [given("p", "lamps", scores, CELLS), given("q", "lamps", scores / 2, CELLS)]
            for detection in (undisturbed, restarted):
                own = own_of(detection, [n_batch % 3], [scores[0]], category="lamps")
            assert own == own_of(undisturbed, [n_batch % 3], [scores[0]], 0, "lamps")
            outcomes[0].append(undisturbed.observe_many(observed))
            outcomes[1].append(restarted.observe_many(observed))
            restarted.write(changes)
            store.commit(changes)
            restarted = ShiftDetection(SETTINGS)
            with store.read() as txn:
                restarted.restore(txn)
                for product_id in "pq":
                    restarted.bring_in(product_id, txn)
    assert outcomes[0] == outcomes[1]
    assert [shift.product_id for shifts in outcomes[0] for shift in shifts] == ["p", "q"]


def test_a_parked_product_is_not_named_with_its_category_and_returns_with_its_evidence(tmp_path: Path) -> None:
    detection, before, after = ShiftDetection(SETTINGS), taste_scores(0, 1), taste_scores(2, -1)

    def observe(product_ids: str, scores: np.ndarray) -> list[str]:
        observed = [given(product_id, "lamps", scores, CELLS) for product_id in product_ids]
        return [shift.product_id for shift in detection.observe_many(observed)]

    for _ in range(20):
        assert observe("pq", before(BATCH)) == []
    while not detection._detectors["q"].sum.n_scores:
        assert observe("pq", after(BATCH)) == []
    changes, evidence = ChangeSet(), detection._detectors["q"].evidence
    detection.write(changes)
    detection.park("q")
    found: list[str] = []
    while not found:
        found = observe("p", after(BATCH))
    assert found == ["p"]
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        with store.read() as txn:
            detection.bring_in("q", txn)
    assert detection._detectors["q"].evidence == evidence != {}


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.4])
def test_a_score_is_how_much_better_no_preference_explains_the_click(slope: float) -> None:
    preference = np.array([0.7, 0.7, -0.7, -0.7])
    base = -1.0
    p = logistic(base + preference)
    learnt = logistic(base + slope * preference)
    indifferent = logistic(np.full(4, base))
    clicks = np.array([1, 0, 1, 0], np.float32)
    scores = indifference_scores(clicks, p.astype(np.float32), preference, slope)
    expected = np.where(clicks > 0, np.log(indifferent / learnt), np.log((1 - indifferent) / (1 - learnt)))
    assert scores == pytest.approx(expected, abs=1e-5)
    assert (np.sign(scores) == [-1, 1, 1, -1]).all()


def own_of(
    detection: ShiftDetection,
    creatives: list[int],
    preference: list[float],
    weight: float = 1,
    category: str | None = None,
) -> np.ndarray:
    return detection.own_preferences(
        "p",
        category,
        np.array(creatives),
        np.array(preference, np.float32),
        np.full(len(creatives), weight, np.float32),
    )


def test_what_all_users_have_in_common_is_no_taste_of_groups() -> None:
    assert own_of(ShiftDetection(SETTINGS), [0, 0, 1, 1], [0.9, 0.9, -0.4, -0.4]) == pytest.approx(
        np.zeros(4), abs=1e-6
    )


@pytest.mark.parametrize("batch", [1, 3, 50, 600])
def test_what_is_a_users_own_does_not_hang_on_how_many_are_seen_at_once(batch: int) -> None:
    rng, detection = np.random.default_rng(0), ShiftDetection(SETTINGS)
    creatives, own = rng.integers(3, size=1_800), rng.choice([-0.5, 0.5], size=1_800)
    preference = np.array([0.3, -0.2, 0.0])[creatives] + own
    found = np.concatenate(
        [
            own_of(detection, creatives[start : start + batch].tolist(), preference[start : start + batch].tolist())
            for start in range(0, len(own), batch)
        ]
    )
    assert np.abs(found - own)[600:].max() < 0.15


def test_what_users_have_in_common_follows_the_model() -> None:
    detection = ShiftDetection(SETTINGS)
    own_of(detection, [0] * 10_000, [0.8] * 10_000)
    for _ in range(8):
        own_of(detection, [0] * 100, [-0.2] * 100)
    assert own_of(detection, [0], [-0.2]) == pytest.approx(0.0, abs=0.1)


def test_a_label_that_is_taken_back_and_given_anew_changes_nothing_that_users_have_in_common() -> None:
    detection = ShiftDetection(SETTINGS)
    own_of(detection, [0, 0], [0.5, 0.1])
    for weight in (-1, 1):
        own_of(detection, [0], [0.5], weight)
    assert detection._detectors["p"].common[0].mean == pytest.approx(0.3)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_scores_are_finite_for_predictions_that_are_sure(n: int, p: float) -> None:
    for click in (0.0, 1.0):
        own = own_of(ShiftDetection(SETTINGS), [0] * n, np.linspace(-30, 30, n).tolist())
        scores = indifference_scores(np.full(n, click, np.float32), np.full(n, p, np.float32), own, 2.0)
        assert np.isfinite(scores).all()
