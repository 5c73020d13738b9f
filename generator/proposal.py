"""Proposals: which prompts a shifted group should be shown next, and why.

The champion's G-MLLM writes some, where there is one; the rest are words drawn from what the group's clicks say of them
(`generator.word_posterior`), so that one that was never shown gets its chance. Either way the clicks say what CTR is to
be expected of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from generator.occasion import Occasion
from generator.prompt import VOCABULARY, Prompt
from generator.word_posterior import (
    WORDS,
    Floats,
    LookAlike,
    Shown,
    SlotWords,
    WordEffect,
    WordPosterior,
    word_posteriors,
)
from streams.events import ProfileEntry

GRAMMAR: Final = "grammar"
"""Who wrote a prompt whose words were drawn from the group's clicks."""

_DRAWS_PER_PROMPT: Final = 16
_N_PROFILE_WORDS: Final = 4


class Reasons(msgspec.Struct, frozen=True, array_like=True):
    """Why a prompt was proposed: its words, strongest effect first, and the group in words.

    ``lent_share`` is the share of the look-alikes' impressions that was borrowed; 0 where they did not help.
    """

    words: list[WordEffect]
    profile: str
    n_impressions: int
    lent_share: float


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """A prompt for a group, the CTR expected of it there (at the posterior's mode), and why.

    ``deviation`` is that of the log-odds of its CTR, as far as its words make it differ from the group's others;
    ``writer`` is the G-MLLM's artifact, or `GRAMMAR`.
    """

    group_id: int
    prompt: Prompt
    expected_ctr: float
    reasons: Reasons
    deviation: float
    writer: str


def words_of(prompt: Prompt) -> SlotWords:
    """Return a prompt's five slot words, in the vocabulary's order."""
    return tuple(prompt.slots().values())


def profile_in_words(profile: Sequence[ProfileEntry]) -> str:
    """Return a group's profile as a phrase: its strongest traits with their lift."""
    strongest = sorted(profile, key=lambda trait: -trait.lift)[:_N_PROFILE_WORDS]
    phrases = [f"{trait.attribute} {trait.value} (x{trait.lift:.1f})" for trait in strongest]
    return ", ".join(phrases) or "no distinctive trait"


def draw_words(
    posterior: WordPosterior,
    n: int,
    taken: Collection[SlotWords],
    *,
    exploration: float,
    rng: np.random.Generator,
) -> list[SlotWords]:
    """Draw up to ``n`` distinct prompts that are not ``taken``, highest expected CTR first.

    Each is the best one for a draw from the posterior; where draws keep giving what is there already,
    the best by the posterior's mode fill up. There are fewer than ``n`` only when the vocabulary is used up.
    """
    factor = np.linalg.cholesky(posterior.covariance[1:, 1:])
    noise = rng.standard_normal((n * _DRAWS_PER_PROMPT, len(WORDS))) @ factor.T
    draws = posterior.mean[1:] + exploration * noise  # (N, 35)
    chosen: dict[SlotWords, None] = {}
    for draw in draws:
        words = _best_words(draw)
        if words not in taken:
            chosen[words] = None
        if len(chosen) == n:
            break
    if len(chosen) < n:
        for words in _by_mode(posterior):
            if words not in taken:
                chosen[words] = None
            if len(chosen) == n:
                break
    return sorted(chosen, key=lambda words: (-posterior.expected_ctr(words), words))


def _best_words(effects: Floats) -> SlotWords:
    start, words = 0, []
    for allowed in VOCABULARY.values():
        words.append(allowed[int(effects[start : start + len(allowed)].argmax())])
        start += len(allowed)
    return tuple(words)


def _by_mode(posterior: WordPosterior) -> list[SlotWords]:
    """Return every combination of words, best first."""
    start, total = 0, np.zeros(())
    for allowed in VOCABULARY.values():
        total = np.add.outer(total, posterior.mean[1 + start : 1 + start + len(allowed)])
        start += len(allowed)
    order = np.argsort(-total, axis=None, kind="stable")
    places = np.unravel_index(order, total.shape)
    slots = list(VOCABULARY.values())
    return [tuple(slots[slot][place] for slot, place in enumerate(of_slots)) for of_slots in zip(*places, strict=True)]


def propose(
    occasion: Occasion,
    title: str,
    prompts: Mapping[str, Prompt | None],
    look_alikes: Mapping[int, Sequence[LookAlike]],
    *,
    group_ids: Collection[int],
    n_candidates: int,
    exploration: float,
    written: Mapping[int, Sequence[Prompt]] | None = None,
    writer: str = GRAMMAR,
) -> dict[int, list[Proposal]]:
    """Propose prompts for groups of a shifted product, highest expected CTR first; no two groups get the same one.

    The same arguments give the same proposals: draws are seeded by the event's and the group's id.

    Parameters
    ----------
    occasion
        Why, with what each group has clicked since the change.
    title
        The product's title, the prompts' caption.
    prompts
        The product's creatives and their prompts; none of these is proposed again.
    look_alikes
        Similar groups of other products, by group.
    group_ids
        The groups that want prompts; the others only help to estimate how far words matter.
    n_candidates
        Prompts for each group.
    exploration
        Posterior standard deviations of the draws; 0 takes the best known words.
    written, writer
        What a G-MLLM has written for the groups, in its order, and its name. Where that is too few, or there already,
        drawn words fill up.
    """
    shown = {
        group.group_id: [Shown(prompts.get(c.creative_id), c.n_impressions, c.n_clicks) for c in group.creatives]
        for group in occasion.groups
    }
    posteriors = word_posteriors(shown, look_alikes)
    taken = {words_of(prompt) for prompt in prompts.values() if prompt is not None}
    proposals: dict[int, list[Proposal]] = {}
    for group in occasion.groups:
        if group.group_id not in group_ids:
            continue
        posterior = posteriors[group.group_id]
        seed = hashlib.sha256(f"{occasion.event_id}|{group.group_id}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))
        writers = dict.fromkeys(
            [words for prompt in (written or {}).get(group.group_id, ()) if (words := words_of(prompt)) not in taken],
            writer,
        )
        writers = dict(list(writers.items())[:n_candidates])
        taken.update(writers)
        if (n_missing := n_candidates - len(writers)) > 0:
            drawn = draw_words(posterior, n_missing, taken, exploration=exploration, rng=rng)
            taken.update(drawn)
            writers.update(dict.fromkeys(drawn, GRAMMAR))
        n_impressions = sum(creative.n_impressions for creative in group.creatives)
        profile = profile_in_words(group.profile)
        proposals[group.group_id] = []
        for words in sorted(writers, key=lambda words: (-posterior.expected_ctr(words), words)):
            by_slot = dict(zip(VOCABULARY, words, strict=True))
            effects = sorted((posterior.effect(*item) for item in by_slot.items()), key=lambda item: -item.effect)
            proposals[group.group_id].append(
                Proposal(
                    group.group_id,
                    Prompt(caption=title, **by_slot),
                    posterior.expected_ctr(words),
                    Reasons(effects, profile, n_impressions, posterior.lent_share),
                    posterior.deviation(words),
                    writers[words],
                )
            )
    return proposals
