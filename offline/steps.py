"""The steps from a dataset to an aligned G-MLLM: each makes one artifact, or finds it made.

An artifact's manifest names all that it was made from. So a step whose result is there already gives that, and one
that was killed goes on from what it left in its work folder, which is named by the same.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import msgspec
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from generator.champion import Champion, ChampionPointer
from generator.creative_scorer import GrmScorer
from generator.grm import Grm
from generator.mllm import GroupMllm
from generator.mllm_presets import build_mllm
from generator.renderer_choice import choose_renderer
from generator.settings import GeneratorSettings
from offline.data_parallel import DataParallel
from offline.dataset import Dataset
from offline.evaluation import evaluate
from offline.gate import Verdict, accuracy_figures, hold_against
from offline.grm_training import NoPairsError
from offline.group_dpo import align
from offline.labelled_pair import Pair, read_pairs
from offline.lessons import lessons_of
from offline.pairs import HELD_OUT
from offline.pretrain import pretrain, teacher_of
from offline.pretrain_source import ProductSource
from offline.rebuild import SOURCES_FILE, Clock
from offline.reward_comparison import RewardData, RewardKind, train_reward
from offline.runs import Step
from offline.seeing import teach
from offline.settings import OfflineSettings
from offline.source_file import read_sources_file
from offline.tuples import KIND as TUPLES_KIND
from offline.tuples import build_tuples, read_tuples
from state.artifact import Artifact, ArtifactStore

log = logging.getLogger(__name__)

BASE_KIND: Final = "base-mllm"
TAUGHT_KIND: Final = "taught-mllm"
GRM_KIND: Final = "grm"
MLLM_KIND: Final = "mllm"
MODEL_KINDS: Final = (BASE_KIND, TAUGHT_KIND, GRM_KIND, TUPLES_KIND, MLLM_KIND)
"""Kinds of the artifacts that the steps make from datasets."""

LESSON_SETTINGS: Final = {
    "n_lesson_steps",
    "n_lesson_pictures",
    "batch_lessons",
    "lesson_learning_rate",
    "lesson_weight_decay",
}
"""Settings of reward models that their lessons depend on."""

_LOGGED_STEPS: Final = 20
"""Steps of the GRM between two lines of the log."""

OnProgress = Callable[[Step, int, int, Mapping[str, float]], None]
"""Is told the step, how much of how much of it is done, and what was measured by then."""


class SourcesMissing(RuntimeError):
    """A dataset that nothing can be trained from."""

    def __init__(self, dataset: Artifact) -> None:
        super().__init__(
            f"{dataset.name} has no {SOURCES_FILE}: it was built with offline.chain.enabled = false. "
            "Nothing was trained: run `osmf offline run`, which builds one that has."
        )


class ChampionMissing(RuntimeError):
    """A champion whose artifact is gone."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the champion names {name}, which is not there; nothing was compared with it. Restore the artifact, or "
            "`osmf offline rollback` to the champion before."
        )


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all steps work with: settings, where artifacts and unfinished work lie, who watches, who trains together."""

    offline: OfflineSettings
    generator: GeneratorSettings
    work_dir: Path
    clock: Clock
    on_progress: OnProgress
    processes: DataParallel = field(default_factory=DataParallel)

    @property
    def artifacts(self) -> ArtifactStore:
        """Where artifacts are."""
        return ArtifactStore(self.offline.dataset_dir)

    @property
    def seed(self) -> int:
        """Seed of everything."""
        return self.offline.chain.seed

    @property
    def device(self) -> str:
        """Where models are."""
        return self.processes.device

    def load_mllm(self, artifact: Artifact) -> GroupMllm:
        """Read a G-MLLM, after its files were checked."""
        artifact.verify()
        settings = self.generator.mllm
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return GroupMllm.load(artifact.path, dtype=dtype, device=self.device, attention=settings.attention)

    def load_grm(self, artifact: Artifact) -> Grm:
        """Read a GRM, after its files were checked."""
        artifact.verify()
        dtype: torch.dtype = getattr(torch, self.generator.mllm.dtype)
        return Grm.load(artifact.path, dtype=dtype, device=self.device)


class _Savable(Protocol):
    """A model that writes itself into a folder."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a step has come to: a model, and figures of its manifest."""

    model: _Savable
    figures: dict[str, float]


