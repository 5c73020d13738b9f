"""Baselines: what the preference model has to beat on the same impressions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from online.rows import LabelledRows, Rows

Floats = npt.NDArray[np.float64]

FM_FACTORS = 16
FM_BATCH_ROWS = 512


def creative_ctrs(learnt: LabelledRows, asked: Rows) -> Floats:
    """Return the CTR of each row's creative in ``learnt``, smoothed by one click in twenty, (B,)."""
    n_creatives = 1 + int(max(learnt.rows.creatives.max(), asked.creatives.max()))
    impressions = np.bincount(learnt.rows.creatives, minlength=n_creatives)
    clicks = np.bincount(learnt.rows.creatives, weights=learnt.clicks, minlength=n_creatives)
    ctrs: Floats = (clicks + 1) / (impressions + 20)
    return ctrs[asked.creatives]


def logistic(learnt: LabelledRows, asked: Rows) -> Floats:
    """Return the predictions of River's logistic regression on creatives and their crosses with attributes, (B,).

    It sees every row once, in order.
    """
    from river import linear_model, optim

    model = linear_model.LogisticRegression(optim.AdaGrad(0.05), l2=1e-6)
    for creative, codes, click in zip(
        learnt.rows.creatives.tolist(), learnt.rows.attributes.tolist(), learnt.clicks.tolist(), strict=True
    ):
        model.learn_one(_crosses(creative, codes), click > 0)
    rows = zip(asked.creatives.tolist(), asked.attributes.tolist(), strict=True)
    return np.array([model.predict_proba_one(_crosses(*row)).get(True, 0.0) for row in rows])  # type: ignore[no-untyped-call]


def _crosses(creative: int, codes: list[int]) -> dict[str, float]:
    return {str(creative): 1.0} | {f"{creative}|{field}={code}": 1.0 for field, code in enumerate(codes)}


class FactorizationMachine(nn.Module):
    """A factorization machine over creative, product and attributes (Rendle 2010), all as categories.

    Parameters
    ----------
    cardinalities
        Number of categories of each field.
    """

    starts: Tensor

    def __init__(self, cardinalities: list[int]) -> None:
        super().__init__()
        self.register_buffer("starts", torch.tensor([0, *cardinalities[:-1]]).cumsum(0))
        self.linear = nn.Embedding(sum(cardinalities), 1)
        self.factors = nn.Embedding(sum(cardinalities), FM_FACTORS)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.factors.weight, std=0.05)
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, fields: Tensor) -> Tensor:
        """Return click logits of categories, (B, F) to (B,)."""
        fields = fields + self.starts
        factors = self.factors(fields)  # (B, F, factors)
        pairs = (factors.sum(dim=1) ** 2 - (factors**2).sum(dim=1)).sum(dim=1) / 2  # (B,)
        logits: Tensor = self.bias + self.linear(fields).sum(dim=(1, 2)) + pairs
        return logits


def factorization_machine(learnt: LabelledRows, asked: Rows, *, seed: int) -> Floats:
    """Return the predictions of a factorization machine after one pass in mini-batches, (B,).

    River's own sees 1,400 rows a second, so that a pass takes longer than everything else together; this one has
    the same model and Adam's steps.
    """
    torch.manual_seed(seed)
    every = Rows.concatenate([learnt.rows, asked])
    fields = torch.from_numpy(
        np.column_stack([every.creatives, every.products, every.attributes.astype(np.int64)])
    )  # (B, F)
    model = FactorizationMachine((fields.max(dim=0).values + 1).tolist())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    clicks = torch.from_numpy(learnt.clicks)
    for start in range(0, len(clicks), FM_BATCH_ROWS):
        rows = slice(start, min(start + FM_BATCH_ROWS, len(clicks)))
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(fields[rows]), clicks[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.inference_mode():
        return np.asarray(torch.sigmoid(model(fields[len(clicks) :])).numpy(), np.float64)
