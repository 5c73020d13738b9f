"""With a champion its G-MLLM writes, its GRM ranks, and the creative says so and what it is worth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from generator.champion import Champion
from generator.champion_models import ChampionModels
from generator.comparison import Feature, Floats
from generator.creative_scorer import Audience
from generator.creative_scorer import Candidate as Picture
from generator.prompt import Prompt
from generator.proposal import GRAMMAR
from generator.storage import read_bytes, read_metadata
from streams.codec import encode
from streams.events import CreativeCtr
from tests.generator.bench import REVIEWS, Bench, MakeBench, shift, varied, verdict

CHAMPION = Champion(
    mllm="mllm/v000003", grm="grm/v000002", grm_accuracy=0.7, n_grm_pairs=900, promoted_at_ms=1, reason="better"
)
DARK, BRIGHT = "dramatic side light", "soft daylight"


def prompt(light: str, scene: str = "sunlit beach") -> Prompt:
    return Prompt("the product", scene, "warm", light, "no props", "centred")


class Writes:
    """A writer of known prompts: one for each group, dark first."""

    name = CHAMPION.mllm

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.asked: list[tuple[str, list[int], int]] = []

    def write(
        self, title: str, picture: Image.Image, features: Mapping[int, Feature], *, n_prompts: int, seed: int
    ) -> dict[int, list[Prompt]]:
        self.asked.append((title, list(features), seed))
        return {group_id: [each.named(title) for each in self.prompts] for group_id in features}


class Brighter:
    """A scorer of whom is known what it likes: brightness."""

    name = CHAMPION.grm

    def score_many(self, audience: Audience, candidates: Sequence[Picture]) -> Floats:
        levels = np.array([np.asarray(each.image.convert("L")).mean() for each in candidates], np.float64)
        return (levels - levels.mean()) / 20.0


def promote(bench: Bench, prompts: Sequence[Prompt], scorer: Any = None, shape: tuple[int, int] = (11, 4)) -> Writes:
    """Let a champion write these prompts for every group."""
    writer: Any = Writes(prompts)
    bench.load = lambda champion: ChampionModels(champion, writer, scorer or Brighter(), 0.5, shape)
    bench.pointer.move(CHAMPION)
    return writer


def seen_creative(creative_id: str, n_impressions: int, n_clicks: int) -> CreativeCtr:
    return CreativeCtr(
        creative_id=creative_id, n_impressions=n_impressions, n_clicks=n_clicks, ctr=0, ctr_low=0, ctr_high=0
    )


def brightness(uri: str | None) -> float:
    with Image.open(io.BytesIO(read_bytes(uri or ""))) as image:
        return float(np.asarray(image.convert("L")).mean())


def test_the_g_mllm_writes_and_the_grm_chooses(make_bench: MakeBench) -> None:
    bench = make_bench(n_candidates=2)
    promote(bench, [prompt(DARK), prompt(BRIGHT)])
    (event,) = [shift(groups=shift().groups[:1])]
    (creative,) = bench.start([encode(event)])
    bench.assert_once(1)
    assert Prompt.parse(creative.prompt or "").light == BRIGHT
    assert creative.prompt_writer == CHAMPION.mllm
    metadata = read_metadata(read_bytes(creative.image_uri or ""))
    assert (metadata["prompt_writer"], metadata["prompt"]) == (CHAMPION.mllm, creative.prompt)
    (group,) = bench.record().groups
    by_light = {candidate.proposal.prompt.light: candidate for candidate in group.candidates}
    assert by_light[BRIGHT].creative_id == creative.creative_id
    assert (by_light[DARK].creative_id, by_light[DARK].refused) == (None, None)
    assert (by_light[BRIGHT].log_odds or 0) > (by_light[DARK].log_odds or 0)
    assert creative.prior is None  # the group's creatives have no picture to compare with


def test_the_prior_is_of_what_the_group_knows(make_bench: MakeBench) -> None:
    bench = make_bench(n_candidates=1)
    promote(bench, [prompt(DARK)])
    (known,) = bench.start([encode(shift(groups=shift().groups[:1]))])
    promote(bench, [prompt(BRIGHT)])
    group = shift().groups[0]
    seen = [*group.creatives, seen_creative(known.creative_id, 300, 15)]
    (creative,) = bench.start([encode(shift()), encode(shift("shift-2", groups=[replace(group, creatives=seen)]))])
    assert creative.prior is not None
    assert creative.prior.reward_model == CHAMPION.grm
    assert brightness(creative.image_uri) > brightness(known.image_uri)
    assert creative.prior.relative_ctr > 1.0
    assert creative.prior.n_impressions > 0


@pytest.mark.parametrize("prompts", [[], [varied(0), varied(1), varied(2)]])
def test_where_it_writes_nothing_new_the_grammar_writes_and_says_so(
    make_bench: MakeBench, prompts: list[Prompt]
) -> None:
    bench = make_bench()
    promote(bench, prompts)
    emitted = bench.start([encode(shift())])
    assert {creative.prompt_writer for creative in emitted} == {GRAMMAR}
    assert len(emitted) == 2


def test_without_a_champion_the_grammar_writes(make_bench: MakeBench) -> None:
    emitted = make_bench().start([encode(shift())])
    assert {creative.prompt_writer for creative in emitted} == {GRAMMAR}
    assert {creative.prior for creative in emitted} == {None}


def test_a_group_that_is_no_more_gets_the_grammars_prompts(make_bench: MakeBench) -> None:
    bench = make_bench()
    writer = promote(bench, [prompt(BRIGHT)])
    group = replace(shift().groups[0], group_id=77)
    (creative,) = bench.start([encode(shift(groups=[group]))])
    assert creative.prompt_writer == GRAMMAR
    assert writer.asked == []


def test_what_waits_for_a_person_keeps_its_prior_and_writer(make_bench: MakeBench) -> None:
    bench = make_bench(n_candidates=1, approval="manual")
    promote(bench, [prompt(BRIGHT)])
    bench.start([encode(shift(groups=shift().groups[:1]))])
    (review,) = bench.reviews("waiting")
    assert review.prompt_writer == CHAMPION.mllm
    (creative,) = bench.start([verdict(review.creative_id, "accepted")], topic=REVIEWS)
    assert creative.prompt_writer == CHAMPION.mllm


def test_a_champion_that_reads_other_features_is_not_asked(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench()
    writer = promote(bench, [prompt(BRIGHT)], shape=(11, 128))
    emitted = bench.start([encode(shift())])
    assert {creative.prompt_writer for creative in emitted} == {GRAMMAR}
    assert writer.asked == []
    assert "reads group features of (11, 128), those of product p-1 have [(11, 4)]" in caplog.text


def test_scores_that_rank_nothing_stop_nothing(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Brighter):
        def score_many(self, audience: Audience, candidates: Sequence[Picture]) -> Floats:
            return np.full(len(candidates), np.nan)

    bench = make_bench()
    promote(bench, [prompt(BRIGHT)], scorer=Broken())
    emitted = bench.start([encode(shift())])
    assert len(emitted) == 2
    assert {creative.prior for creative in emitted} == {None}
    assert "grm/v000002 gave the scores" in caplog.text