def sources_of(dataset: Artifact) -> list[ProductSource]:
    """Return the products of a dataset with their groups.

    Raises
    ------
    SourcesMissing
        If the dataset has none.
    """
    if SOURCES_FILE not in dataset.manifest.files:
        raise SourcesMissing(dataset)
    return read_sources_file(dataset.file(SOURCES_FILE))


def pairs_of(dataset: Artifact, split: str) -> list[Pair]:
    """Return a dataset's pairs of one split."""
    dataset.verify()
    return read_pairs(Dataset.read(dataset.path), split)


def pretrain_step(shop: Workshop, dataset: Artifact) -> Artifact:
    """Pre-train a G-MLLM from a dataset's sources: the artifact ``base-mllm``."""
    settings, generation = shop.offline.pretrain, shop.generator.mllm
    made_from = {"gaip": dataset.name, **base_settings(shop), "seed": shop.seed}

    def make(folder: Path) -> _Trained:
        sources = sources_of(dataset)
        mllm = build_mllm(generation, seed=shop.seed, corpus=[product.title for product in sources], device=shop.device)
        with httpx.Client() as client:
            report = pretrain(
                mllm,
                sources,
                teacher_of(settings, seed=shop.seed, client=client),
                settings,
                generation,
                folder=folder,
                seed=shop.seed,
                callbacks=[_Watched(shop, "pretrain")],
            )
        figures = {
            "n_rows": report.n_rows,
            "n_steps": report.n_steps,
            "n_processes": report.n_processes,
            "first_loss": report.first_loss,
            "last_loss": report.last_loss,
            "p_well_formed": report.prompts.p_well_formed,
            "specificity_nats": report.prompts.specificity_nats,
        }
        return _Trained(mllm, figures)

    return _made(shop, BASE_KIND, made_from, make)


def base_settings(shop: Workshop) -> dict[str, Any]:
    """Return the settings that a pre-trained G-MLLM depends on, as its manifest has them."""
    return {
        "mllm": shop.generator.mllm.model_dump(mode="json"),
        "pretrain": shop.offline.pretrain.model_dump(mode="json"),
    }


def lessons_step(shop: Workshop, dataset: Artifact, base: Artifact) -> Artifact:
    """Teach a pre-trained G-MLLM to say what pictures show, for reward models to stand on: ``taught-mllm``.

    Lessons are the creatives that are learnt from, and pictures that are drawn for products that are.
    """
    settings = shop.offline.reward
    made_from = {
        "gaip": dataset.name,
        "base-mllm": base.name,
        "lessons": settings.model_dump(mode="json", include=LESSON_SETTINGS),
        "held_out_by": shop.offline.held_out_by,
        "seed": shop.seed,
    }

    def make(folder: Path) -> _Trained:
        lessons = lessons_of(
            reward_data(dataset),
            sources_of(dataset),
            choose_renderer(shop.generator),
            held_out_by=shop.offline.held_out_by,
            n_pictures=settings.n_lesson_pictures,
            size_px=shop.offline.tuples.size_px,
            seed=shop.seed,
        )
        mllm = shop.load_mllm(base)
        losses = _Losses(shop, settings.n_lesson_steps)
        teach(mllm, lessons, settings, seed=shop.seed, on_step=losses, processes=shop.processes)
        return _Trained(mllm, {"n_lessons": len(lessons), "n_processes": shop.processes.n, **losses.figures})

    return _made(shop, TAUGHT_KIND, made_from, make)


