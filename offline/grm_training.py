"""Training of the GRM: lessons in seeing, then pairs in both orders, then one temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from generator.comparison import Comparison, Floats, Picture
from generator.grm import Grm
from generator.prompt import Prompt
from offline.data_parallel import DataParallel
from offline.labelled_pair import Pair
from offline.settings import RewardSettings

LESSON_INSTRUCTION: Final = "Describe the picture."

CAIG_POINT_WEIGHT: Final = 0.5
"""Weight of CAIG's point loss."""


class NoPairsError(ValueError):
    """No pair to learn from."""

    def __init__(self) -> None:
        super().__init__("there are 0 pairs to learn from; allowed is 1 or more. No reward model was trained.")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A picture and the prompt that it was drawn from."""

    picture: Picture
    prompt: str


OnStep = Callable[[str, int, float], None]
"""Is told the stage (`lessons` or `pairs`), the step and its loss."""


def train_grm(
    grm: Grm,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    *,
    seed: int,
    lessons: Sequence[Lesson] = (),
    point_weight: float = 0.0,
    on_step: OnStep | None = None,
    processes: DataParallel | None = None,
) -> None:
    """Train a reward model on pairs, and calibrate it.

    First the G-MLLM learns to name what it sees in the lessons, which is what a small one needs most: from pairs alone
    it would have to find out at once what there is to see and who likes it. Then every batch holds its pairs in both
    orders, and a pair counts as won by its winner with the chance that it really did. A part of the products is kept
    back, and the temperature is fitted to their pairs.

    Parameters
    ----------
    grm
        The model.
    pairs
        Pairs to learn from.
    settings
        Steps, rates and sizes.
    seed
        Decides the order of everything.
    lessons
        Pictures with prompts; none may be of held-out creatives.
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
    grm.train()
    with torch.no_grad():
        processes.copy_first(grm.parameters())
    if lessons:
        teach(grm, lessons, settings, rng, on_step=on_step, processes=processes)
    losses = _pair_losses(grm, learnt, settings, point_weight, rng, processes)
    for step, loss in enumerate(_steps(grm, settings, settings.n_steps, losses, processes)):
        if on_step is not None:
            on_step("pairs", step, loss)
    grm.eval()
    judged = kept_back or learnt
    grm.temperature = fit_temperature(
        grm.logits([pair.winner_first for pair in judged]), np.array([pair.weight for pair in judged])
    )


def teach(
    grm: Grm,
    lessons: Sequence[Lesson],
    settings: RewardSettings,
    rng: np.random.Generator,
    *,
    on_step: OnStep | None = None,
    processes: DataParallel | None = None,
) -> None:
    """Teach the G-MLLM below a reward model to name what it sees; heads and group are not needed for it."""
    if processes is None:
        processes = DataParallel(on_gpu=next(grm.parameters()).is_cuda)
    losses = _lesson_losses(grm, lessons, settings, rng, processes)
    for step, loss in enumerate(_steps(grm, settings, settings.n_lesson_steps, losses, processes)):
        if on_step is not None:
            on_step("lessons", step, loss)


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


def _steps(
    grm: Grm, settings: RewardSettings, n_steps: int, losses: Iterator[Tensor], processes: DataParallel
) -> Iterator[float]:
    """Take steps down the losses, and yield each before its step; the rate warms up and falls by a cosine."""
    if n_steps == 0:
        return
    parameters = [parameter for parameter in grm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=n_steps, pct_start=0.1, cycle_momentum=False
    )
    on_gpu = parameters[0].is_cuda
    for _ in range(n_steps):
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=on_gpu):
            loss = next(losses)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        processes.average(weights.grad for weights in parameters if weights.grad is not None)
        with torch.no_grad():
            processes.average([loss])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _lesson_losses(
    grm: Grm,
    lessons: Sequence[Lesson],
    settings: RewardSettings,
    rng: np.random.Generator,
    processes: DataParallel,
) -> Iterator[Tensor]:
    """Yield the language model's loss on the slot words of a batch's pictures."""
    answers = [", ".join(Prompt.parse(lesson.prompt).slots().values()) for lesson in lessons]
    while True:
        drawn = rng.integers(len(lessons), size=settings.batch_lessons * processes.n).tolist()
        taken = processes.share(drawn)
        # A mean over the tokens of all processes' answers.
        n_tokens = grm.n_tokens([answers[place] for place in drawn]) / processes.n
        yield grm.lesson_loss(
            LESSON_INSTRUCTION,
            [lessons[place].picture for place in taken],
            [answers[place] for place in taken],
            n_tokens=n_tokens,
        )


def _pair_losses(
    grm: Grm,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    point_weight: float,
    rng: np.random.Generator,
    processes: DataParallel,
) -> Iterator[Tensor]:
    """Yield the loss of batches of pairs, each in both orders."""
    while True:
        places = rng.integers(len(pairs), size=settings.batch_pairs * processes.n).tolist()
        drawn = [pairs[place] for place in places]
        comparisons = [pair.winner_first for pair in drawn]
        if grm.with_group:
            comparisons = [_varied(comparison, settings.group_noise, rng) for comparison in comparisons]
        # Drawn and varied for all processes, so that their draws go on alike.
        drawn, comparisons = list(processes.share(drawn)), list(processes.share(comparisons))
        rows = comparisons + [comparison.swapped() for comparison in comparisons]
        judgement = grm.judge(rows)
        weight = torch.tensor([pair.weight for pair in drawn], device=judgement.logits.device)
        first = torch.cat([weight, 1.0 - weight])
        target = torch.stack([first, 1.0 - first], dim=1).float()  # (B, 2)
        loss = nn.functional.cross_entropy(judgement.logits, target)
        if point_weight:
            ctrs = torch.tensor([[pair.ctr_w, pair.ctr_l] for pair in drawn], device=judgement.ctr.device)
            ctrs = torch.cat([ctrs, ctrs.flip(1)]).float()  # (B, 2)
            loss = loss + point_weight * nn.functional.mse_loss(judgement.ctr, ctrs)
        yield loss


def _varied(comparison: Comparison, noise: float, rng: np.random.Generator) -> Comparison:
    """Return a comparison by a group that could as well have been it: moved by a share of its members' spread."""
    feature = comparison.group_feature
    members = feature[1:] - feature[:1]  # (10, D)
    spread = np.sqrt(np.mean(np.square(members)))
    moved = feature[:1] + rng.normal(size=feature[:1].shape) * (noise * spread)
    varied = np.concatenate([moved, moved + members[rng.permutation(len(members))]])
    return replace(comparison, group_feature=varied.astype(np.float32))
