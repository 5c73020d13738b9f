"""What a run's models are worth beside others: reward models, no-group DPO, and where it is known the truth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from benchmarks.creative_ctr import CreativeCtr, creative_ctr, uplift
from benchmarks.reward import GroupTruth, Oracle
from generator.mllm import GroupMllm
from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt, PromptNotUnderstood
from offline.chain import WORK_FOLDER, ChainRooms
from offline.pairs import HeldOutBy
from offline.pretrain_source import ProductSource
from offline.reward_comparison import RewardKind, compare_rewards
from offline.snapshot import snapshot_of
from offline.steps import Workshop, group_dpo_step, lessons_step, reward_data, sources_of
from online.assignment import Assigner
from online.encoders import load_encoders
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings
from simulator.stage import set_stage
from simulator.traffic import user_attributes
from simulator.truth import Truth, read_truth
from simulator.world import N_STYLE_DIMS, style_of
from state.artifact import Artifact
from state.reading import StateReader

if TYPE_CHECKING:
    from offline.rebuild import Clock

Floats = npt.NDArray[np.float64]

NO_GROUP_KIND: Final = "mllm-no-group"
N_PROMPTS: Final = 8
"""Prompts for each group whose CTR is simulated."""
N_USERS: Final = 4_000
"""Users, of the simulator's, whose groups are looked up."""


@dataclass(frozen=True, slots=True)
class ChainArtifacts:
    """What a run has made."""

    dataset: Artifact
    base: Artifact
    grm: Artifact
    tuples: Artifact
    mllm: Artifact


@dataclass(frozen=True, slots=True)
class GroupCtr:
    """What a group's users truly click of the prompts written for it: before, after, and without groups."""

    product_id: str
    title: str
    group_id: int
    before: float
    after: float
    no_group: float


@dataclass(frozen=True, slots=True)
class ChainComparison:
    """Figures by name, CTRs by group, what was held out, and why there is no truth where there is none."""

    figures: dict[str, float]
    groups: list[GroupCtr]
    held_out_by: HeldOutBy
    no_truth: str | None


def compare(rooms: ChainRooms, simulator: SimulatorSettings, made: ChainArtifacts, clock: Clock) -> ChainComparison:
    """Train what a run's models are compared with, and measure all of them.

    Parameters
    ----------
    rooms, clock
        Those of the run.
    simulator
        The simulator's settings: where its run left the truth, and the world that it is of.
    made
        The run's artifacts.
    """
    work = rooms.offline.dataset_dir / WORK_FOLDER / "comparison"
    shop = Workshop(rooms.offline, rooms.generator, work, clock, lambda *_: None)
    sources = sources_of(made.dataset)
    truth, no_truth = _truth(rooms, simulator, made.dataset, sources)
    figures = _rewards(shop, rooms.online, made, truth)
    without = rooms.offline.group_dpo.model_copy(update={"with_group": False})
    no_group = group_dpo_step(
        replace(shop, offline=rooms.offline.model_copy(update={"group_dpo": without})),
        made.tuples,
        made.base,
        kind=NO_GROUP_KIND,
    )
    for name, artifact in (("group_dpo", made.mllm), ("no_group_dpo", no_group)):
        measured = artifact.manifest.figures
        figures |= {
            f"{name}_{figure.removeprefix('preference_')}": measured[figure]
            for figure in ("preference_accuracy", "preference_margin")
            if figure in measured
        }
    groups: list[GroupCtr] = []
    if truth is not None:
        clicked = {
            name: _clicked(shop.load_mllm(artifact), sources, truth, shop, with_group=with_group)
            for name, artifact, with_group in (
                ("before", made.base, True),
                ("after", made.mllm, True),
                ("no_group", no_group, False),
            )
        }
        for name, value in clicked.items():
            figures[f"ctr_{name}"] = float(value.by_product.mean())
        for name, first, second in (
            ("ctr_uplift", "before", "after"),
            ("ctr_uplift_no_group", "before", "no_group"),
            ("ctr_gain_over_no_group", "no_group", "after"),
        ):
            found = uplift(clicked[first].whole, clicked[second].whole)
            figures |= {name: found.uplift, f"{name}_low": found.low, f"{name}_high": found.high}
        who = [(product, group) for product in sources for group in product.groups]
        groups = [
            GroupCtr(product.product_id, product.title, group.group_id, *map(float, ctrs))
            for (product, group), *ctrs in zip(who, *(value.by_group for value in clicked.values()), strict=True)
        ]
    shop.artifacts.prune(NO_GROUP_KIND, 1)
    shutil.rmtree(work, ignore_errors=True)
    return ChainComparison(figures, groups, rooms.offline.held_out_by, no_truth)


