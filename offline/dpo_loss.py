"""The loss of Group-DPO (Eq. 9), tuple by tuple, and the weights of the worse-off groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DpoLosses:
    """What Eq. 9 says of n tuples: the loss and both implicit rewards of each, all (n,).

    A reward is ``beta * log(pi / pi_ref)`` of an answer; it has no gradient.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_losses(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    n_chosen_tokens: Tensor,
    *,
    beta: float,
    sft_weight: float = 0.0,
) -> DpoLosses:
    """Return the losses of Eq. 9, and a share of the winners' negative log-likelihood.

    Parameters
    ----------
    log_probs, ref_log_probs
        Log-probability of each whole answer under policy and reference, (2n,): the n winners, then the n losers.
    n_chosen_tokens
        Tokens of each winner, (n,).
    beta
        How strongly the reference holds.
    sft_weight
        Weight of the winner's negative log-likelihood per token. A tuple's loss depends on that tuple alone, so
        that splitting a batch over processes changes nothing.
    """
    chosen, rejected = (log_probs - ref_log_probs).chunk(2)  # (n,) each
    losses = -torch.nn.functional.logsigmoid(beta * (chosen - rejected))
    if sft_weight > 0:
        losses = losses - sft_weight * log_probs.chunk(2)[0] / n_chosen_tokens
    return DpoLosses(losses, beta * chosen.detach(), beta * rejected.detach())


class GroupRobustWeights:
    """Weights of groups that grow with their losses: group-robust DPO (Ramesh et al. 2024, the paper's reference 32).

    What is minimised is the sum over groups of q_g L_g, L_g the mean loss of a group's tuples, while q climbs
    by exponentiated gradient towards the groups with the largest L_g. Tuples come by chance, so a tuple of a group with
    N_g of the N tuples carries q_g N / N_g.

    Parameters
    ----------
    n_tuples
        N_g: how many tuples each group has.
    step
        Step of the exponentiated gradient; with 0 all groups count alike, however many tuples they have.
    """

    def __init__(self, n_tuples: Sequence[int], step: float) -> None:
        self.n_tuples = list(n_tuples)
        self.step = step
        self.log_weights = [0.0] * len(self.n_tuples)
        """log q, but for a constant."""

    def learn(self, loss_sums: Tensor, n_rows: int) -> None:
        """Let the weights climb.

        Parameters
        ----------
        loss_sums
            Sum of the losses of each group's tuples in a batch, over all processes, (G,).
        n_rows
            Tuples of the batch, over all processes.
        """
        shares = torch.tensor(self.n_tuples, dtype=torch.float64) / sum(self.n_tuples)
        # An unbiased estimate of L_g: a batch holds N_g / N of a group's tuples.
        gains = self.step * loss_sums.detach().double().cpu() / n_rows / shares
        climbed = torch.tensor(self.log_weights, dtype=torch.float64) + gains
        self.log_weights = (climbed - climbed.max()).tolist()

    @property
    def group_weights(self) -> Tensor:
        """q, (G,), which sums to 1."""
        return torch.softmax(torch.tensor(self.log_weights, dtype=torch.float64), 0)

    def tuple_weights(self, groups: Tensor) -> Tensor:
        """Return what tuples count, by the number of each one's group, (n,); over all tuples the mean is 1."""
        shares = torch.tensor(self.n_tuples, dtype=torch.float64) / sum(self.n_tuples)
        weights: Tensor = (self.group_weights / shares)[groups.cpu()].to(groups.device, torch.float32)
        return weights
