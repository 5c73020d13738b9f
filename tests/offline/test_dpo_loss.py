from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.dpo_loss import GroupRobustWeights, dpo_losses

MATHS = st.floats(-50, 50, allow_nan=False)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("policy", "reference", "beta", "sft_weight", "expected"),
    [
        ((-4.0, -6.0), (-4.0, -6.0), 0.1, 0.0, math.log(2)),
        ((-3.0, -7.0), (-4.0, -6.0), 0.1, 0.0, -math.log(sigmoid(0.2))),
        ((-5.0, -5.0), (-4.0, -6.0), 0.5, 0.0, -math.log(sigmoid(-1.0))),
        ((-3.0, -7.0), (-4.0, -6.0), 0.1, 2.0, -math.log(sigmoid(0.2)) + 2 * 3.0 / 5),
    ],
)
def test_the_loss_is_eq_9(
    policy: tuple[float, float], reference: tuple[float, float], beta: float, sft_weight: float, expected: float
) -> None:
    found = dpo_losses(
        torch.tensor(policy), torch.tensor(reference), torch.tensor([5]), beta=beta, sft_weight=sft_weight
    )
    assert found.losses.item() == pytest.approx(expected)
    assert found.chosen_rewards.item() == pytest.approx(beta * (policy[0] - reference[0]))
    assert found.rejected_rewards.item() == pytest.approx(beta * (policy[1] - reference[1]))


@given(st.lists(st.tuples(MATHS, MATHS, MATHS, MATHS), min_size=2, max_size=6), st.integers(1, 5))
def test_a_tuples_loss_is_its_own_whatever_else_is_in_the_batch(
    rows: list[tuple[float, float, float, float]], first: int
) -> None:
    def losses(part: list[tuple[float, float, float, float]]) -> list[float]:
        columns = torch.tensor(part, dtype=torch.float64).T  # (4, n)
        found = dpo_losses(
            columns[:2].reshape(-1), columns[2:].reshape(-1), torch.full((len(part),), 7), beta=0.3, sft_weight=0.2
        )
        return found.losses.tolist()

    first = min(first, len(rows) - 1)
    assert losses(rows) == pytest.approx(losses(rows[:first]) + losses(rows[first:]))


def test_gradients_raise_winners_and_lower_losers() -> None:
    log_probs = torch.tensor([-3.0, -4.0, -5.0, -6.0], requires_grad=True)
    dpo_losses(log_probs, log_probs.detach(), torch.tensor([3, 3]), beta=0.1).losses.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([-0.05, -0.05, 0.05, 0.05]))


def test_worse_off_groups_grow_and_weights_average_one() -> None:
    weights = GroupRobustWeights([6, 3, 1], step=0.5)
    torch.testing.assert_close(weights.group_weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    groups = torch.tensor([0] * 6 + [1] * 3 + [2])
    losses = torch.tensor([0.1] * 6 + [0.9] * 3 + [0.4])
    weights.learn(torch.zeros(3).index_add_(0, groups, losses), n_rows=10)
    # A whole pass: each group climbs by its mean loss, not by how many tuples it has.
    climbed = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64).mul(0.5).exp()
    torch.testing.assert_close(weights.group_weights, climbed / climbed.sum(), rtol=1e-6, atol=0)
    assert weights.tuple_weights(groups).mean().item() == pytest.approx(1)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=5), st.floats(0, 10))
def test_weights_stay_a_distribution(losses: list[float], step: float) -> None:
    weights = GroupRobustWeights([1] * len(losses), step=step)
    for _ in range(3):
        weights.learn(torch.tensor(losses, dtype=torch.float64), n_rows=len(losses))
    found = weights.group_weights
    assert found.sum().item() == pytest.approx(1)
    assert bool(torch.isfinite(found).all())
    for loss, weight in zip(losses, found.tolist(), strict=True):
        assert all(weight >= other - 1e-9 for less, other in zip(losses, found.tolist(), strict=True) if less <= loss)


def test_one_group_alone_counts_as_in_the_papers_loss() -> None:
    weights = GroupRobustWeights([5], step=3.0)
    weights.learn(torch.tensor([2.0]), n_rows=5)
    torch.testing.assert_close(weights.tuple_weights(torch.tensor([0, 0])), torch.ones(2))
