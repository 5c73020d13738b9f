"""Benchmark of the offline half: reward models on held-out pairs, and what aligned prompts are clicked.

A world's stream is learnt first. From what it left the G-MLLM is pre-trained, the reward models are trained from it,
and it is aligned three ways: for groups, without group token, and by CAIG's reward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.core_run import CoreRun
from benchmarks.measured import Measured, over_seeds, seeds_of
from benchmarks.worlds import START_MS, BenchWorld, bench_world
from generator.settings import MllmSettings
from offline.settings import GroupDpoSettings, OfflineSettings, PretrainSettings, TupleSettings
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings

if TYPE_CHECKING:
    from benchmarks.creative_ctr import CreativeCtr
    from benchmarks.reward import RewardWorld
    from generator.grm import Grm
    from generator.mllm import GroupMllm
    from generator.renderer import Renderer
    from offline.evaluation import PairAccuracy
    from offline.tuples import PreferenceTuple

log = logging.getLogger(__name__)

MICRO_BATCH_ROWS: Final = 1_024
PICTURE_PX: Final = 128
"""Side of all pictures: the eyes read 224 pixels, and four times as many take four times as long to draw."""


def _world(n_products: int) -> SimulatorSettings:
    world = bench_world(mean_ctr=0.06)
    catalogue = world.catalogue.model_copy(update={"n_products": n_products, "creative_side_px": PICTURE_PX})
    return world.model_copy(update={"catalogue": catalogue})


@dataclass(frozen=True)
class OfflineRun:
    """One world of the benchmark: how many impressions are learnt, and how the models are trained.

    ``n_lessons`` are the pictures that are drawn to learn seeing from, ``n_prompts`` the prompts for each group whose
    CTR is measured.
    """

    world: SimulatorSettings
    n_impressions: int
    n_lessons: int
    n_prompts: int
    offline: OfflineSettings = field(default_factory=OfflineSettings)
    mllm: MllmSettings = field(default_factory=MllmSettings)


_SETTINGS: Final = OfflineSettings(held_out_by="product", tuples=TupleSettings(size_px=PICTURE_PX))
RUN: Final = OfflineRun(_world(48), 600_000, n_lessons=900, n_prompts=8, offline=_SETTINGS)
QUICK_RUN: Final = OfflineRun(
    _world(12),
    60_000,
    n_lessons=100,
    n_prompts=4,
    offline=_SETTINGS.model_copy(
        update={
            "pretrain": PretrainSettings(n_rows=1_600),
            "reward": _SETTINGS.reward.model_copy(update={"n_steps": 60}),
        }
    ),
)


@dataclass(frozen=True)
class Figures:
    """What a seed came to: values by name, and the interval over products of those that have one."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def bench_offline(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    run: OfflineRun | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Train reward models and aligned G-MLLMs on what the stream of simulated worlds has left.

    Metrics: the accuracy on pairs of held-out products of the GRM (``grm_accuracy``), of the GRM without group token
    (``grm_no_group_accuracy``), of CAIG's and CG4CTR's reward (``caig_accuracy``, ``cg4ctr_accuracy``), of the
    simulator's truth (``oracle_accuracy``) and, where its endpoint is set, of the zero-shot judge (``judge_accuracy``);
    ``gap_closed``, how much of the way from CAIG's to the oracle's the GRM goes. Of the simulated CTR of prompts for
    all groups the relative uplift on those of the pre-trained G-MLLM (``ctr_uplift_...``) after Group-DPO
    (``group_dpo``), after the same DPO without group token (``no_group``), and after DPO without group token on tuples
    that CAIG's reward ranked (``caig``); ``ctr_gain_over_no_group`` and ``ctr_gain_over_caig``, that of Group-DPO's
    prompts on theirs. For each of the four G-MLLMs (``pretrained`` is the first): ``own_prompts_...``, the share of
    pairs of a product's groups that get prompts of their own at their likeliest; ``own_direction_...``, the share of
    ordered pairs of which the first clicks its own prompts more than the other's, where 0.5 is chance; and
    ``well_formed_...``. Further ``dpo_accuracy`` and ``dpo_margin`` on held-out tuples.

    Over several seeds intervals are t-intervals; those over products of each seed are in ``detail``, and with one
    seed they are the metrics'.

    Parameters
    ----------
    quick
        A small world and short training, with one seed unless others are named.
    seeds
        Seeds of the worlds; default: the first three reporting seeds.
    run, online
        Another world and training; its seed is replaced by those of ``seeds``.
    """
    online = OnlineSettings() if online is None else online
    chosen = run or (QUICK_RUN if quick else RUN)
    found = {seed: measure_seed(chosen, seed, online) for seed in seeds or seeds_of(None, quick=quick)[:3]}
    return over_figures(found)


def over_figures(found: Mapping[int, Figures]) -> Measured:
    """Return figures over seeds, with each seed's own intervals in the detail."""
    names = [name for name in next(iter(found.values())).values if all(name in each.values for each in found.values())]
    measured = over_seeds({seed: {name: each.values[name] for name in names} for seed, each in found.items()})
    intervals = {str(seed): {name: list(ends) for name, ends in each.intervals.items()} for seed, each in found.items()}
    metrics = dict(measured.metrics)
    if len(found) == 1:
        for name, (low, high) in next(iter(found.values())).intervals.items():
            metrics |= {f"{name}_low": low, f"{name}_high": high}
    return replace(measured, metrics=metrics, detail={**measured.detail, "intervals_by_seed": intervals})