def grm_step(shop: Workshop, dataset: Artifact, base: Artifact) -> Artifact:
    """Train a GRM on a dataset's pairs, on a pre-trained G-MLLM after its lessons: the artifact ``grm``."""
    settings = shop.offline.reward
    taught = lessons_step(shop, dataset, base)
    made_from = {
        "gaip": dataset.name,
        "base-mllm": base.name,
        TAUGHT_KIND: taught.name,
        "reward": settings.model_dump(mode="json"),
        "seed": shop.seed,
    }

    def make(folder: Path) -> _Trained:
        data = reward_data(dataset)
        losses = _Losses(shop, settings.n_steps)
        mllm, together = shop.load_mllm(taught), shop.processes
        grm = train_reward(RewardKind.GRM, data, settings, mllm, seed=shop.seed, on_step=losses, processes=together)
        measured = accuracy_figures(evaluate(grm, data.held_out)) if data.held_out else {}
        return _Trained(grm, {"n_learnt": len(data.learnt), "n_processes": together.n, **losses.figures, **measured})

    return _made(shop, GRM_KIND, made_from, make)


class _Losses:
    """Tells of losses as they come, and keeps the first and the last of the last stage."""

    def __init__(self, shop: Workshop, n_steps: int) -> None:
        self._shop = shop
        self._n_steps = n_steps
        self.figures: dict[str, float] = {}

    def __call__(self, stage: str, step: int, loss: float) -> None:
        """Take a step's loss."""
        if step == 0:
            self.figures["first_loss"] = loss
        self.figures["last_loss"] = loss
        done = step + 1
        if done % _LOGGED_STEPS == 0 or done == self._n_steps:
            log.info("step %d of %d: %s loss %.4f", done, self._n_steps, stage, loss)
        self._shop.on_progress("grm", done, self._n_steps, {f"{stage}_loss": loss})


def reward_data(dataset: Artifact) -> RewardData:
    """Return a dataset's pairs, and its creatives as lessons.

    Raises
    ------
    offline.grm_training.NoPairsError
        If there is no pair to learn from.
    """
    dataset.verify()
    data = RewardData.read(Dataset.read(dataset.path))
    if not data.learnt:
        raise NoPairsError
    return data


def tuples_step(shop: Workshop, dataset: Artifact, policy: Artifact, grm: Artifact) -> Artifact:
    """Let a G-MLLM propose prompts for every group, and a GRM rank their pictures: the artifact ``tuples``."""
    settings, generation = shop.offline.tuples, shop.generator.mllm
    made_from = {
        "gaip": dataset.name,
        "mllm": policy.name,
        "grm": grm.name,
        "tuples": settings.model_dump(mode="json"),
        "generation": generation.model_dump(mode="json"),
        "seed": shop.seed,
    }
    found = find_artifact(shop.artifacts, TUPLES_KIND, made_from)
    if found is not None:
        return found
    return build_tuples(
        shop.artifacts,
        shop.load_mllm(policy),
        sources_of(dataset),
        choose_renderer(shop.generator),
        GrmScorer(shop.load_grm(grm), grm.name),
        settings,
        generation,
        made_from=made_from,
        work_file=_work_folder(shop, TUPLES_KIND, made_from).with_suffix(".jsonl"),
        seed=shop.seed,
        created_at_ms=shop.clock(),
        on_product=lambda done, n: shop.on_progress("tuples", done, n, {}),
    )


def group_dpo_step(shop: Workshop, tuples: Artifact, policy: Artifact, *, kind: str = MLLM_KIND) -> Artifact:
    """Align a G-MLLM with preference tuples by Group-DPO: the artifact ``mllm``, or of another kind to compare with."""
    settings = shop.offline.group_dpo.of_preset(shop.generator.mllm.preset)
    made_from = {
        "tuples": tuples.name,
        "mllm": policy.name,
        "group_dpo": settings.model_dump(mode="json"),
        "seed": shop.seed,
    }

    def make(folder: Path) -> _Trained:
        tuples.verify()
        mllm = shop.load_mllm(policy)
        report = align(
            mllm,
            read_tuples(tuples),
            settings,
            folder=folder,
            seed=shop.seed,
            callbacks=[_Watched(shop, "group-dpo")],
        )
        figures = {
            "n_tuples": report.n_tuples,
            "n_held_out": report.n_held_out,
            "n_steps": report.n_steps,
            "n_processes": report.n_processes,
            "first_loss": report.first_loss,
            "last_loss": report.last_loss,
            **({} if report.accuracy is None else {"preference_accuracy": report.accuracy}),
            **({} if report.margin is None else {"preference_margin": report.margin}),
        }
        return _Trained(mllm, figures)

    return _made(shop, kind, made_from, make)


