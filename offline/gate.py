"""The gate: what a newly trained pair of reward model and policy must pass before it is used.

The reward model has to know held-out pairs, the policy has to write prompts of ours and for groups, and no group's
creatives may be worse than those it gets now.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from generator.comparison import Floats
from generator.composition import EmptyCutout
from generator.creative_scorer import Audience, Candidate, CreativeScorer, GrmScorer, scores_of
from generator.grm import Grm
from generator.mllm import GroupMllm
from generator.prompt import Prompt, is_well_formed
from generator.renderer import Renderer
from generator.settings import MllmSettings
from generator.storage import ImageUnreadable, open_image
from offline.evaluation import AccuracyDifference, PairAccuracy, accuracy_difference, evaluate
from offline.labelled_pair import Pair
from offline.pairs import is_held_out
from offline.pretrain import Pictures, prompt_input
from offline.pretrain_source import GroupSource, ProductSource
from offline.prompt_gate import measure_prompts, refusals
from offline.settings import GroupGateSettings, OfflineSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What a new policy's creatives gain in a group over those of the policy before.

    ``gain`` is in log-odds of being clicked, by a reward model, from ``low`` to ``high`` with simultaneous confidence
    over all groups compared.
    """

    product_id: str
    title: str
    group_id: int
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says: why the new models are refused, which is nothing where they pass, and what was measured."""

    refusals: tuple[str, ...]
    figures: dict[str, float]


def grm_refusals(accuracy: PairAccuracy | None, to_champion: AccuracyDifference | None) -> list[str]:
    """Return why a new reward model must not be used; empty if it may.

    Parameters
    ----------
    accuracy
        What it is worth on held-out pairs; None without any.
    to_champion
        How it compares with the one in use, on the same pairs; None where there is none in use.
    """
    if accuracy is None:
        return ["there is no held-out pair to measure the reward model on"]
    found = []
    if accuracy.accuracy_low <= 0.5:
        found.append(
            f"the reward model names {accuracy.accuracy:.1%} of the held-out winners ({accuracy.accuracy_low:.1%} to "
            f"{accuracy.accuracy_high:.1%}), which may be chance"
        )
    if to_champion is not None and to_champion.high < 0.0:
        found.append(
            f"the reward model names {-to_champion.difference:.1%} fewer of the held-out winners than the champion's "
            f"({-to_champion.high:.1%} to {-to_champion.low:.1%} fewer)"
        )
    return found


def group_refusals(changes: Sequence[GroupChange], settings: GroupGateSettings) -> list[str]:
    """Return which groups would get clearly worse creatives, and by how much; empty if none would."""
    return [
        f"group {change.group_id} of product {change.product_id!r} ({change.title}) would get worse creatives: "
        f"{change.gain:+.2f} log-odds ({change.low:+.2f} to {change.high:+.2f}), "
        f"down to {-settings.max_loss:+.2f} is allowed"
        for change in changes
        if change.high < 0.0 and change.gain < -settings.max_loss
    ]


def gain_interval(before: Floats, after: Floats, *, p_error: float) -> tuple[float, float, float]:
    """Return by how much the mean of scores has risen, with the bounds of Welch's interval.

    Parameters
    ----------
    before, after
        Scores, two or more of each, (n,) and (m,).
    p_error
        Chance that the interval misses the true gain.
    """
    from scipy.stats import t as student

    gain = float(after.mean() - before.mean())
    parts = np.array([before.var(ddof=1) / len(before), after.var(ddof=1) / len(after)])
    error = float(np.sqrt(parts.sum()))
    if error == 0.0:
        return gain, gain, gain
    n_free = parts.sum() ** 2 / (parts**2 / np.array([len(before) - 1, len(after) - 1])).sum()
    reach = float(student.ppf(1.0 - p_error / 2.0, n_free)) * error
    return gain, gain - reach, gain + reach


def compare_policies(
    before: GroupMllm,
    after: GroupMllm,
    products: Sequence[ProductSource],
    renderer: Renderer,
    scorer: CreativeScorer,
    settings: GroupGateSettings,
    generation: MllmSettings,
    *,
    size_px: int,
    seed: int,
) -> list[GroupChange]:
    """Let two policies write prompts for groups, and a scorer compare the pictures; groups with too few are left out.

    Parameters
    ----------
    before, after
        The policies.
    products
        The products whose groups are compared, whole ones up to ``n_groups``, at least one.
    renderer, scorer
        What draws, and what ranks.
    settings, generation
        How many prompts there are, and how they are drawn.
    size_px
        Side of the pictures, pixels.
    seed
        Seed of prompts and pictures.
    """
    chosen: list[ProductSource] = []
    for product in sorted(products, key=lambda each: hashlib.sha256(f"{seed}\0{each.product_id}".encode()).digest()):
        if chosen and sum(len(each.groups) for each in [*chosen, product]) > settings.n_groups:
            break
        chosen.append(product)
    n_compared = sum(len(product.groups) for product in chosen)
    found = []
    for product in chosen:
        for group, scores in _scored(before, after, product, renderer, scorer, settings, generation, size_px, seed):
            old, new = scores
            if min(len(old), len(new)) >= 2:
                bounds = gain_interval(old, new, p_error=settings.p_false_alarm / n_compared)
                found.append(GroupChange(product.product_id, product.title, group.group_id, *bounds))
    return found


def _scored(
    before: GroupMllm,
    after: GroupMllm,
    product: ProductSource,
    renderer: Renderer,
    scorer: CreativeScorer,
    settings: GroupGateSettings,
    generation: MllmSettings,
    size_px: int,
    seed: int,
) -> list[tuple[GroupSource, tuple[Floats, Floats]]]:
    """Return each group's scores of the well-formed prompts of either policy."""
    if product.picture_uri is None:
        return []
    try:
        cutout = open_image(product.picture_uri)
    except ImageUnreadable as error:
        log.warning("product %r: %s: its groups are not compared", product.product_id, error)
        return []
    written = [_write(policy, product, settings, generation, seed) for policy in (before, after)]
    images: dict[str, Image.Image] = {}
    try:
        for text in dict.fromkeys(text for of_policy in written for of_group in of_policy for text in of_group):
            drawn = Prompt.parse(text).named(product.title).text
            images[text] = renderer.render(cutout, drawn, seed=seed, size_px=size_px).image
    except EmptyCutout as error:
        log.warning("product %r: %s: its groups are not compared", product.product_id, error)
        return []
    found = []
    for group, old, new in zip(product.groups, *written, strict=True):
        texts = list(dict.fromkeys([*old, *new]))
        audience = Audience(product.product_id, product.title, group.group_id, group.feature)
        scores = dict(
            zip(texts, scores_of(scorer, audience, [Candidate(text, images[text]) for text in texts]), strict=True)
        )
        found.append((group, (np.array([scores[text] for text in old]), np.array([scores[text] for text in new]))))
    return found


