"""Proposals: which prompts a shifted group should be shown next, and why.

Every creative that the group has seen since the change says something about the five slot words of its
prompt. A logistic model adds the words' effects up, each pulled towards zero as strongly as the product's
groups together suggest (empirical Bayes); groups of other products may lend their clicks where they predict
this group's. Words are then drawn from the posterior, so that one that was never shown gets its chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from generator.prompt import VOCABULARY, Prompt
from state.records import ProductGroups
from streams.events import GroupsShifted, ProfileEntry

Floats = npt.NDArray[np.float64]
SlotWords = tuple[str, ...]
"""The five words of a prompt, in the vocabulary's order."""

WORDS: Final[tuple[tuple[str, str], ...]] = tuple((slot, word) for slot in VOCABULARY for word in VOCABULARY[slot])
"""Every (slot, word), in the order of the effects."""

_COLUMN: Final = {slot_word: column for column, slot_word in enumerate(WORDS)}
_SPREADS: Final = (0.1, 0.2, 0.4, 0.8)  # standard deviations of a word's effect that are tried, in logits
_TYPICAL_SPREAD: Final = 0.4  # a word moves a CTR by a factor of 1.5: where the evidence does not say otherwise
_SPREAD_OF_LOG: Final = 0.7
_LENT: Final = (0.1, 0.3, 1.0)  # shares of the look-alikes' impressions that are tried
_MIN_GAIN_NATS: Final = 1.0  # what borrowing must add to the log evidence of the group's own clicks
_BASE_SPREAD: Final = 0.5  # of a group's base rate about its mean CTR, in logits
_DRAWS_PER_PROMPT: Final = 16
_MIN_SIMILARITY: Final = 0.2
_N_PROFILE_WORDS: Final = 4


class WordEffect(msgspec.Struct, frozen=True, array_like=True):
    """What a group makes of a slot word.

    ``effect`` is on the logit of the CTR with its standard ``deviation``; ``n_impressions`` are the group's own of
    creatives with that word since the change, 0 for one that it has not seen.
    """

    slot: str
    word: str
    effect: float
    deviation: float
    n_impressions: int


class Reasons(msgspec.Struct, frozen=True, array_like=True):
    """Why a prompt was proposed: its words, strongest effect first, and the group in words.

    ``lent_share`` is the share of the look-alikes' impressions that was borrowed; 0 where they did not help.
    """

    words: list[WordEffect]
    profile: str
    n_impressions: int
    lent_share: float


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """A prompt for a group, the CTR expected of it there (at the posterior's mode), and why."""

    group_id: int
    prompt: Prompt
    expected_ctr: float
    reasons: Reasons


@dataclass(frozen=True)
class Shown:
    """A creative that a group has seen: its prompt, where it has one, and the counts."""

    prompt: Prompt | None
    n_impressions: float
    n_clicks: float


@dataclass(frozen=True)
class LookAlike:
    """A group of another product: how similar it is, in (0, 1], and what it has seen."""

    similarity: float
    shown: Sequence[Shown]


@dataclass(frozen=True)
class WordPosterior:
    """What is known of a group's words: a normal posterior of the base rate and the 35 effects.

    ``mean`` is (36,), the base rate first, in logits; ``covariance`` (36, 36).
    """

    mean: Floats
    covariance: Floats
    n_impressions: Floats
    lent_share: float

    def expected_ctr(self, words: SlotWords) -> float:
        """Return the CTR of a prompt at the posterior's mode."""
        columns = [1 + _COLUMN[slot_word] for slot_word in zip(VOCABULARY, words, strict=True)]
        return float(_sigmoid(self.mean[0] + self.mean[columns].sum()))

    def effect(self, slot: str, word: str) -> WordEffect:
        """Return what is known of one word."""
        column = _COLUMN[slot, word]
        deviation = float(np.sqrt(self.covariance[1 + column, 1 + column]))
        return WordEffect(slot, word, float(self.mean[1 + column]), deviation, int(self.n_impressions[column]))


@dataclass(frozen=True)
class _Rows:
    """Counts as the rows of a regression: words (R, 35), impressions and clicks (R,), base rates in logits (R,)."""

    words: Floats
    n_impressions: Floats
    n_clicks: Floats
    base: Floats


def words_of(prompt: Prompt) -> SlotWords:
    """Return a prompt's five slot words, in the vocabulary's order."""
    return tuple(prompt.slots().values())


def profile_in_words(profile: Sequence[ProfileEntry]) -> str:
    """Return a group's profile as a phrase: its strongest traits with their lift."""
    strongest = sorted(profile, key=lambda trait: -trait.lift)[:_N_PROFILE_WORDS]
    phrases = [f"{trait.attribute} {trait.value} (x{trait.lift:.1f})" for trait in strongest]
    return ", ".join(phrases) or "no distinctive trait"