def measure_seed(run: OfflineRun, seed: int, online: OnlineSettings) -> Figures:
    """Run the whole of the benchmark on one world."""
    import torch

    from benchmarks.reward import make_reward_world
    from generator.procedural import ProceduralRenderer

    torch.set_num_threads(online.torch_threads)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), online)
    course = CoreRun(world, online, micro_batch_rows=MICRO_BATCH_ROWS)
    for _ in course.work_off(world.draw(run.n_impressions, np.random.default_rng([seed, 17]))):
        pass
    log.info("world %d: its stream is learnt", seed)
    made = make_reward_world(world, course, online, run.offline)
    with TemporaryDirectory() as folder:
        return measure_models(run, made, ProceduralRenderer(), online, Path(folder), seed)


def measure_models(
    run: OfflineRun, made: RewardWorld, renderer: Renderer, online: OnlineSettings, folder: Path, seed: int
) -> Figures:
    """Train and measure all models on what a world's stream has left; ``folder`` is theirs."""
    from benchmarks.reward import Oracle
    from generator.mllm import GroupMllm
    from offline.lessons import lessons_of
    from offline.reward_comparison import RewardData, RewardKind, compare_rewards
    from offline.seeing import teach
    from online.encoders import load_encoders

    settings = run.offline
    pretrained, taught = folder / "pretrained", folder / "taught"
    mllm = _pretrain(run, made, folder, seed)
    mllm.save(pretrained)
    start = partial(GroupMllm.load, pretrained)
    log.info("world %d: the G-MLLM is pre-trained", seed)
    data = RewardData.read(made.dataset)
    lessons = lessons_of(
        data,
        made.sources,
        renderer,
        held_out_by=settings.held_out_by,
        n_pictures=run.n_lessons,
        size_px=settings.tuples.size_px,
        seed=seed,
    )
    teach(mllm, lessons, settings.reward, seed=seed)
    mllm.save(taught)
    compared = compare_rewards(
        data,
        settings.reward,
        settings.judge,
        partial(GroupMllm.load, taught),
        load_encoders(online),
        seed=seed,
        others=[Oracle(made.truth)],
    )
    accuracies = compared.accuracies
    log.info("world %d: %s", seed, {name: round(found.accuracy, 3) for name, found in accuracies.items()})
    values, intervals = _accuracy_figures(accuracies)

    def tuples(kind: RewardKind, run: OfflineRun) -> list[PreferenceTuple]:
        return _tuples(run, made, start(), compared.grms[kind], renderer, folder / f"tuples-{kind.value}", seed)

    # CAIG's reward is hardly ever sure, and by its method every pair counts.
    every_pair = settings.tuples.model_copy(update={"min_win_probability": 0.5})
    of_all = tuples(RewardKind.CAIG, replace(run, offline=settings.model_copy(update={"tuples": every_pair})))
    of_groups = tuples(RewardKind.GRM, run)
    clicked = {"pretrained": _clicked(run, made, start(), seed, values, "pretrained", with_group=True)}
    for name, ranked, with_group in (
        ("group_dpo", of_groups, True),
        ("no_group", of_groups, False),
        ("caig", of_all, False),
    ):
        dpo = settings.group_dpo.of_preset(run.mllm.preset).model_copy(update={"with_group": with_group})
        mllm = start()
        report = _align(mllm, ranked, dpo, folder / name, seed)
        if name == "group_dpo":
            values |= report
        clicked[name] = _clicked(run, made, mllm, seed, values, name, with_group=with_group)
    _uplift_figures(clicked, values, intervals)
    return Figures(values, intervals)


