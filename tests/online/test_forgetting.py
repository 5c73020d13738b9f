"""Forgetting: users leave reservoirs and features, and whoever else is there stays as he was."""

from __future__ import annotations

import numpy as np
import pytest

from online.clustering import Clustering, group_feature
from online.forgetting import ForgottenUsers, forget_users, without_former_points
from state.records import GroupRecord

KS = (2, 3)


def clustering(n_lent: int = 0) -> Clustering:
    """Return a reservoir of ten users, 0 to 9 by key, with their number and its parity as codes."""
    n = 10
    made = Clustering(
        KS, np.array([[user, user % 2] for user in range(n)], np.uint8), np.arange(100, 100 + n, dtype=np.uint32)
    )
    made.user_keys[:n_lent] = 0
    made.n_lent, made.n_seen = n_lent, 50
    for k in KS:
        made.centroids[k], made.masses[k] = np.zeros((k, 4), np.float32), np.ones(k, np.float32)
        made.labels[k] = np.arange(n, dtype=np.uint8) % k
    return made


def users(*keys: int, codes: list[tuple[int, int]] | None = None) -> ForgottenUsers:
    return ForgottenUsers(np.array(keys, np.uint32), [bytes(code) for code in codes or []])


def test_a_user_goes_with_codes_key_and_labels() -> None:
    sample = clustering()
    assert forget_users(sample, users(103, 107, 999)) == {103, 107}
    kept = [user for user in range(10) if user not in (3, 7)]
    assert sample.user_keys.tolist() == [100 + user for user in kept]
    assert sample.attributes[:, 0].tolist() == kept
    assert {k: labels.tolist() for k, labels in sample.labels.items()} == {k: [user % k for user in kept] for k in KS}
    assert (sample.n_users, sample.n_seen, sample.n_lent) == (8, 50, 0)


def test_whoever_is_not_there_changes_nothing() -> None:
    sample = clustering()
    assert forget_users(sample, users(3, codes=[(3, 1)])) == set()  # not lent: the key decides
    assert sample.n_users == 10


def test_one_lent_user_of_equal_attributes_goes_for_each_vector() -> None:
    sample = clustering(n_lent=4)
    sample.attributes[:4] = [[7, 1], [7, 1], [2, 0], [1, 1]]
    # The lent ones have the key 0, which a user may have as well.
    assert forget_users(sample, users(0, 105, codes=[(7, 1), (2, 0), (9, 9)])) == {105}
    assert sample.n_lent == 2
    assert sample.attributes[:, 0].tolist() == [7, 1, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("key", "codes", "there"), [(105, [], True), (0, [], False), (5, [(1, 1)], True), (5, [(5, 1)], False)]
)
def test_whether_users_are_in_a_reservoir(key: int, codes: list[tuple[int, int]], there: bool) -> None:
    sample = clustering(n_lent=2)
    assert users(key, codes=codes).are_in(sample) is there


def test_an_encoded_reservoir_is_searched_by_its_bytes() -> None:
    record = b"...".join([clustering().attributes.tobytes(), clustering().user_keys.tobytes()])
    assert users(104).may_be_in(record)
    assert users(7, codes=[(3, 1)]).may_be_in(record)
    assert not users(7_000, codes=[(3, 3)]).may_be_in(record)


def test_features_are_made_of_who_is_left() -> None:
    rng = np.random.default_rng(0)
    embedded, labels = rng.normal(size=(30, 4)).astype(np.float32), np.arange(30, dtype=np.uint8) % 2
    centroids = np.stack([embedded[labels == cluster].mean(axis=0) for cluster in range(2)])
    groups = [
        GroupRecord(
            cluster + 5, 0.5, 15, group_feature(embedded[labels == cluster], centroids[cluster]).tobytes(), [], 0
        )
        for cluster in range(2)
    ]
    points = np.frombuffer(groups[0].feature, np.float32).reshape(-1, 4)
    one_of_them = int(np.flatnonzero((embedded == points[1]).all(axis=1))[0])
    left = np.arange(30) != one_of_them
    found = without_former_points(groups, embedded[left], labels[left])
    features = [np.frombuffer(group.feature, np.float32).reshape(-1, 4) for group in found]
    assert not (features[0] == embedded[one_of_them]).all(axis=1).any()
    assert (features[0][0] == centroids[0]).all()
    assert found[1] == groups[1]
    # A group of which nobody is left is its centroid.
    (alone, _) = without_former_points(groups, embedded[labels == 1], labels[labels == 1])
    assert (np.frombuffer(alone.feature, np.float32).reshape(-1, 4) == centroids[0]).all()
