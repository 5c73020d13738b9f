"""Averaging: the moving average of the weights, from which predictions and embeddings come.

A long average does much better than the weights themselves, but it would hold on to tastes that have changed. So the
weights that belong to one attribute alone, its embeddings and the columns that read them, are averaged since that
attribute last started to be learnt anew; everything else goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AVERAGED_SHARE = 1 / 4
"""Share of the steps so far over which weights are averaged, until that is ``ema_steps``."""


class WeightAverage:
    """The rates of a moving average of a model's weights.

    Parameters
    ----------
    field_of_parameter
        The attribute to which each weight belongs, (W,) int64; the number of attributes N for what is shared.
    n_fields
        Number of attributes, N.
    ema_steps
        Steps over which weights are averaged at most.
    """

    def __init__(self, field_of_parameter: Tensor, n_fields: int, ema_steps: int) -> None:
        self._field_of_parameter = field_of_parameter
        self._ema_steps = ema_steps
        self.since = [0] * (n_fields + 1)
        """Steps after which the average of each attribute's weights started, and of what is shared."""

    def restart(self, fields: Iterable[int], n_steps: int) -> None:
        """Average the weights of some attributes from step ``n_steps`` on."""
        for field in fields:
            self.since[field] = n_steps

    def add(self, average: Tensor, weights: Tensor, n_steps: int) -> None:
        """Add the weights after ``n_steps`` steps to the average, both (W,), in place."""
        ages = torch.tensor([n_steps - since for since in self.since])
        # A span that grows with the steps: a fixed one would hold the first steps' weights for long.
        rates = 1 / (1 + AVERAGED_SHARE * ages).clamp(max=self._ema_steps)  # (N + 1,)
        if bool((rates == rates[-1]).all()):
            average.lerp_(weights, float(rates[-1]))
        else:
            average.lerp_(weights, rates[self._field_of_parameter])
