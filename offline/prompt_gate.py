"""The gate on generated prompts: an aligned G-MLLM must still write prompts, and write them for groups.

Preference accuracy does not tell: pure DPO reaches 1.0 on its tuples while what the model writes turns into junk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from generator.mllm import GroupMllm
from generator.prompt import Prompt, is_well_formed
from generator.settings import MllmSettings
from offline.pretrain import Pictures, PromptReport, prompt_input, read_prompts, sample_products
from offline.pretrain_source import ProductSource
from offline.settings import PromptGateSettings


@dataclass(frozen=True, slots=True)
class PromptQuality:
    """What a G-MLLM's prompts are like, drawn and at their likeliest.

    ``drawn`` is of prompts drawn as they are for use. The rest is of the likeliest prompt of each group, so that
    chance makes no difference: ``p_group_specific`` is the share of two groups of one product whose prompts are both
    well formed and differ in words (0 without any two groups), ``n_choices`` how many different choices of words
    there are.
    """

    drawn: PromptReport
    p_group_specific: float
    n_choices: int


def measure_prompts(
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    generation: MllmSettings,
    *,
    n_groups: int,
    with_group: bool,
    seed: int,
    pictures: Pictures,
) -> PromptQuality:
    """Generate prompts for some groups, whole products at a time, and measure them.

    Parameters
    ----------
    mllm
        The model.
    sources
        The products that groups are taken from.
    generation
        How prompts are drawn.
    n_groups
        How many groups, at most; one product at least.
    with_group
        Whether prompts are asked for a group, or for all shoppers.
    seed
        Seed of the products and of the draws.
    pictures
        What opens the products' pictures.
    """
    drawn = read_prompts(
        mllm, sources, generation, n_groups=n_groups, seed=seed, pictures=pictures, with_group=with_group
    )
    products = sample_products(sources, n_groups=n_groups, seed=seed)
    answers = mllm.generate(
        [
            prompt_input(product, group.feature if with_group else None, pictures)
            for product in products
            for group in product.groups
        ],
        max_new_tokens=generation.max_new_tokens,
    )
    texts = iter(of_group[0] for of_group in answers)
    by_product = [[_choice(next(texts)) for _ in product.groups] for product in products]
    pairs = [pair for of_product in by_product for pair in combinations(of_product, 2)]
    n_specific = sum(a is not None and b is not None and a != b for a, b in pairs)
    choices = {choice for of_product in by_product for choice in of_product if choice is not None}
    return PromptQuality(drawn, n_specific / len(pairs) if pairs else 0.0, len(choices))


def refusals(
    before: PromptQuality, after: PromptQuality, settings: PromptGateSettings, *, with_group: bool
) -> tuple[str, ...]:
    """Return why a newly aligned model must not be used; empty if it may.

    Parameters
    ----------
    before, after
        Prompts of the model before and after, for the same groups.
    settings
        What is demanded.
    with_group
        Whether prompts are to differ between groups.
    """
    found = []

    def demand(what: str, value: float, least: float) -> None:
        if value < least:
            found.append(f"{what} is {value:.3f}, at least {least:.3f} is demanded")

    least = max(settings.min_well_formed, before.drawn.p_well_formed - settings.max_loss)
    demand("the share of well-formed prompts", after.drawn.p_well_formed, least)
    demand(
        "the number of different choices of words",
        after.n_choices,
        settings.min_distinct_kept * before.n_choices,
    )
    if with_group:
        demand("the share of groups with prompts of their own", after.p_group_specific, settings.min_group_specific)
    return tuple(found)


def _choice(text: str) -> tuple[str, ...] | None:
    """Return the slot words of a prompt of ours, None for any other text."""
    return tuple(Prompt.parse(text).slots().values()) if is_well_formed(text) else None