def find_look_alikes(
    group_id: int, own: ProductGroups, others: Sequence[ProductGroups], n_most: int
) -> list[tuple[str, int, float]]:
    """Return the groups of other products most like one of ours: (product id, group id, cosine similarity).

    A group stands for its centroid (the first row of its group feature, Eq. 6) less the mean centroid of its
    product: what sets its members apart from the product's other users. Only groups of the same encoder
    version can be compared, and only those of at least 0.2 are returned.
    """
    target = _directions(own).get(group_id)
    if target is None:
        return []
    found: list[tuple[str, int, float]] = []
    for groups in others:
        if groups.product_id == own.product_id or groups.encoder_version != own.encoder_version:
            continue
        for other_id, direction in _directions(groups).items():
            if len(direction) == len(target) and (similarity := float(direction @ target)) >= _MIN_SIMILARITY:
                found.append((groups.product_id, other_id, min(similarity, 1.0)))
    return sorted(found, key=lambda item: (-item[2], item[0], item[1]))[:n_most]


def _directions(groups: ProductGroups) -> dict[int, Floats]:
    """Return each group's centroid less the product's mean, at length 1; a product of one group has none."""
    if len(groups.groups) < 2:
        return {}
    features = [np.frombuffer(group.feature, np.float32).reshape(11, -1) for group in groups.groups]
    centroids = np.stack([feature[0] for feature in features]).astype(np.float64)  # (G, D)
    shares = np.array([max(group.share, 1e-6) for group in groups.groups])
    centred = centroids - shares @ centroids / shares.sum()
    lengths = np.linalg.norm(centred, axis=1)
    return {
        group.group_id: centred[row] / lengths[row] for row, group in enumerate(groups.groups) if lengths[row] > 1e-9
    }


def word_posteriors(
    shown: Mapping[int, Sequence[Shown]], look_alikes: Mapping[int, Sequence[LookAlike]]
) -> dict[int, WordPosterior]:
    """Estimate what every group of a product makes of every slot word.

    Binomial counts, effects normal around zero; posteriors by Laplace's method. The spread of the effects is that
    under which the counts of all groups together are most probable. Look-alikes make a power prior: their impressions
    count by similarity times a share, and the share is that under which the group's own clicks are most probable; it
    is 0 unless that is better by 1 nat, because after a change of tastes those who were alike need not be.

    Parameters
    ----------
    shown
        What each group has seen since the change.
    look_alikes
        Similar groups of other products, by group; a group may have none.
    """
    rows = {group_id: _rows(of_group) for group_id, of_group in shown.items()}
    n_words = len(WORDS)

    def own_fit(group_id: int, mean: Floats, precision: Floats) -> tuple[Floats, Floats, float]:
        own = rows[group_id]
        design = np.column_stack([np.ones(len(own.base)), own.words])  # (R, 36)
        full = np.zeros((1 + n_words, 1 + n_words))
        full[0, 0], full[1:, 1:] = _BASE_SPREAD**-2, precision
        return _laplace(design, own.n_impressions, own.n_clicks, own.base, np.r_[0.0, mean], full)

    zero, eye = np.zeros(n_words), np.eye(n_words)

    def log_evidence(spread: float) -> float:
        prior = -0.5 * (np.log(spread / _TYPICAL_SPREAD) / _SPREAD_OF_LOG) ** 2
        return float(prior + sum(own_fit(group_id, zero, eye / spread**2)[2] for group_id in rows))

    spread = max(_SPREADS, key=log_evidence)
    posteriors = {}
    for group_id, own in rows.items():
        best = own_fit(group_id, zero, eye / spread**2)
        lent, needed = 0.0, best[2] + _MIN_GAIN_NATS
        others = [(_rows(other.shown), other.similarity) for other in look_alikes.get(group_id, ())]
        for share in _LENT if others else ():
            mean, precision = _lent_prior(others, share, eye / spread**2)
            fit = own_fit(group_id, mean, precision)
            if fit[2] > needed:
                best, lent, needed = fit, share, fit[2]
        base = own.base[0] if len(own.base) else _logit(0.5)
        mode = best[0].copy()
        mode[0] += base
        covariance = np.asarray(np.linalg.inv(best[1]), dtype=np.float64)
        posteriors[group_id] = WordPosterior(mode, covariance, own.n_impressions @ own.words, lent)
    return posteriors


