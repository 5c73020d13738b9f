"""The batch reference of Algorithm 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from offline.reference import GroupingInputError, agreement, batch_groups

ROOT = Path(__file__).resolve().parents[2]


def blobs(rng, k, n, spread, width=128):
    centres = rng.normal(size=(k, width))
    labels = rng.integers(0, k, n)
    return (centres[labels] + spread * rng.normal(size=(n, width))).astype(np.float32), labels


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_separate_groups_are_found_with_their_number(k):
    points, truth = blobs(np.random.default_rng(k), k, 600, 0.3)
    found = batch_groups(points, k_min=2, k_max=5, seed=1)
    assert found.k == k
    assert agreement(found.labels, truth) == 1.0
    assert sorted(found.silhouettes) == [2, 3, 4, 5]
    assert found.silhouettes[k] == max(found.silhouettes.values())


def test_silhouettes_agree_with_another_k_means():
    points, _ = blobs(np.random.default_rng(1), 3, 500, 0.8, width=8)
    found = batch_groups(points, seed=0, n_restarts=8)
    for k, silhouette in found.silhouettes.items():
        other = KMeans(k, n_init=8, random_state=0).fit_predict(points)
        assert silhouette == pytest.approx(silhouette_score(points, other), abs=0.01)


def test_a_sample_of_the_silhouette_is_enough():
    points, truth = blobs(np.random.default_rng(2), 3, 3_000, 0.5)
    found = batch_groups(points, max_silhouette_rows=200)
    assert found.k == 3
    assert found.labels.shape == (3_000,)
    assert agreement(found.labels, truth) == 1.0


def test_same_seed_same_groups():
    points, _ = blobs(np.random.default_rng(3), 4, 400, 1.5)
    one, other = batch_groups(points, seed=5), batch_groups(points, seed=5)
    assert np.array_equal(one.labels, other.labels)
    assert one.silhouettes == other.silhouettes


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_few_users(n):
    found = batch_groups(np.eye(n, 16, dtype=np.float32))
    assert found.labels.shape == (n,)
    assert 1 <= found.k < n
    assert set(found.labels.tolist()) == set(range(found.k))


def test_users_who_are_alike_are_one_group():
    found = batch_groups(np.ones((50, 8), np.float32))
    assert (found.k, found.silhouettes) == (1, {})
    assert not found.labels.any()


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (np.zeros(5), {}, "shape"),
        (np.zeros((1, 5)), {}, "n at least 2"),
        (np.full((5, 2), np.nan), {}, "not finite"),
        (np.zeros((5, 2)), {"k_min": 1}, "2 <= k_min"),
        (np.zeros((5, 2)), {"k_min": 4, "k_max": 3}, "k_max 3"),
    ],
)
def test_impossible_input_is_refused(embeddings, options, message):
    with pytest.raises(GroupingInputError, match=message):
        batch_groups(embeddings, **options)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([0, 0, 1, 2], [0, 0, 1, 1], 4 / 7),
    ],
)
def test_agreement(one, other, expected):
    assert agreement(one, other) == pytest.approx(expected)


def test_agreement_refuses_other_lengths():
    with pytest.raises(GroupingInputError, match="labels have shapes"):
        agreement([0, 1], [0, 1, 1])


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_faiss_and_torch_live_in_one_process(first):
    program = (
        f"import {first}; import torch; import numpy as np; from offline.reference import batch_groups;"
        "x = np.random.default_rng(0).normal(size=(300, 128));"
        "y = torch.randn(200, 200) @ torch.randn(200, 200);"
        "print(len(batch_groups(x).labels)); y = torch.randn(200, 200) @ y; print(y.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["300", "True"]