def _write(
    policy: GroupMllm, product: ProductSource, settings: GroupGateSettings, generation: MllmSettings, seed: int
) -> list[list[str]]:
    """Return the well-formed prompts that a policy writes for each group of a product."""
    pictures = Pictures.of(policy)
    answers = policy.generate(
        [prompt_input(product, group.feature, pictures) for group in product.groups],
        max_new_tokens=generation.max_new_tokens,
        n_samples=settings.n_prompts,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=seed,
        batch_size=64,
    )
    return [[text for text in of_group if is_well_formed(text)] for of_group in answers]


def accuracy_figures(accuracy: PairAccuracy) -> dict[str, float]:
    """Return what an evaluation on held-out pairs found, as figures of a manifest."""
    return {
        "n_held_out": accuracy.n_pairs,
        "accuracy": accuracy.accuracy,
        "accuracy_low": accuracy.accuracy_low,
        "accuracy_high": accuracy.accuracy_high,
        "order_inconsistency": accuracy.order_inconsistency,
        "log_loss": accuracy.log_loss,
        "calibration_error": accuracy.calibration_error,
    }


def hold_against(
    *,
    before: GroupMllm,
    after: GroupMllm,
    judge: Grm,
    judge_name: str,
    champion_judge: Grm | None,
    held_out: Sequence[Pair],
    sources: Sequence[ProductSource],
    renderer: Renderer,
    settings: OfflineSettings,
    generation: MllmSettings,
    seed: int,
) -> Verdict:
    """Measure newly trained models beside what is in use, and say what speaks against them.

    Parameters
    ----------
    before, after
        The policy in use, and the new one.
    judge, judge_name
        The new reward model, and its artifact.
    champion_judge
        The reward model in use; None where there is none.
    held_out
        Pairs that neither reward model learnt from.
    sources, renderer
        The products, and who draws.
    settings, generation
        What is demanded, and how prompts are drawn from the models.
    seed
        Seed of prompts and pictures.
    """
    accuracy = evaluate(judge, held_out) if held_out else None
    to_champion = None
    if champion_judge is not None and held_out:
        to_champion = accuracy_difference(judge, champion_judge, held_out)
    with_group = settings.group_dpo.with_group
    prompts_before, prompts_after = (
        measure_prompts(
            policy,
            sources,
            generation,
            n_groups=settings.prompt_gate.n_groups,
            with_group=with_group,
            seed=seed,
            pictures=Pictures.of(policy),
        )
        for policy in (before, after)
    )
    changes = compare_policies(
        before,
        after,
        unseen(sources, settings),
        renderer,
        GrmScorer(judge, judge_name),
        settings.group_gate,
        generation,
        size_px=settings.tuples.size_px,
        seed=seed,
    )
    figures = {} if accuracy is None else accuracy_figures(accuracy)
    if to_champion is not None:
        figures |= {
            "accuracy_gain": to_champion.difference,
            "accuracy_gain_low": to_champion.low,
            "accuracy_gain_high": to_champion.high,
        }
    figures |= {
        "p_well_formed_before": prompts_before.drawn.p_well_formed,
        "p_well_formed": prompts_after.drawn.p_well_formed,
        "p_group_specific": prompts_after.p_group_specific,
        "n_choices": prompts_after.n_choices,
        "n_groups_compared": len(changes),
    }
    if changes:
        figures |= {
            "log_odds_gain": float(np.mean([change.gain for change in changes])),
            "worst_log_odds_gain": min(change.gain for change in changes),
        }
    refused = [
        *grm_refusals(accuracy, to_champion),
        *refusals(prompts_before, prompts_after, settings.prompt_gate, with_group=with_group),
        *group_refusals(changes, settings.group_gate),
    ]
    return Verdict(tuple(refused), figures)


def unseen(sources: Sequence[ProductSource], settings: OfflineSettings) -> list[ProductSource]:
    """Return the products that neither reward model nor alignment learnt from; all of them where there is none."""
    share = settings.group_dpo.held_out_share
    if settings.held_out_by == "product":
        share = min(share, settings.held_out_share)
    found = [product for product in sources if is_held_out(product.product_id, share)]
    if not found:
        log.warning("no product with groups is held out: the gate compares groups that were learnt from")
    return found or list(sources)
