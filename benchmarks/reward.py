"""Reward models on a simulated world: pair accuracy of each on held-out pairs, beside the simulator's own truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.core_run import CoreRun
from benchmarks.worlds import BenchWorld
from generator.comparison import Comparison, Picture
from generator.settings import MllmSettings
from offline.dataset import Dataset
from offline.evaluation import PairAccuracy, evaluate
from offline.labelled_pair import Pair
from offline.settings import OfflineSettings

Floats = npt.NDArray[np.float64]

MICRO_BATCH_ROWS: Final = 1_024


@dataclass(frozen=True)
class RewardWorld:
    """A world's dataset, and the true CTR of each of its creatives in each group.

    ``ctrs`` are by product, group feature (as bytes, which is what a comparison knows of a group) and creative.
    """

    dataset: Dataset
    ctrs: Mapping[tuple[str, bytes], Mapping[str, float]]
    captions: Mapping[str, str]


class Oracle:
    """The simulator's truth as a scorer: the true CTRs of the users who are in the group at the end of the run."""

    name = "oracle"

    def __init__(self, world: RewardWorld) -> None:
        self._ctrs = world.ctrs

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return 1 where the first picture's true CTR is higher, 0 where it is lower, (n,)."""
        found = np.empty(len(comparisons))
        for place, row in enumerate(comparisons):
            ctrs = self._ctrs[row.product_id, row.group_feature.tobytes()]
            found[place] = 0.5 + 0.5 * np.sign(ctrs[row.first.key] - ctrs[row.second.key])
        return found


def make_reward_world(world: BenchWorld, course: CoreRun, settings: OfflineSettings) -> RewardWorld:
    """Return the dataset of what a run has learnt, made as the offline job makes it, and the truth about it."""
    from offline.dataset import make_dataset
    from offline.snapshot import take_snapshot
    from state.reading import StateReader
    from state.store import Store

    with TemporaryDirectory() as folder:
        with Store(Path(folder) / "state", sync=False) as store:
            store.commit(world.registered)
            course.save(store)
        with StateReader(Path(folder) / "state") as state:
            snapshot = take_snapshot(state)
        dataset = make_dataset(snapshot, Path(folder), settings)
    features = {
        (row["product_id"], row["group_id"]): np.asarray(row["group_feature"], np.float32).tobytes()
        for row in snapshot.groups.to_pylist()
    }
    users = np.arange(world.world.n_users)
    ctrs = {}
    for product, product_id in world.registry.product_ids.items():
        numbers = [int(number) for number in world.creative_numbers[product]]
        group_of = course.groups(product, users)
        shown = np.full_like(users, product)
        chances = np.stack(
            [world.world.p_click(users, shown, np.tile(style, (len(users), 1))) for style in world.styles[numbers]]
        )  # (C, U)
        ids = [world.creative_ids[number] for number in numbers]
        for of_product, group_id in features:
            if of_product == product_id:
                members = group_of == group_id
                # A group that nobody is in any more stands for all users.
                means = chances[:, members if members.any() else ...].mean(axis=1)
                ctrs[product_id, features[product_id, group_id]] = dict(zip(ids, means.tolist(), strict=True))
    captions = {row["creative_id"]: row["prompt"] or "" for row in snapshot.creatives.to_pylist()}
    return RewardWorld(dataset, ctrs, captions)


def drawn_lessons(
    world: BenchWorld, products: Sequence[str], n_pictures: int, rng: np.random.Generator
) -> list[tuple[Picture, str]]:
    """Draw pictures of some products from random prompts, to learn seeing from: pictures, and their prompts."""
    from functools import partial
    from io import BytesIO

    from PIL import Image

    from generator.procedural import ProceduralRenderer
    from generator.prompt import VOCABULARY, Prompt

    renderer = ProceduralRenderer()
    chosen = [product for product in world.stage.products if product.product_id in set(products)]
    found = []
    for number in range(n_pictures):
        product = chosen[int(rng.integers(len(chosen)))]
        words = {slot: of_slot[int(rng.integers(len(of_slot)))] for slot, of_slot in VOCABULARY.items()}
        prompt = Prompt(caption=product.title, **words).text
        with Image.open(product.cutout_path) as cutout:
            image = renderer.render(cutout.convert("RGBA"), prompt, seed=number, size_px=256).image
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        found.append((Picture(f"lesson-{number}", partial(bytes, buffer.getvalue())), prompt))
    return found


def reward_accuracies(
    world: RewardWorld,
    settings: OfflineSettings,
    mllm: MllmSettings,
    *,
    seed: int,
    lessons: Sequence[tuple[Picture, str]] = (),
) -> dict[str, PairAccuracy]:
    """Train every reward model on a dataset's pairs and evaluate it on the held-out ones, by name.

    These are ``grm``, ``grm_no_group``, ``caig``, ``cg4ctr`` and ``oracle``, and ``judge`` where an endpoint is set.
    The three that stand on the G-MLLM have the same start, the same lessons and the same number of steps.

    Parameters
    ----------
    world
        The dataset and the truth.
    settings
        How the models are trained, and the judge's endpoint.
    mllm
        The G-MLLM that they stand on.
    seed
        Seed of weights and batches.
    lessons
        Pictures and prompts besides those of the creatives that are learnt from.
    """
    from generator.grm import Grm
    from offline.grm_training import CAIG_POINT_WEIGHT, Lesson, train_grm
    from offline.labelled_pair import read_pairs
    from offline.pairs import HELD_OUT, TRAIN

    learnt, held_out = read_pairs(world.dataset, TRAIN), read_pairs(world.dataset, HELD_OUT)
    seen = {picture.key: picture for pair in learnt for picture in (pair.winner_first.first, pair.winner_first.second)}
    taught = [Lesson(picture, world.captions[key]) for key, picture in sorted(seen.items()) if world.captions[key]]
    taught += [Lesson(*lesson) for lesson in lessons]
    found = {"oracle": evaluate(Oracle(world), held_out)}
    for name, with_group, point_weight in (
        ("grm", True, 0.0),
        ("grm_no_group", False, 0.0),
        ("caig", False, CAIG_POINT_WEIGHT),
    ):
        from generator.mllm_presets import build_mllm

        grm = Grm(build_mllm(mllm, seed=seed), with_group=with_group, name=name)
        train_grm(grm, learnt, settings.reward, seed=seed, lessons=taught, point_weight=point_weight)
        found[name] = evaluate(grm, held_out)
    found["cg4ctr"] = _cg4ctr(world, learnt, held_out, settings, seed)
    if settings.judge.url is not None:
        import httpx

        from offline.judge import ZeroShotJudge

        with httpx.Client() as client:
            found["judge"] = evaluate(ZeroShotJudge(settings.judge, client), held_out)
    return found


def _cg4ctr(
    world: RewardWorld, learnt: Sequence[Pair], held_out: Sequence[Pair], settings: OfflineSettings, seed: int
) -> PairAccuracy:
    import torch

    from offline.cg4ctr import Cg4Ctr, train_cg4ctr
    from online.encoders import load_encoders
    from online.settings import OnlineSettings

    torch.manual_seed(seed)
    model = Cg4Ctr(*load_encoders(OnlineSettings()), dict(world.captions))
    train_cg4ctr(model, learnt, settings.reward, seed=seed)
    return evaluate(model, held_out)
