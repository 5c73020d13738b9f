"""Comparison of reward models: the GRM beside those of other papers, all trained and evaluated on the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from generator.comparison import Picture
from generator.grm import Grm
from generator.mllm import GroupMllm
from offline.cg4ctr import Cg4Ctr, train_cg4ctr
from offline.data_parallel import DataParallel
from offline.dataset import Dataset
from offline.evaluation import PairAccuracy, evaluate
from offline.grm_training import CAIG_POINT_WEIGHT, train_grm
from offline.labelled_pair import Pair, PairScorer, read_pairs
from offline.pairs import HELD_OUT, TRAIN
from offline.seeing import Lesson, OnStep
from offline.settings import EndpointSettings, RewardSettings
from online.encoders import ImageEncoder, TextEncoder

if TYPE_CHECKING:
    from torch import Tensor


class RewardKind(StrEnum):
    """A reward model that stands on the G-MLLM."""

    GRM = "grm"
    GRM_NO_GROUP = "grm_no_group"
    """The GRM without its group token."""
    CAIG = "caig"
    """CAIG's: no group, and its point loss on both CTRs besides."""


@dataclass(frozen=True)
class RewardData:
    """What reward models learn from and are judged by.

    ``lessons`` are pictures with their prompts, none of a held-out creative; ``captions`` are the prompts of all
    creatives by id, the empty text where one has none.
    """

    learnt: Sequence[Pair]
    held_out: Sequence[Pair]
    lessons: Sequence[Lesson]
    captions: Mapping[str, str]

    @classmethod
    def read(cls, dataset: Dataset) -> Self:
        """Read a dataset's pairs; the creatives that are learnt from are its lessons.

        Raises
        ------
        offline.labelled_pair.MissingPictureError
            If a creative of a pair has no picture.
        """
        captions = {
            row[f"creative_{side}"]: row[f"prompt_{side}"] or "" for row in dataset.pairs.to_pylist() for side in "wl"
        }
        learnt = read_pairs(dataset, TRAIN)
        pictures = {
            picture.key: picture for pair in learnt for picture in (pair.winner_first.first, pair.winner_first.second)
        }
        taught = [Lesson(picture, captions[key]) for key, picture in sorted(pictures.items()) if captions[key]]
        return cls(learnt, read_pairs(dataset, HELD_OUT), taught, captions)

    @property
    def pictures(self) -> dict[str, Picture]:
        """All pictures of the pairs, by key."""
        comparisons = [pair.winner_first for pair in (*self.learnt, *self.held_out)]
        return {picture.key: picture for row in comparisons for picture in (row.first, row.second)}


def train_reward(
    kind: RewardKind,
    data: RewardData,
    settings: RewardSettings,
    mllm: GroupMllm,
    *,
    seed: int,
    readings: dict[str, Tensor] | None = None,
    on_step: OnStep | None = None,
    processes: DataParallel | None = None,
) -> Grm:
    """Train a reward model that starts from a G-MLLM, all kinds for the same number of steps.

    Parameters
    ----------
    kind
        Which one.
    data
        The pairs.
    settings
        Steps, rates and sizes.
    mllm
        What it stands on, after its lessons (`offline.seeing`); it becomes the model's own.
    seed
        Seed of the heads and of the order of everything; the process's own random state is left as it is.
    readings
        What the same G-MLLM has read in pictures already, and where what it reads is kept.
    on_step
        Watches the training.
    processes
        Who trains together, by default this process alone.

    Raises
    ------
    offline.grm_training.NoPairsError
        If there is no pair.
    """
    import torch

    with torch.random.fork_rng(devices=[mllm.device] if mllm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        grm = Grm(mllm, with_group=kind is RewardKind.GRM, layer=settings.layer, name=kind.value, readings=readings)
        train_grm(
            grm,
            data.learnt,
            settings,
            seed=seed,
            point_weight=CAIG_POINT_WEIGHT if kind is RewardKind.CAIG else 0.0,
            on_step=on_step,
            processes=processes,
        )
    return grm


def train_cg4ctr_reward(
    data: RewardData,
    settings: RewardSettings,
    encoders: tuple[TextEncoder, ImageEncoder],
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Cg4Ctr:
    """Train CG4CTR's reward model on frozen encoders; the process's own random state is left as it is."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cg4Ctr(*encoders, dict(data.captions))
        train_cg4ctr(model, data.learnt, settings, seed=seed, on_step=on_step)
    return model


@dataclass(frozen=True)
class RewardComparison:
    """The reward models that stand on the G-MLLM, and how good all scorers are, by name."""

    grms: dict[RewardKind, Grm]
    accuracies: dict[str, PairAccuracy]


def compare_rewards(
    data: RewardData,
    settings: RewardSettings,
    judge: EndpointSettings,
    start: Callable[[], GroupMllm],
    encoders: tuple[TextEncoder, ImageEncoder],
    *,
    seed: int,
    trained: Mapping[RewardKind, Grm] | None = None,
    others: Sequence[PairScorer] = (),
    on_step: Callable[[str, str, int, float], None] | None = None,
) -> RewardComparison:
    """Train the reward models that are not there yet, and evaluate all of them on the held-out pairs.

    They are those of `RewardKind`, CG4CTR's, and the zero-shot judge where its endpoint is set.

    Parameters
    ----------
    data
        The pairs and captions.
    settings
        How they are trained, all alike.
    judge
        The judge's endpoint.
    start
        Gives the G-MLLM that a model starts from, after its lessons; a new copy at each call.
    encoders
        Those of CG4CTR.
    seed
        Seed of all of them.
    trained
        Models that are there already.
    others
        Further scorers to compare, such as who knows the truth.
    on_step
        Is told the model's name, the stage, the step and its loss.
    """

    def watch(name: str) -> OnStep | None:
        return None if on_step is None else lambda stage, step, loss: on_step(name, stage, step, loss)

    readings: dict[str, Tensor] = {}
    grms = dict(trained or {})
    for kind in RewardKind:
        if kind not in grms:
            grms[kind] = train_reward(
                kind, data, settings, start(), seed=seed, readings=readings, on_step=watch(kind.value)
            )
    cg4ctr = train_cg4ctr_reward(data, settings, encoders, seed=seed, on_step=watch(Cg4Ctr.name))
    scorers: list[PairScorer] = [*grms.values(), cg4ctr, *others]
    found = {scorer.name: evaluate(scorer, data.held_out) for scorer in scorers}
    if judge.url is not None:
        import httpx

        from offline.judge import ZeroShotJudge

        with httpx.Client() as client:
            found["judge"] = evaluate(ZeroShotJudge(judge, client), data.held_out)
    return RewardComparison(grms, found)