def gate_step(shop: Workshop, dataset: Artifact, mllm: Artifact, grm: Artifact, before: Champion | Artifact) -> Verdict:
    """Hold newly trained models against what is in use: the champion, or before the first the pre-trained G-MLLM."""
    champion = before if isinstance(before, Champion) else None
    base = before if isinstance(before, Artifact) else _in_use(shop, before.mllm)
    return hold_against(
        before=shop.load_mllm(base),
        after=shop.load_mllm(mllm),
        judge=shop.load_grm(grm),
        judge_name=grm.name,
        champion_judge=None if champion is None else shop.load_grm(_in_use(shop, champion.grm)),
        held_out=pairs_of(dataset, HELD_OUT),
        sources=sources_of(dataset),
        renderer=choose_renderer(shop.generator),
        settings=shop.offline,
        generation=shop.generator.mllm,
        seed=shop.seed,
    )


def promote_step(shop: Workshop, mllm: Artifact, grm: Artifact, figures: Mapping[str, float]) -> Champion:
    """Make newly trained models the champion; again, if that was done before a kill."""
    pointer = ChampionPointer(shop.offline.dataset_dir)
    champion = pointer.read()
    if champion is not None and (champion.mllm, champion.grm) == (mllm.name, grm.name):
        return champion
    champion = Champion(
        mllm=mllm.name,
        grm=grm.name,
        grm_accuracy=figures["accuracy"],
        n_grm_pairs=int(figures["n_held_out"]),
        promoted_at_ms=shop.clock(),
        reason=f"{figures['accuracy']:.1%} of the held-out winners named, {figures['p_well_formed']:.1%} of the "
        f"prompts well-formed, {figures.get('log_odds_gain', 0.0):+.2f} log-odds over what was in use",
    )
    pointer.move(champion)
    return champion


def _in_use(shop: Workshop, name: str) -> Artifact:
    found = shop.artifacts.named(name)
    if found is None:
        raise ChampionMissing(name)
    return found


def find_artifact(artifacts: ArtifactStore, kind: str, made_from: Mapping[str, Any]) -> Artifact | None:
    """Return the newest artifact that was made from exactly this; what else its manifest tells does not matter."""
    return artifacts.latest(
        kind, lambda found: all(found.manifest.made_from.get(key) == made_from[key] for key in made_from)
    )


def _made(shop: Workshop, kind: str, made_from: dict[str, Any], make: Callable[[Path], _Trained]) -> Artifact:
    """Return the artifact that was made from this, or make it, with a work folder that a killed run leaves.

    Of several processes that train together, the first one writes.
    """
    # A step of several processes has as many batches, so another number of them makes something else.
    made_from = {**made_from, "n_processes": shop.processes.n}
    found = find_artifact(shop.artifacts, kind, made_from)
    folder = _work_folder(shop, kind, made_from)
    if found is None:
        trained = make(folder)

        def write() -> Artifact:
            with shop.artifacts.write(kind, created_at_ms=shop.clock()) as draft:
                trained.model.save(draft.path)
                draft.made_from, draft.figures = made_from, trained.figures
            assert draft.finished is not None
            return draft.finished

        found = shop.processes.by_first(write)
    if shop.processes.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _work_folder(shop: Workshop, kind: str, made_from: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(made_from, order="sorted")).hexdigest()
    return shop.work_dir / f"{kind}-{digest[:12]}"


class _Watched(TrainerCallback):
    """Tells of a Trainer's progress."""

    def __init__(self, shop: Workshop, step: Step) -> None:
        self._shop = shop
        self._step = step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the step and what was measured."""
        if logs and state.is_world_process_zero and "loss" in logs:
            figures = {name: float(value) for name, value in logs.items()}
            self._shop.on_progress(self._step, state.global_step, state.max_steps, figures)
