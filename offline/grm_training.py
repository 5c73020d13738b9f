"""Training of the GRM on pairs, and its temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from generator.comparison import Floats
from generator.grm import Grm
from offline.data_parallel import DataParallel
from offline.descent import descend
from offline.labelled_pair import Pair
from offline.seeing import OnStep
from offline.settings import RewardSettings

CAIG_POINT_WEIGHT: Final = 0.5
"""Weight of CAIG's point loss."""


class NoPairsError(ValueError):
    """No pair to learn from."""

    def __init__(self) -> None:
        super().__init__("there are 0 pairs to learn from; allowed is 1 or more. No reward model was trained.")


def train_grm(
    grm: Grm,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    *,
    seed: int,
    point_weight: float = 0.0,
    on_step: OnStep | None = None,
    processes: DataParallel | None = None,
) -> None:
    """Train a reward model on pairs, and calibrate it.

    What is learnt of a pair is the winner's share of the clicks where both are shown as often: by how much it wins, and
    not only that. A pair's chance to have been won really is what the temperature is for: it is that at which a model
    that learnt from a part of the products explains the pairs of the others; then the model begins again, and learns
    from all of them.

    Parameters
    ----------
    grm
        The model, on a G-MLLM that was taught to see (`offline.seeing`).
    pairs
        Pairs to learn from.
    settings
        Steps, rates and sizes.
    seed
        Decides the order of everything.
    point_weight
        Weight of the squared error of both CTRs; `CAIG_POINT_WEIGHT` for CAIG's reward, whose model has no group.
    on_step
        Watches the training.
    processes
        Who trains together, by default this process alone: each takes a batch of every step, and all end with the
        same weights.

    Raises
    ------
    NoPairsError
        If there is no pair.
    """
    if not pairs:
        raise NoPairsError
    if processes is None:
        processes = DataParallel(on_gpu=next(grm.parameters()).is_cuda)
    rng = np.random.default_rng(seed)
    learnt, kept_back = _by_product(pairs, settings.calibration_share, rng)
    grm.fit_scale([pair.winner_first for pair in pairs])
    with torch.no_grad():
        processes.copy_first(grm.parameters())
    learning = [parameter for parameter in grm.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in learning]
    stages = [("pairs", pairs)] if not kept_back else [("calibration", learnt), ("pairs", pairs)]
    for stage, of_stage in stages:
        with torch.no_grad():
            for parameter, value in zip(learning, start, strict=True):
                parameter.copy_(value)
        steps = descend(
            learning,
            _losses(grm, of_stage, settings, point_weight, rng, processes),
            processes,
            n_steps=settings.n_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        for step, loss in enumerate(steps):
            if on_step is not None:
                on_step(stage, step, loss)
        if stage == stages[0][0]:
            judged = kept_back or pairs
            logits = grm.logits([pair.winner_first for pair in judged])
            grm.temperature = fit_temperature(logits, np.array([pair.weight for pair in judged]))


def fit_temperature(logits: Floats, p_wins: Floats) -> float:
    """Return the temperature at which logits explain best how probable it is that the first wins, 0.05 to 20.

    It is that of the least log-loss, which has one minimum.

    Parameters
    ----------
    logits
        Logits of the first's winning, (n,).
    p_wins
        How probable that is, (n,).
    """

    def log_loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, scaled) - p_wins * scaled))

    bounds = float(np.log(0.05)), float(np.log(20.0))
    found = minimize_scalar(log_loss, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


def _by_product(pairs: Sequence[Pair], share: float, rng: np.random.Generator) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to learn from and pairs of products that are kept back."""
    products = sorted({pair.product_id for pair in pairs})
    n_back = min(round(share * len(products)), len(products) - 1)
    back = {products[place] for place in rng.permutation(len(products))[:n_back]}
    return [pair for pair in pairs if pair.product_id not in back], [pair for pair in pairs if pair.product_id in back]


def _losses(
    grm: Grm,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    point_weight: float,
    rng: np.random.Generator,
    processes: DataParallel,
) -> Iterator[Tensor]:
    """Yield the loss of batches of pairs."""
    while True:
        places = rng.integers(len(pairs), size=settings.batch_pairs * processes.n).tolist()
        drawn = [pairs[place] for place in places]
        drawn = list(processes.share(drawn))  # drawn for all processes, so that their draws go on alike
        judgement = grm.judge([pair.winner_first for pair in drawn])
        first = torch.tensor([pair.share for pair in drawn], device=judgement.logits.device)
        target = torch.stack([first, 1.0 - first], dim=1).float()  # (B, 2)
        loss = nn.functional.cross_entropy(judgement.logits, target)
        if point_weight:
            ctrs = torch.tensor([[pair.ctr_w, pair.ctr_l] for pair in drawn], device=judgement.ctr.device).float()
            loss = loss + point_weight * nn.functional.mse_loss(judgement.ctr, ctrs)
        yield loss