def _lent_prior(others: list[tuple[_Rows, float]], share: float, precision: Floats) -> tuple[Floats, Floats]:
    weights = np.concatenate([np.full(len(rows.base), similarity * share) for rows, similarity in others])
    fit = _laplace(
        np.concatenate([rows.words for rows, _ in others]),
        weights * np.concatenate([rows.n_impressions for rows, _ in others]),
        weights * np.concatenate([rows.n_clicks for rows, _ in others]),
        np.concatenate([rows.base for rows, _ in others]),
        np.zeros(len(precision)),
        precision,
    )
    return fit[0], fit[1]


def _rows(shown: Sequence[Shown]) -> _Rows:
    words = np.zeros((len(shown), len(WORDS)))
    for row, creative in enumerate(shown):
        if creative.prompt is not None:
            for slot_word in creative.prompt.slots().items():
                words[row, _COLUMN[slot_word]] = 1.0
    n_impressions = np.array([max(creative.n_impressions, 0.0) for creative in shown], dtype=np.float64)
    n_clicks = np.clip(np.array([creative.n_clicks for creative in shown], dtype=np.float64), 0.0, n_impressions)
    ctr = (n_clicks.sum() + 0.5) / (n_impressions.sum() + 1.0)
    return _Rows(words, n_impressions, n_clicks, np.full(len(shown), _logit(ctr)))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def _sigmoid(x: Floats | float) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40, 40))))


def _laplace(
    design: Floats, n_impressions: Floats, n_clicks: Floats, offset: Floats, mean: Floats, precision: Floats
) -> tuple[Floats, Floats, float]:
    """Return the mode (P,), the precision there (P, P) and the log evidence of a binomial model, by Newton steps.

    The log evidence leaves out the binomial coefficients, which are the same for every prior.
    """

    def log_posterior(at: Floats) -> float:
        x = np.clip(offset + design @ at, -40, 40)
        away = at - mean
        return float(n_clicks @ x - n_impressions @ np.logaddexp(0, x) - 0.5 * away @ precision @ away)

    mode, value = mean.copy(), log_posterior(mean)
    hessian = precision
    for _ in range(30):
        p = _sigmoid(offset + design @ mode)
        hessian = precision + (design * (n_impressions * p * (1 - p))[:, None]).T @ design
        gradient = design.T @ (n_clicks - n_impressions * p) - precision @ (mode - mean)
        step = np.linalg.solve(hessian, gradient)
        if float(np.abs(step).max(initial=0.0)) < 1e-8:
            break
        # The objective is concave, so halving a step that overshoots always ends.
        scale, new_value = 1.0, log_posterior(mode + step)
        while new_value < value and scale > 1e-6:
            scale /= 2
            new_value = log_posterior(mode + scale * step)
        mode, value = mode + scale * step, new_value
    evidence = value + 0.5 * (float(np.linalg.slogdet(precision)[1]) - float(np.linalg.slogdet(hessian)[1]))
    return mode, hessian, evidence


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
    event: GroupsShifted,
    title: str,
    prompts: Mapping[str, Prompt | None],
    look_alikes: Mapping[int, Sequence[LookAlike]],
    *,
    group_ids: Collection[int],
    n_candidates: int,
    exploration: float,
) -> dict[int, list[Proposal]]:
    """Propose prompts for groups of a shifted product, best first; no two groups get the same one.

    The same arguments give the same proposals: draws are seeded by the event's and the group's id.

    Parameters
    ----------
    event
        The shift, with what each group has clicked since the change.
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
    """
    shown = {
        group.group_id: [Shown(prompts.get(c.creative_id), c.n_impressions, c.n_clicks) for c in group.creatives]
        for group in event.groups
    }
    posteriors = word_posteriors(shown, look_alikes)
    taken = {words_of(prompt) for prompt in prompts.values() if prompt is not None}
    proposals: dict[int, list[Proposal]] = {}
    for group in event.groups:
        if group.group_id not in group_ids:
            continue
        posterior = posteriors[group.group_id]
        seed = hashlib.sha256(f"{event.event_id}|{group.group_id}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))
        drawn = draw_words(posterior, n_candidates, taken, exploration=exploration, rng=rng)
        taken.update(drawn)
        n_impressions = sum(creative.n_impressions for creative in group.creatives)
        profile = profile_in_words(group.profile)
        proposals[group.group_id] = []
        for words in drawn:
            by_slot = dict(zip(VOCABULARY, words, strict=True))
            effects = sorted((posterior.effect(*item) for item in by_slot.items()), key=lambda item: -item.effect)
            proposals[group.group_id].append(
                Proposal(
                    group.group_id,
                    Prompt(caption=title, **by_slot),
                    posterior.expected_ctr(words),
                    Reasons(effects, profile, n_impressions, posterior.lent_share),
                )
            )
    return proposals
