"""Decisions: the arms, the groups, and a logged chance that is the true one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import chisquare

from serving.decisions import (
    Decision,
    DecisionRequest,
    DecisionService,
    UnservableProductError,
    impressions_of_the_shown,
)
from serving.policy import arm_of
from serving.settings import ServingSettings
from state.reading import StateReader, open_view
from state.records import ClusteringRecord, cell_key, creative_key, encode_cell, encode_record
from state.store import ChangeSet, Store, Table
from tests.serving.conftest import State

BEST = {"old": "a", "young": "d"}
OF_ARM = {arm: [f"v{n}" for n in range(2_000) if arm_of("groups", f"v{n}") == arm] for arm in ("group", "all")}


def ask(user_id: str, product_id: str = "split", age: str = "old", tier: str = "1") -> DecisionRequest:
    return DecisionRequest(user_id, product_id, {"age": age, "tier": tier})


def most_shown(decisions: list[Decision]) -> str:
    return Counter(decision.creative_id for decision in decisions).most_common(1)[0][0]


def test_the_state_is_what_these_tests_need(reader: StateReader) -> None:
    with reader.view() as view:
        split, same = view.groups("split"), view.groups("same")
        assert split is not None
        assert same is not None
        assert (split.distinct, same.distinct) == (True, False)
        assert len(split.groups) == len(same.groups) == 2
        assert view.groups("fresh") is None


def test_users_split_half_and_half_between_the_arms(service: DecisionService) -> None:
    decisions = service.decide_many([ask(f"u{n}") for n in range(4_000)])
    arms = Counter(decision.arm for decision in decisions)
    assert set(arms) == {"group", "all"}
    assert arms["group"] == pytest.approx(2_000, abs=160)
    assert {decision.experiment for decision in decisions} == {"groups"}
    assert [d.arm for d in decisions] == [arm_of("groups", f"u{n}") for n in range(4_000)]


def test_the_group_arm_shows_each_group_its_own_best(service: DecisionService) -> None:
    users = OF_ARM["group"]
    of_age = {age: service.decide_many([ask(user, age=age) for user in users]) for age in BEST}
    groups = {age: {decision.group_id for decision in decisions} for age, decisions in of_age.items()}
    assert all(len(found) == 1 for found in groups.values())
    assert groups["old"] != groups["young"]
    for age, decisions in of_age.items():
        assert most_shown(decisions) == BEST[age]
        share = np.mean([decision.creative_id == BEST[age] for decision in decisions])
        assert share > 0.75


def test_the_other_arm_shows_everybody_the_same(service: DecisionService) -> None:
    users = OF_ARM["all"]
    chances = {
        (decision.creative_id, decision.p_shown)
        for age in BEST
        for decision in service.decide_many([ask(user, age=age) for user in users])
    }
    assert len(chances) <= 4  # one chance for each creative, whoever asks
    groups = {service.decide_many([ask(users[0], age=age)])[0].group_id for age in BEST}
    assert len(groups) == 2  # the group is known all the same


def test_groups_that_do_not_differ_have_one_policy(service: DecisionService) -> None:
    decisions = service.decide_many([ask(f"u{n}", "same", age) for n in range(2_000) for age in BEST])
    assert len({(decision.creative_id, decision.p_shown) for decision in decisions}) <= 4
    assert most_shown(decisions) == "b"
    assert {decision.arm for decision in decisions} == {"group", "all"}


@pytest.mark.parametrize("product", ["fresh", "same"])
def test_a_product_that_warms_up_is_shown_uniformly_in_no_arm(
    state: Any, reader: StateReader, settings: ServingSettings, product: str
) -> None:
    service = DecisionService(
        reader, state.online, settings.model_copy(update={"warm_up_impressions": 10**6}), impressions_topic="t"
    )
    service.refresh()
    decisions = service.decide_many([ask(f"u{n}", product) for n in range(4_000)])
    assert {(d.p_shown, d.arm, d.experiment) for d in decisions} == {(0.25, None, None)}
    assert chisquare(list(Counter(d.creative_id for d in decisions).values())).pvalue > 1e-4
    # A product whose groups differ beyond chance does not wait.
    assert service.decide_many([ask("u1", "split")])[0].arm is not None


@pytest.mark.parametrize(
    ("n_impressions", "expected"),
    [
        ({}, 0),
        ({"a": 0}, 0),
        ({"a": 7}, 7),
        ({"a": 100, "b": 100, "c": 100}, 100),
        ({"a": 300, "b": 100}, 250),
        ({"a": 15_000, **{f"new{n}": 20 for n in range(50)}}, 14_064),  # new products do not cool a warm system
    ],
)
def test_a_system_has_had_what_the_product_of_an_average_impression_has(
    n_impressions: dict[str, int], expected: int
) -> None:
    assert impressions_of_the_shown(n_impressions) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("warm_up_impressions", "warm"), [(2_500, True), (2_501, False)])
def test_a_fresh_system_is_warm_when_its_products_are(
    state: Any, reader: StateReader, settings: ServingSettings, warm_up_impressions: int, warm: bool
) -> None:
    """Both have had 2,500 impressions; the groups of "same" do not differ."""
    service = DecisionService(
        reader,
        state.online,
        settings.model_copy(update={"warm_up_impressions": warm_up_impressions}),
        impressions_topic="t",
    )
    service.refresh()
    assert (service.decide_many([ask("u1", "same")])[0].arm is not None) == warm
    # Without groups there is no arm, however warm the system is.
    assert service.decide_many([ask("u1", "fresh")])[0].arm is None


@pytest.mark.parametrize(("warm_up_impressions", "warm"), [(3_400, True), (3_600, False)])
def test_a_product_does_not_wait_for_those_that_are_shown_less(
    state: Any, settings: ServingSettings, tmp_path: Path, warm_up_impressions: int, warm: bool
) -> None:
    """It has had 3,500 impressions, the product of an average one 3,083."""
    copytree(state.path, tmp_path, dirs_exist_ok=True)
    changes = ChangeSet()
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        with open_view(store) as view:
            counted = {name: sum(cell.n_impressions for cell in cells) for name, cells in view.cells_by_product()}
            assert counted == {"same": 2_500, "split": 2_500}
            cell = view.cells("same")[0]
        more = msgspec.structs.replace(cell, n_impressions=cell.n_impressions + 1_000)
        changes.put(Table.CELLS, cell_key("same", cell.group_id, cell.creative_id), encode_cell(more))
        store.commit(changes)
        service = DecisionService(
            StateReader.of(store),
            state.online,
            settings.model_copy(update={"warm_up_impressions": warm_up_impressions}),
            impressions_topic="t",
        )
        service.refresh()
        assert (service.decide_many([ask("u1", "same")])[0].arm is not None) == warm


@pytest.mark.parametrize(
    ("product", "age", "arm"),
    [("split", "old", "group"), ("split", "young", "group"), ("split", "old", "all"), ("same", "old", "all")],
)
def test_the_logged_chance_is_the_true_one(service: DecisionService, product: str, age: str, arm: str) -> None:
    n = 20_000
    user = OF_ARM[arm][0]
    decisions = service.decide_many([ask(user, product, age)] * n)
    shown = Counter(decision.creative_id for decision in decisions)
    p_shown = {decision.creative_id: decision.p_shown for decision in decisions}
    assert sum(p_shown.values()) == pytest.approx(1)  # every creative came up, with one chance each
    assert min(p_shown.values()) >= 0.1 / 4 - 1e-9
    creatives = sorted(p_shown)
    expected = [n * p_shown[creative] for creative in creatives]
    assert chisquare([shown[creative] for creative in creatives], expected).pvalue > 1e-4
    # A wrong logged chance would be noticed: one of two percent more or less is refused.
    tilted = np.array(expected) * np.linspace(0.9, 1.1, len(expected))
    assert chisquare([shown[creative] for creative in creatives], tilted * n / tilted.sum()).pvalue < 1e-3


def test_decisions_depend_on_the_seed_alone(state: Any, reader: StateReader, settings: ServingSettings) -> None:
    requests = [ask(f"u{n}", ("split", "same", "fresh")[n % 3]) for n in range(300)]
    outcomes = []
    for seed in (1, 1, 2):
        service = DecisionService(
            reader, state.online, settings.model_copy(update={"seed": seed}), impressions_topic="t"
        )
        service.refresh()
        outcomes.append(service.decide_many(requests))
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_a_batch_is_answered_in_its_order_and_whole(service: DecisionService) -> None:
    requests = [ask(f"u{n}", product) for n, product in enumerate(["split", "fresh", "same", "split"])]
    decisions = service.decide_many(requests)
    assert [decision.group_id is None for decision in decisions] == [False, True, False, False]
    assert service.decide_many([]) == []
    for product in ("bare", "unheard of", ""):
        with pytest.raises(UnservableProductError, match=f"product '{product}' is unknown or has no registered creat"):
            service.decide_many([*requests, ask("u", product)])


def test_users_without_attributes_are_served(service: DecisionService) -> None:
    decisions = service.decide_many(
        [DecisionRequest("u", "split"), DecisionRequest("u", "split", {"age": "unheard of", "shoe": "42"})]
    )
    assert all(decision.group_id is not None for decision in decisions)


def test_before_the_first_refresh_nothing_can_be_served(
    state: Any, reader: StateReader, settings: ServingSettings
) -> None:
    service = DecisionService(reader, state.online, settings, impressions_topic=state.streams.topics.impressions)
    assert (service.n_creatives(), service.n_impressions) == ({}, 0)
    with pytest.raises(UnservableProductError):
        service.decide_many([ask("u")])
    service.refresh()
    assert service.n_creatives() == {"split": 4, "same": 4, "fresh": 4}
    assert service.n_impressions == 5_000


def test_a_product_whose_encoder_version_is_gone_is_served_as_one_that_is_not_grouped(
    state: Any, settings: ServingSettings, tmp_path: Path
) -> None:
    """A product that was parked for long: `split` is, and `same` has moved on to a newer version."""
    copytree(state.path, tmp_path, dirs_exist_ok=True)
    users = [ask(user) for user in OF_ARM["group"][:200]] + [ask("u", product_id="same")]
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        service = DecisionService(
            StateReader.of(store), state.online, settings, impressions_topic=state.streams.topics.impressions
        )
        service.refresh()
        assert None not in {decision.group_id for decision in service.decide_many(users)}
        changes = ChangeSet()
        with store.read() as txn:
            record = msgspec.msgpack.decode(txn.get(Table.CLUSTERINGS, b"split") or b"", type=ClusteringRecord)
        gone = msgspec.structs.replace(record, encoder_version=1_000)
        changes.put(Table.CLUSTERINGS, b"split", encode_record(gone))
        store.commit(changes)
        service.refresh()
        *split, same = service.decide_many(users)
    assert {(decision.group_id, decision.arm) for decision in split} == {(None, None)}
    assert len({decision.p_shown for decision in split}) > 1  # as often as it is the best for all
    assert same.group_id is not None


def test_a_prior_moves_its_own_group_and_no_other(state: State, settings: ServingSettings, tmp_path: Path) -> None:
    users = OF_ARM["group"]

    def share_of_c(relative_ctr: float, n_impressions: float) -> dict[str, float]:
        path = tmp_path / f"{relative_ctr}-{n_impressions}"
        copytree(state.path, path)
        with Store(path, map_size_mib=32) as store:
            with open_view(store) as view:
                creatives = {creative.creative_id: creative for creative in view.creatives("split")}
            given = msgspec.structs.replace(
                creatives["c"],
                group_id=old_group,
                prior_relative_ctr=relative_ctr,
                prior_impressions=n_impressions,
            )
            changes = ChangeSet()
            changes.put(Table.CREATIVES, creative_key("split", "c"), encode_record(given))
            store.commit(changes)
        with StateReader(path) as reader:
            service = DecisionService(reader, state.online, settings, impressions_topic="osmf.impressions")
            service.refresh()
            decisions = {age: service.decide_many([ask(user, age=age) for user in users]) for age in BEST}
        return {
            age: float(np.mean([decision.creative_id == "c" for decision in of_age]))
            for age, of_age in decisions.items()
        }

    with StateReader(state.path) as reader:
        service = DecisionService(reader, state.online, settings, impressions_topic="osmf.impressions")
        service.refresh()
        old_group = service.decide_many([ask(users[0])])[0].group_id
    without, with_prior = share_of_c(1.0, 0.0), share_of_c(20.0, 50_000.0)
    assert with_prior["old"] > 0.7 > 0.2 > without["old"]
    assert with_prior["young"] == pytest.approx(without["young"], abs=0.1)