def _pretrain(run: OfflineRun, made: RewardWorld, folder: Path, seed: int) -> GroupMllm:
    import httpx

    from generator.mllm_presets import build_mllm
    from offline.pretrain import pretrain, teacher_of

    mllm = build_mllm(run.mllm, seed=seed, corpus=[product.title for product in made.sources])
    with httpx.Client() as client:
        teacher = teacher_of(run.offline.pretrain, seed=seed, client=client)
        pretrain(mllm, made.sources, teacher, run.offline.pretrain, run.mllm, folder=folder / "pretraining", seed=seed)
    return mllm


def _tuples(
    run: OfflineRun, made: RewardWorld, mllm: GroupMllm, grm: Grm, renderer: Renderer, folder: Path, seed: int
) -> list[PreferenceTuple]:
    from generator.creative_scorer import GrmScorer
    from offline.tuples import build_tuples, read_tuples
    from state.artifact import ArtifactStore

    artifact = build_tuples(
        ArtifactStore(folder),
        mllm,
        made.sources,
        renderer,
        GrmScorer(grm, grm.name),
        run.offline.tuples,
        run.mllm,
        made_from={},
        work_file=folder / "work.jsonl",
        seed=seed,
        created_at_ms=START_MS,
    )
    return read_tuples(artifact)


def _align(
    mllm: GroupMllm, tuples: Sequence[PreferenceTuple], settings: GroupDpoSettings, folder: Path, seed: int
) -> dict[str, float]:
    from offline.group_dpo import align

    report = align(mllm, tuples, settings, folder=folder, seed=seed)
    log.info("aligned: %s", report)
    measured = {"dpo_accuracy": report.accuracy, "dpo_margin": report.margin}
    return {name: value for name, value in measured.items() if value is not None}


def _clicked(
    run: OfflineRun,
    made: RewardWorld,
    mllm: GroupMllm,
    seed: int,
    values: dict[str, float],
    name: str,
    *,
    with_group: bool,
) -> CreativeCtr:
    """Measure a G-MLLM's prompts, add what there is but CTRs to the values, and return the CTRs."""
    from benchmarks.creative_ctr import creative_ctr
    from offline.pretrain import Pictures
    from offline.prompt_gate import measure_prompts

    quality = measure_prompts(
        mllm,
        made.sources,
        run.mllm,
        n_groups=sum(len(product.groups) for product in made.sources),
        with_group=with_group,
        seed=seed,
        pictures=Pictures.of(mllm),
    )
    found = creative_ctr(
        mllm, made.sources, made.truth, run.mllm, n_prompts=run.n_prompts, with_group=with_group, seed=seed
    )
    values[f"own_prompts_{name}"] = quality.p_group_specific
    values[f"own_direction_{name}"] = found.p_own_direction
    values[f"well_formed_{name}"] = found.p_well_formed
    return found


def _accuracy_figures(
    accuracies: Mapping[str, PairAccuracy],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    values = {f"{name}_accuracy": found.accuracy for name, found in accuracies.items()}
    intervals = {f"{name}_accuracy": (found.accuracy_low, found.accuracy_high) for name, found in accuracies.items()}
    caig, oracle, grm = (accuracies[name] for name in ("caig", "oracle", "grm"))
    values["gap_closed"] = (grm.accuracy - caig.accuracy) / (oracle.accuracy - caig.accuracy)
    values |= {
        "grm_order_inconsistency": grm.order_inconsistency,
        "grm_calibration_error": grm.calibration_error,
        "n_held_out_pairs": float(grm.n_pairs),
        "n_held_out_products": float(grm.n_products),
    }
    return values, intervals


def _uplift_figures(
    clicked: Mapping[str, CreativeCtr], values: dict[str, float], intervals: dict[str, tuple[float, float]]
) -> None:
    from benchmarks.creative_ctr import uplift

    aligned = ("group_dpo", "no_group", "caig")
    compared = [(f"ctr_uplift_{name}", "pretrained", name) for name in aligned]
    compared += [(f"ctr_gain_over_{name}", name, "group_dpo") for name in aligned[1:]]
    for figure, before, after in compared:
        found = uplift(clicked[before], clicked[after])
        values[figure] = found.uplift
        intervals[figure] = found.low, found.high
    values["ctr_pretrained"] = clicked["pretrained"].ctr
