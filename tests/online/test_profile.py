"""Profiles: the traits that set a group apart, and none that are there by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.limits import N_TRAITS
from online.profile import group_profile
from online.settings import AttributeSettings
from state.records import ProfileTrait

SCHEMA = AttributeSchema(
    AttributeSettings(values={"gender": ("female", "male"), "tier": ("1", "2", "3", "4")}, buckets={"city": 9})
)


def users(n: int, seed: int, **shares: list[float]) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    columns = []
    for name, n_values in (("gender", 2), ("tier", 4), ("city", 9)):
        p = shares.get(name, [1 / n_values] * n_values)
        columns.append(2 + rng.choice(n_values, size=n, p=p))
    return np.asarray(np.stack(columns, axis=1), np.uint8)


def test_a_trait_has_its_share_and_lift() -> None:
    everyone = np.array([[2, 2, 2]] * 100 + [[3, 2, 2]] * 300, np.uint8)
    members = np.array([[2, 2, 2]] * 90 + [[3, 2, 2]] * 10, np.uint8)
    assert group_profile(members, everyone, SCHEMA) == [ProfileTrait("gender", "female", 0.9, 0.9 / 0.25)]


def test_the_strongest_trait_comes_first_and_hashed_attributes_have_none() -> None:
    everyone = users(4_000, 0)
    members = users(400, 1, gender=[0.6, 0.4], tier=[0.7, 0.1, 0.1, 0.1], city=[0.92] + [0.01] * 8)
    found = [(trait.attribute, trait.value) for trait in group_profile(members, everyone, SCHEMA)]
    assert found == [("tier", "1"), ("gender", "female")]


def test_a_random_part_of_the_users_has_hardly_a_trait() -> None:
    everyone = users(5_000, 0)
    n_traits = [len(group_profile(users(300, seed), everyone, SCHEMA)) for seed in range(1, 41)]
    # Six words at two standard errors, one-sided: 0.14 a group are expected by chance.
    assert sum(n_traits) / 40 < 0.5


def test_missing_and_unknown_values_are_no_traits() -> None:
    everyone = users(500, 0)
    members = everyone[:100].copy()
    members[:, 0] = 0
    members[:, 1] = 1
    assert group_profile(members, everyone, SCHEMA) == []


def test_rare_values_and_long_lists_are_left_out() -> None:
    schema = AttributeSchema(AttributeSettings(values={f"a{n}": ("x", "y") for n in range(8)}))
    everyone = np.full((1_000, 8), 3, np.uint8)
    everyone[:100] = 2
    members = np.full((100, 8), 2, np.uint8)
    assert len(group_profile(members, everyone, schema)) == N_TRAITS
    one = AttributeSchema(AttributeSettings(values={"a": ("x", "y", "z")}))
    half = np.array([[2], [3]] * 500, np.uint8)
    few, enough = (np.array([[4]] * n + [[2], [3]] * ((100 - n) // 2), np.uint8) for n in (4, 6))
    assert group_profile(few, half, one) == []
    everyone = np.concatenate([half, np.full((4, 1), 4, np.uint8)])
    assert group_profile(few, everyone, one) == []  # rare in the group, whatever its lift
    assert [trait.value for trait in group_profile(enough, everyone, one)] == ["z"]


def test_nobody_has_no_profile() -> None:
    assert group_profile(np.zeros((0, 3), np.uint8), users(10, 0), SCHEMA) == []
