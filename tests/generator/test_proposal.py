"""Proposals follow the clicks, try what was never shown, and never repeat what is there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.look_alikes import find_look_alikes
from generator.occasion import occasion_of_shift
from generator.prompt import VOCABULARY, Prompt
from generator.proposal import GRAMMAR, Proposal, draw_words, profile_in_words, propose, words_of
from generator.word_posterior import LookAlike, Shown, word_posteriors
from state.records import GroupRecord, ProductGroups
from streams.events import CreativeCtr, GroupsShifted, ProfileEntry, ShiftedGroup

TITLE = "Red kettle"
N_SHOWN = 8


def prompt_of(**slots: str) -> Prompt:
    words = {slot: allowed[0] for slot, allowed in VOCABULARY.items()}
    return Prompt(caption=TITLE, **{**words, **slots})


def varied(number: int) -> Prompt:
    """Return the number-th of eight prompts that vary every word."""
    return Prompt(
        caption=TITLE,
        **{slot: allowed[(number * step) % len(allowed)] for step, (slot, allowed) in enumerate(VOCABULARY.items(), 1)},
    )


PROMPTS: dict[str, Prompt | None] = {f"c{number}": varied(number) for number in range(N_SHOWN)}


def shift(ctrs: Mapping[int, Mapping[str, float]], *, n: int = 400, event_id: str = "shift-1") -> GroupsShifted:
    """Return a shift in which group g clicked creative c with ``ctrs[g][c]``; 0.03 where nothing is said."""
    return GroupsShifted(
        event_id=event_id,
        product_id="p-1",
        detected_at_ms=1_000,
        encoder_version=1,
        statistic=50.0,
        threshold=40.0,
        n_impressions_since_change=n,
        groups=[
            ShiftedGroup(
                group_id=group_id,
                share=1 / len(ctrs),
                profile=[ProfileEntry(attribute="age", value="18-20", share=0.4, lift=2.5)],
                creatives=[
                    CreativeCtr(
                        creative_id=creative_id,
                        n_impressions=n,
                        n_clicks=round(n * of_group.get(creative_id, 0.03)),
                        ctr=0.0,
                        ctr_low=0.0,
                        ctr_high=0.0,
                    )
                    for creative_id in PROMPTS
                ],
            )
            for group_id, of_group in ctrs.items()
        ],
    )


def proposals_of(
    event: GroupsShifted,
    *,
    n: int = 4,
    exploration: float = 0.25,
    written: Mapping[int, Sequence[Prompt]] | None = None,
) -> dict[int, list[Proposal]]:
    return propose(
        occasion_of_shift(event),
        TITLE,
        PROMPTS,
        {},
        group_ids=[group.group_id for group in event.groups],
        n_candidates=n,
        exploration=exploration,
        written=written,
        writer="mllm/v000001",
    )


def shown_with(likes: Mapping[str, float], n: int, *, base: float = 0.04) -> list[Shown]:
    """Return the eight prompts as a group has seen them that likes some words, by effects in logits."""
    found = []
    for prompt in PROMPTS.values():
        assert prompt is not None
        logit = np.log(base / (1 - base)) + sum(likes.get(word, 0.0) for word in words_of(prompt))
        found.append(Shown(prompt, n, n / (1 + np.exp(-logit))))
    return found


@pytest.mark.parametrize("creative_id", list(PROMPTS))
def test_words_with_a_high_ctr_win(creative_id: str) -> None:
    liked = PROMPTS[creative_id]
    assert liked is not None
    best = proposals_of(shift({0: {creative_id: 0.15}}), exploration=0)[0][0]
    assert best.prompt.scene == liked.scene
    assert sum(a == b for a, b in zip(words_of(best.prompt), words_of(liked), strict=True)) >= 3
    assert best.expected_ctr > 0.05
    top = best.reasons.words[0]
    assert top.effect > 0
    assert (top.slot, top.word) in liked.slots().items()
    assert top.n_impressions >= 400


def test_words_with_a_low_ctr_are_avoided() -> None:
    event = shift({0: dict.fromkeys(PROMPTS, 0.08) | {"c2": 0.0, "c5": 0.0}})
    avoided = {PROMPTS["c2"].scene, PROMPTS["c5"].scene}  # type: ignore[union-attr]
    assert not avoided & {proposal.prompt.scene for proposal in proposals_of(event, exploration=0)[0]}


def test_groups_with_opposite_evidence_get_different_scenes() -> None:
    found = proposals_of(shift({3: {"c1": 0.15, "c6": 0.001}, 7: {"c1": 0.001, "c6": 0.15}}))
    scenes = {group_id: {proposal.prompt.scene for proposal in of_group} for group_id, of_group in found.items()}
    assert found[3][0].prompt.scene == PROMPTS["c1"].scene  # type: ignore[union-attr]
    assert found[7][0].prompt.scene == PROMPTS["c6"].scene  # type: ignore[union-attr]
    assert not scenes[3] & scenes[7]


def test_the_posterior_finds_the_effects_that_made_the_counts() -> None:
    likes = {varied(1).scene: 0.9, varied(4).scene: -0.9}
    posterior = word_posteriors({0: shown_with(likes, 4_000)}, {})[0]
    shown = [words_of(prompt) for prompt in PROMPTS.values() if prompt is not None]
    for words, seen in zip(shown, shown_with(likes, 4_000), strict=True):
        assert posterior.expected_ctr(words) == pytest.approx(seen.n_clicks / seen.n_impressions, rel=0.08)


def test_effects_shrink_with_little_evidence() -> None:
    word = varied(1).scene
    effects = [
        word_posteriors({0: shown_with({word: 0.9}, n)}, {})[0].effect("scene", word) for n in (5, 50, 500, 5_000)
    ]
    assert all(a.effect < b.effect for a, b in itertools.pairwise(effects))
    assert effects[0].effect < 0.1
    unseen = word_posteriors({0: shown_with({}, 500)}, {})[0].effect("scene", VOCABULARY["scene"][-1])
    assert (unseen.effect, unseen.n_impressions) == (0.0, 0)


def test_words_never_seen_are_tried_now_and_then() -> None:
    seen = {prompt.scene for prompt in PROMPTS.values() if prompt is not None}
    first = [
        proposals_of(shift({0: {"c1": 0.06}}, n=60, event_id=f"shift-{number}"))[0][0].prompt.scene
        for number in range(40)
    ]
    n_new = sum(scene not in seen for scene in first)
    assert 1 <= n_new <= 30


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1)), min_size=N_SHOWN, max_size=N_SHOWN),
    st.integers(1, 12),
    st.floats(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_prompts_are_new_distinct_and_ordered(counts: list[tuple[int, float]], n: int, exploration: float) -> None:
    shown = [Shown(PROMPTS[f"c{i}"], n_i, n_i * ctr) for i, (n_i, ctr) in enumerate(counts)]
    taken = {words_of(prompt) for prompt in PROMPTS.values() if prompt is not None}
    posterior = word_posteriors({0: shown}, {})[0]
    drawn = draw_words(posterior, n, taken, exploration=exploration, rng=np.random.default_rng(0))
    assert len(drawn) == len(set(drawn)) == n
    assert not taken & set(drawn)
    expected = [posterior.expected_ctr(words) for words in drawn]
    assert all(0 <= ctr <= 1 for ctr in expected)
    assert expected == sorted(expected, reverse=True)


def test_the_vocabulary_can_be_used_up() -> None:
    posterior = word_posteriors({0: []}, {})[0]
    every = list(itertools.product(*VOCABULARY.values()))
    rng = np.random.default_rng(0)
    assert draw_words(posterior, 3, set(every[1:]), exploration=1, rng=rng) == [every[0]]
    assert draw_words(posterior, 3, set(every), exploration=1, rng=rng) == []


def test_the_same_event_gives_the_same_proposals_and_another_event_others() -> None:
    ctrs = {0: {"c1": 0.05}, 1: {"c2": 0.05}}
    first = proposals_of(shift(ctrs, n=50))
    assert first == proposals_of(shift(ctrs, n=50))
    assert first != proposals_of(shift(ctrs, n=50, event_id="shift-2"))


def test_reasons_name_the_profile_and_the_evidence() -> None:
    reasons = proposals_of(shift({0: {"c1": 0.1}}))[0][0].reasons
    assert reasons.profile == "age 18-20 (x2.5)"
    assert reasons.n_impressions == 400 * N_SHOWN
    assert [word.effect for word in reasons.words] == sorted((w.effect for w in reasons.words), reverse=True)
    assert {word.slot for word in reasons.words} == set(VOCABULARY)
    assert profile_in_words([]) == "no distinctive trait"


def test_what_is_written_is_proposed_unless_it_is_there_already_and_drawn_words_fill_up() -> None:
    new = [prompt_of(scene=scene, prop="confetti", light="golden hour") for scene in VOCABULARY["scene"]][:3]
    there = PROMPTS["c3"]
    assert there is not None
    written = {0: [there, new[0], new[0]], 1: [new[0], new[1], new[2]]}
    found = proposals_of(shift({0: {}, 1: {}}), n=2, written=written)
    writers = [{each.prompt: each.writer for each in of_group} for of_group in found.values()]
    assert writers[0].pop(new[0]) == "mllm/v000001"
    assert list(writers[0].values()) == [GRAMMAR]
    assert writers[1] == {new[1]: "mllm/v000001", new[2]: "mllm/v000001"}
    assert all(each.deviation > 0 for of_group in found.values() for each in of_group)


def test_creatives_without_a_prompt_say_nothing_about_words() -> None:
    posterior = word_posteriors({0: [Shown(None, 500, 20), Shown(None, 500, 90)]}, {})[0]
    assert not posterior.mean[1:].any()
    assert posterior.expected_ctr(words_of(varied(0))) == pytest.approx(0.11, abs=0.005)


def full_table(likes: Mapping[str, float], n: int) -> list[Shown]:
    """Return what a look-alike saw: every scene with other words varied."""
    found = []
    for number, scene in enumerate(VOCABULARY["scene"]):
        prompt = Prompt(caption="other", **{**varied(number).slots(), "scene": scene})
        logit = -3.0 + sum(likes.get(word, 0.0) for word in words_of(prompt))
        found.append(Shown(prompt, n, n / (1 + np.exp(-logit))))
    return found


@pytest.mark.parametrize(("sign", "borrows"), [(1.0, True), (-1.0, False)])
def test_look_alikes_count_only_where_they_agree(sign: float, borrows: bool) -> None:
    unseen = next(
        s for s in VOCABULARY["scene"] if s not in {prompt.scene for prompt in PROMPTS.values() if prompt is not None}
    )
    tastes = {varied(1).scene: 1.2, varied(4).scene: -1.2, varied(6).scene: 0.8}
    own = shown_with(tastes, 150)
    others = {word: sign * effect for word, effect in tastes.items()} | {unseen: 1.5}
    posterior = word_posteriors({0: own}, {0: [LookAlike(0.9, full_table(others, 2_000))]})[0]
    assert (posterior.lent_share > 0) is borrows
    assert (posterior.effect("scene", unseen).effect > 0.4) is borrows


def groups_of(product_id: str, centroids: Sequence[Sequence[float]], *, version: int = 1) -> ProductGroups:
    records = [
        GroupRecord(i, 1 / len(centroids), 10, np.tile(np.asarray(c, np.float32), (11, 1)).tobytes(), [], 0)
        for i, c in enumerate(centroids)
    ]
    return ProductGroups(product_id, version, records, len(records), {}, None, True, 0, [], {})


def test_a_group_that_has_seen_nothing_starts_from_its_look_alikes() -> None:
    liked = varied(2).scene
    alike = {0: [LookAlike(0.9, full_table({liked: 1.2}, 2_000))]}
    lent, alone = word_posteriors({0: []}, alike)[0], word_posteriors({0: []}, {})[0]
    assert (lent.lent_share, alone.lent_share) == (0.3, 0.0)
    assert lent.effect("scene", liked).effect > 0.3 > 0.0 == alone.effect("scene", liked).effect
    words = words_of(varied(2))
    assert alone.expected_ctr(words) == pytest.approx(0.05)
    assert lent.expected_ctr(words) > alone.expected_ctr(words)
    assert lent.deviation(words) < alone.deviation(words)


def test_look_alikes_are_alike_in_what_sets_them_apart() -> None:
    own = groups_of("p-1", [[10, 1, 0], [10, -1, 0]])
    others = [
        groups_of("p-2", [[10, 2, 0], [10, -2, 0]]),
        groups_of("p-3", [[-5, 0, 1], [-5, 0, -1]]),  # differs along another direction
        groups_of("p-4", [[10, 1, 0], [10, -1, 0]], version=2),  # another encoder
        groups_of("p-5", [[10, 1, 0]]),  # a single group differs from nobody
        own,
    ]
    for group_id in (0, 1):
        ((product_id, other_id, similarity),) = find_look_alikes(group_id, own, others, 5)
        assert (product_id, other_id) == ("p-2", group_id)
        assert similarity == pytest.approx(1.0)
    assert find_look_alikes(9, own, others, 5) == []
    assert find_look_alikes(0, own, others, 0) == []
