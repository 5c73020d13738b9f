from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generator.creative_scorer import Audience, Candidate, ScoresUnusable
from generator.mllm import GroupMllm, MllmInput
from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from offline.pretrain_source import ProductSource
from offline.settings import TupleSettings
from offline.tuples import build_tuples, rank_pairs, read_tuples
from state.artifact import Artifact, ArtifactStore
from tests.offline import dpo_world

SETTINGS = TupleSettings(n_candidates=4, n_pairs=1, size_px=64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def sources(tmp_path: Path) -> list[ProductSource]:
    return dpo_world.products(tmp_path)


class Writer(GroupMllm):
    """A model that writes a set answer for each sample, and remembers with which seed it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        mllm = dpo_world.mllm()
        super().__init__(mllm.model, mllm.processor)
        self.texts = list(texts)
        self.seeds: list[int] = []

    def generate(self, inputs: Sequence[MllmInput], **options: Any) -> list[list[str]]:
        self.seeds.append(options["seed"])
        assert options["n_samples"] == len(self.texts)
        assert all(row.group_feature is not None and row.images for row in inputs)
        return [self.texts for _ in inputs]


class Truth:
    """Knows the scene that each group prefers."""

    name = "truth/1"

    def __init__(self, *, breaks_at: str | None = None, log_odds: float = 2.0) -> None:
        self.breaks_at = breaks_at
        self.log_odds = log_odds

    def score_many(self, audience: Audience, candidates: Sequence[Candidate]) -> Any:
        if audience.product_id == self.breaks_at:
            raise KeyboardInterrupt
        assert all(candidate.image.size == (64, 64) for candidate in candidates)
        scenes = [Prompt.parse(candidate.prompt).scene for candidate in candidates]
        return np.array([self.log_odds * (scene == dpo_world.TASTES[audience.group_id]) for scene in scenes])


TEXTS = [dpo_world.prompt(scene) for scene in dpo_world.TASTES] + ["a nice picture", dpo_world.prompt("pine forest")]


def build(tmp_path: Path, mllm: GroupMllm, sources: list[ProductSource], scorer: Any, **options: Any) -> Artifact:
    return build_tuples(
        ArtifactStore(tmp_path / "store"),
        mllm,
        sources,
        ProceduralRenderer(),
        scorer,
        options.pop("settings", SETTINGS),
        dpo_world.SMALL,
        **{
            "made_from": {"mllm": "mllm/v000001"},
            "work_file": tmp_path / "work.jsonl",
            "seed": 3,
            "created_at_ms": 1_000,
            **options,
        },
    )


def test_each_groups_winner_is_what_its_scorer_puts_first(sources: list[ProductSource], tmp_path: Path) -> None:
    artifact = build(tmp_path, Writer(TEXTS), sources, Truth())
    tuples = read_tuples(artifact)
    assert [(row.product_id, row.group_id) for row in tuples] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    for row in tuples:
        assert row.chosen == dpo_world.prompt(dpo_world.TASTES[row.group_id])
        assert row.rejected in TEXTS[:2] + TEXTS[3:]
        assert row.chosen != row.rejected
        assert row.p_win == pytest.approx(1 / (1 + np.exp(-2)))
        assert row.picture_uri == sources[0].image_uri
        assert row.title == dpo_world.TITLES[int(row.product_id[1])]
        np.testing.assert_array_equal(row.group_feature, sources[0].groups[row.group_id].feature)
    manifest = artifact.manifest
    assert manifest.kind == "tuples"
    assert manifest.made_from == {
        "mllm": "mllm/v000001",
        "scorer": "truth/1",
        "renderer": f"procedural/{ProceduralRenderer.version}",
        "seed": 3,
    }
    assert (manifest.figures["n_tuples"], manifest.figures["n_prompts"], manifest.figures["n_well_formed"]) == (
        4,
        16,
        12,
    )
    assert not (tmp_path / "work.jsonl").exists()


def test_what_was_written_for_one_group_is_a_candidate_of_all(sources: list[ProductSource], tmp_path: Path) -> None:
    class Mistaken(Writer):
        """Writes for each group what the other one likes."""

        def generate(self, inputs: Sequence[MllmInput], **options: Any) -> list[list[str]]:
            return [[dpo_world.prompt(scene)] for scene in reversed(dpo_world.TASTES)]

    tuples = read_tuples(build(tmp_path, Mistaken(TEXTS), sources[:1], Truth()))
    liked = [dpo_world.prompt(scene) for scene in dpo_world.TASTES]
    assert [(row.group_id, row.chosen, row.rejected) for row in tuples] == [(0, *liked), (1, *reversed(liked))]


def test_a_killed_run_goes_on_after_the_last_whole_product(sources: list[ProductSource], tmp_path: Path) -> None:
    whole = Writer(TEXTS)
    expected = read_tuples(build(tmp_path, whole, sources, Truth(), work_file=tmp_path / "other.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Writer(TEXTS), sources, Truth(breaks_at="p1"))
    with (tmp_path / "work.jsonl").open("ab") as file:
        file.write(b'{"product_id": "p1", "n_pro')  # killed while it wrote
    again = Writer(TEXTS)
    found = read_tuples(build(tmp_path, again, sources, Truth()))
    assert again.seeds == whole.seeds[1:]
    assert [repr(row) for row in found] == [repr(row) for row in expected]
    assert ArtifactStore(tmp_path / "store").versions("tuples") == [1, 2]


@pytest.mark.parametrize(
    "other",
    [{"seed": 4}, {"made_from": {"mllm": "mllm/v000002"}}, {"settings": SETTINGS.model_copy(update={"n_pairs": 2})}],
)
def test_what_another_run_left_is_not_gone_on_from(
    sources: list[ProductSource], tmp_path: Path, other: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Writer(TEXTS), sources, Truth(breaks_at="p1"))
    again = Writer(TEXTS)
    build(tmp_path, again, sources, Truth(), **other)
    assert len(again.seeds) == 2


def test_without_two_well_formed_prompts_or_a_picture_there_is_no_tuple(
    sources: list[ProductSource], tmp_path: Path
) -> None:
    assert read_tuples(build(tmp_path, Writer(["junk"] * 3 + TEXTS[:1]), sources, Truth())) == []
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    for unusable in (None, str(tmp_path / "missing.png"), str(tmp_path / "empty.png")):
        seen = build(tmp_path, Writer(TEXTS), [replace(sources[0], image_uri=unusable), sources[1]], Truth())
        assert {row.product_id for row in read_tuples(seen)} == {"p1"}


@pytest.mark.parametrize("scores", [[1.0], [float("nan")] * 3, [[1.0, 2.0, 3.0]]])
def test_scores_that_rank_nothing_are_refused(sources: list[ProductSource], tmp_path: Path, scores: Any) -> None:
    class Broken(Truth):
        def score_many(self, audience: Audience, candidates: Sequence[Candidate]) -> Any:
            return scores

    with pytest.raises(ScoresUnusable, match="3 finite numbers"):
        build(tmp_path, Writer(TEXTS), sources, Broken())


@pytest.mark.parametrize(
    ("scores", "n_pairs", "least", "expected"),
    [
        ([0.0, 2.0, 1.0], 1, 0.5, [(1, 0)]),
        ([0.0, 2.0, 1.0], 9, 0.5, [(1, 0)]),
        ([0.0, 3.0, 1.0, 2.0], 2, 0.5, [(1, 0), (3, 2)]),
        ([0.0, 3.0, 1.0, 2.0], 2, 0.8, [(1, 0)]),
        ([1.0, 1.0], 1, 0.5, []),
        ([1.0], 1, 0.5, []),
    ],
)
def test_pairs_go_from_the_ends_inwards(
    scores: list[float], n_pairs: int, least: float, expected: list[tuple[int, int]]
) -> None:
    found = list(rank_pairs(np.array(scores), n_pairs=n_pairs, min_win_probability=least))
    assert [(winner, loser) for winner, loser, _ in found] == expected
    for winner, loser, p_win in found:
        assert p_win == pytest.approx(1 / (1 + np.exp(scores[loser] - scores[winner])))