def _rewards(
    shop: Workshop, online: OnlineSettings, made: ChainArtifacts, truth: GroupTruth | None
) -> dict[str, float]:
    """Return the pair accuracies of the GRM, of the reward models of other papers, and of the truth."""
    data, settings = reward_data(made.dataset), shop.offline
    if not data.held_out:
        return {}
    taught = lessons_step(shop, made.dataset, made.base)
    compared = compare_rewards(
        data,
        settings.reward,
        settings.judge,
        partial(shop.load_mllm, taught),
        load_encoders(online),
        seed=shop.seed,
        trained={RewardKind.GRM: shop.load_grm(made.grm)},
        others=[] if truth is None else [Oracle(truth)],
    )
    figures: dict[str, float] = {"n_held_out_pairs": len(data.held_out)}
    for name, found in compared.accuracies.items():
        figures |= {
            f"{name}_accuracy": found.accuracy,
            f"{name}_accuracy_low": found.accuracy_low,
            f"{name}_accuracy_high": found.accuracy_high,
        }
    return figures


@dataclass(frozen=True, slots=True)
class _Clicked:
    """Simulated CTRs, by group and by product, the latter in the form that uplifts are worked out from."""

    by_group: Floats
    whole: CreativeCtr

    @property
    def by_product(self) -> Floats:
        """CTRs by product, (P,)."""
        return self.whole.by_product


def _clicked(
    mllm: GroupMllm, sources: Sequence[ProductSource], truth: GroupTruth, shop: Workshop, *, with_group: bool
) -> _Clicked:
    alone = [replace(product, groups=[group]) for product in sources for group in product.groups]
    found = creative_ctr(
        mllm,
        alone,
        truth,
        shop.generator.mllm,
        n_prompts=N_PROMPTS,
        with_group=with_group,
        seed=shop.seed,
    )
    by_group = iter(found.by_product)
    by_product = [
        np.average(
            [next(by_group) for _ in product.groups],
            weights=[truth.n_users(product.product_id, group.feature) for group in product.groups],
        )
        for product in sources
    ]
    return _Clicked(found.by_product, replace(found, by_product=np.array(by_product)))


def _truth(
    rooms: ChainRooms, simulator: SimulatorSettings, dataset: Artifact, sources: Sequence[ProductSource]
) -> tuple[GroupTruth | None, str | None]:
    """Return what the groups of a dataset truly click, or why that is not known."""
    path = simulator.out_dir / "truth.json"
    try:
        told = read_truth(path)
    except FileNotFoundError:
        return None, f"no truth: {path} is not there (simulator.out_dir); the stream was not simulated here"
    known = {product.product_id for product in told.products}
    if strangers := sorted({product.product_id for product in sources} - known):
        return None, f"no truth: {path} is of another stream, it does not know {strangers[0]!r}"
    with StateReader(rooms.state_path) as state, state.view() as view:
        if snapshot_of(view).snapshot_id != dataset.manifest.made_from["snapshot_id"]:
            return None, f"no truth: the state has gone on since {dataset.name}, and with it who is in which group"
        assigner = Assigner(rooms.online)
        assigner.load(view)
        styles = {creative.creative_id: _style(creative.prompt) for creative in view.creatives()}
    return _groups_truth(simulator, told, sources, assigner, styles), None


def _groups_truth(
    simulator: SimulatorSettings,
    told: Truth,
    sources: Sequence[ProductSource],
    assigner: Assigner,
    styles: Mapping[str, Floats],
) -> GroupTruth:
    """Return the tastes at the end of a simulated run, with the users of every group by a sample of them."""
    simulator = simulator.model_copy(update={"seed": told.seed})
    stage = set_stage(simulator, ProceduralRenderer())
    # As the session drew it: what events do not say of a user, no group is chosen by.
    known = user_attributes(stage.world, simulator.traffic.p_missing_attribute, np.random.default_rng([told.seed, 2]))
    world = stage.world
    if told.shifted_at_ms is not None:
        world = world.shift(told.shifted_categories, simulator.shift.kind, told.seed)
    numbers = {product.product_id: number for number, product in enumerate(stage.products)}
    users = np.random.default_rng(told.seed).permutation(world.n_users)[:N_USERS]
    members = {}
    for product in sources:
        group_of = np.array(
            [
                -1 if group_id is None else group_id
                for group_id in assigner.assign_many(
                    [product.product_id] * len(users), [known[user] for user in users.tolist()]
                )
            ]
        )
        for group in product.groups:
            inside = users[group_of == group.group_id]
            members[product.product_id, group.feature.tobytes()] = inside if len(inside) else users
    return GroupTruth(world, numbers, members, styles)


def _style(prompt: str | None) -> Floats:
    """Return the style of what was drawn from a prompt; of another one the neutral style, as in the simulator."""
    try:
        return style_of(Prompt.parse(prompt or ""))
    except PromptNotUnderstood:
        return np.zeros(N_STYLE_DIMS)
