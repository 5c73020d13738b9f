"""What the benchmarks of reward models and of generated prompts rest on, on a small world."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.creative_ctr import CreativeCtr, creative_ctr, uplift
from benchmarks.reward import GroupTruth, Oracle, RewardWorld
from generator.mllm_presets import build_mllm
from generator.prompt import VOCABULARY, Prompt
from generator.settings import MllmSettings, TinyMllmSettings
from offline.evaluation import evaluate
from offline.reward_comparison import RewardData
from simulator.world import style_of

SMALL = MllmSettings(group_hidden_size=32, tiny=TinyMllmSettings(eyes="learnt", hidden_size=32, n_layers=1, n_heads=2))


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_oracle_is_nearly_always_right(reward_world: RewardWorld) -> None:
    data = RewardData.read(reward_world.dataset)
    assert min(len(data.learnt), len(data.held_out)) > 25
    assert evaluate(Oracle(reward_world.truth), [*data.learnt, *data.held_out]).accuracy > 0.9
    assert {lesson.picture.key for lesson in data.lessons}.isdisjoint(
        picture.key for pair in data.held_out for picture in (pair.winner_first.first, pair.winner_first.second)
    )
    assert all(Path(str(product.image_uri).removeprefix("file://")).is_file() for product in reward_world.sources)


class Writer:
    """Writes each group of a product what it, or another group, likes most; for all shoppers what the first does."""

    def __init__(self, truth: GroupTruth, *, turned: bool = False) -> None:
        self._truth, self._turned = truth, turned
        self._mllm = build_mllm(SMALL, seed=0)
        self.model, self.processor = self._mllm.model, self._mllm.processor

    def write_for(self, reward_world: RewardWorld, *, with_group: bool) -> None:
        prompts = [
            Prompt("the product", scene, palette, light, "no props", "centred")
            for scene in VOCABULARY["scene"]
            for palette in VOCABULARY["palette"]
            for light in VOCABULARY["light"]
        ]
        styles = np.stack([style_of(prompt) for prompt in prompts])
        self._answers: list[str] = []
        self.pairs: list[tuple[str, str]] = []
        """What the groups of each ordered pair of a product's like most."""
        for product in reward_world.sources:
            liked = [
                prompts[int(self._truth.ctrs(product.product_id, group.feature, styles).argmax())].text
                for group in product.groups
            ]
            self.pairs += permutations(liked, 2)
            self._answers += (liked[::-1] if self._turned else liked) if with_group else liked[:1]

    def generate(self, inputs: object, *, n_samples: int, **options: object) -> list[list[str]]:
        return [[text] * n_samples for text in self._answers]


def test_prompts_to_a_groups_taste_are_clicked_more(reward_world: RewardWorld) -> None:
    found: dict[str, CreativeCtr] = {}
    for name, turned, with_group in (("own", False, True), ("other", True, True), ("same", False, False)):
        writer = Writer(reward_world.truth, turned=turned)
        writer.write_for(reward_world, with_group=with_group)
        found[name] = creative_ctr(
            writer,  # type: ignore[arg-type]
            reward_world.sources,
            reward_world.truth,
            SMALL,
            n_prompts=2,
            with_group=with_group,
            seed=0,
        )
    # Groups that like the same most get the same; such a pair counts a half.
    p_different = sum(one != other for one, other in writer.pairs) / len(writer.pairs)
    assert found["own"].p_own_direction == pytest.approx(0.5 + 0.5 * p_different)
    assert p_different > 0.5
    assert found["same"].p_own_direction == 0.5
    assert found["other"].p_own_direction < 0.5
    assert found["own"].p_well_formed == 1
    assert found["own"].ctr > found["same"].ctr > 0
    gain = uplift(found["same"], found["own"])
    assert 0 < gain.low <= gain.uplift <= gain.high
    assert gain.uplift == pytest.approx(found["own"].ctr / found["same"].ctr - 1)
    none = uplift(found["own"], found["own"])
    assert (none.uplift, none.low, none.high) == (0, 0, 0)
