"""Simulated CTR of the prompts that a G-MLLM writes for groups, and what one G-MLLM's gain on another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from benchmarks.reward import GroupTruth
from generator.mllm import GroupMllm
from generator.prompt import Prompt, PromptNotUnderstood, is_well_formed
from generator.settings import MllmSettings
from offline.pretrain import Pictures, prompt_input
from offline.pretrain_source import ProductSource
from simulator.world import N_STYLE_DIMS, style_of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CreativeCtr:
    """What the prompts of a G-MLLM are clicked.

    ``by_product`` is the true CTR of each product, (P,): the mean over its users, each of whom sees the prompts of
    their group. ``p_own_direction`` is the share of ordered pairs of a product's groups of which the first clicks its
    own prompts more than the other's; equal prompts count a half.
    """

    by_product: Floats
    p_well_formed: float
    p_own_direction: float

    @property
    def ctr(self) -> float:
        """The mean over the products."""
        return float(self.by_product.mean())


@dataclass(frozen=True)
class Uplift:
    """A relative gain in CTR, with a 95% interval from a bootstrap over products."""

    uplift: float
    low: float
    high: float


def creative_ctr(
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    truth: GroupTruth,
    generation: MllmSettings,
    *,
    n_prompts: int,
    with_group: bool,
    seed: int,
) -> CreativeCtr:
    """Let a G-MLLM write prompts for all groups of some products, and return what the simulator's users click of them.

    The renderer draws what a prompt says, and users like a picture by the prompt's words: nothing is rendered here.

    Parameters
    ----------
    mllm
        Who writes.
    sources
        The products.
    truth
        What their groups click.
    generation
        How prompts are drawn.
    n_prompts
        Prompts for each group, over which the mean is taken.
    with_group
        Whether prompts are asked for each group, or once for all of a product's shoppers.
    seed
        Seed of the draws.
    """
    pictures = Pictures.of(mllm)
    asked = [
        prompt_input(product, feature, pictures)
        for product in sources
        for feature in ([group.feature for group in product.groups] if with_group else [None])
    ]
    answers = iter(
        mllm.generate(
            asked,
            max_new_tokens=generation.max_new_tokens,
            n_samples=n_prompts,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=seed,
            batch_size=64,
        )
    )
    ctrs, own, n_well_formed = [], [], 0
    for product in sources:
        written = [next(answers) for _ in product.groups] if with_group else [next(answers)] * len(product.groups)
        n_well_formed += sum(is_well_formed(text) for texts in written for text in texts)
        styles = np.stack([_style(text) for texts in written for text in texts])  # (G * n_prompts, 8)
        clicked = np.stack(
            [
                truth.ctrs(product.product_id, group.feature, styles).reshape(len(product.groups), -1).mean(axis=1)
                for group in product.groups
            ]
        )  # (G, G): what the group of the row clicks of the prompts of the column's
        n_users = [truth.n_users(product.product_id, group.feature) for group in product.groups]
        ctrs.append(np.average(clicked.diagonal(), weights=n_users))
        own += [np.sign(clicked[a, a] - clicked[a, b]) for a, b in permutations(range(len(clicked)), 2)]
    n_all = n_prompts * sum(len(product.groups) for product in sources)
    return CreativeCtr(np.array(ctrs), n_well_formed / n_all, 0.5 + 0.5 * float(np.mean(own)) if own else 0.5)


def uplift(before: CreativeCtr, after: CreativeCtr, *, n_bootstrap: int = 2_000, seed: int = 0) -> Uplift:
    """Return the relative gain in mean CTR of one G-MLLM's prompts on another's for the same products."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(before.by_product), size=(n_bootstrap, len(before.by_product)))
    gains = after.by_product[drawn].mean(axis=1) / before.by_product[drawn].mean(axis=1) - 1.0
    low, high = np.quantile(gains, [0.025, 0.975])
    return Uplift(after.ctr / before.ctr - 1.0, float(low), float(high))


def _style(text: str) -> Floats:
    """Return the style of what is drawn from a text, (8,); of a text that nobody can read, the neutral one."""
    try:
        return style_of(Prompt.parse(text))
    except PromptNotUnderstood:
        return np.zeros(N_STYLE_DIMS)
