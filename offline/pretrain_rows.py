"""Rows of the four pre-training tasks: an instruction, perhaps a picture and a group, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from generator.instructions import INSTRUCTIONS, Task, Template
from generator.prompt import sanitise_caption
from offline.pretrain_source import Attributes, GroupSource, ProductSource
from offline.teacher import Brief, PromptTeacher


class NothingToLearnFrom(RuntimeError):
    """The state has no group of users yet, so no row can be made."""

    def __init__(self) -> None:
        super().__init__(
            "the state holds no product with groups; pre-training needs at least one. Nothing was trained: let the "
            "stream run until products are grouped."
        )


@dataclass(frozen=True, eq=False, slots=True)
class PretrainRow:
    """One row; ``picture_uri`` and ``group_feature`` (11, 128) are None where the row has none."""

    task: Task
    instruction: str
    answer: str
    picture_uri: str | None
    group_feature: npt.NDArray[np.float32] | None


@dataclass(frozen=True, eq=False, slots=True)
class _Audience:
    """Whom a row speaks of: a group of a product, or all of its users, who have no feature."""

    product: ProductSource
    typical: Attributes
    group: GroupSource | None

    def brief(self) -> Brief:
        product = self.product
        distinctive = [] if self.group is None else self.group.distinctive
        return Brief(product.product_id, product.title, product.category, self.typical, distinctive)


def attributes_text(attributes: Mapping[str, str]) -> str:
    """Return attributes as a sentence, in their order: ``age 25-28, color pink, ...``."""
    return ", ".join(f"{name} {value}" for name, value in attributes.items())


def make_rows(
    sources: Sequence[ProductSource],
    teacher: PromptTeacher,
    *,
    n_rows: int,
    n_prompts: int,
    task_weights: Mapping[Task, float],
    p_without_group: float,
    seed: int,
) -> list[PretrainRow]:
    """Draw the rows of pre-training; the same arguments give the same rows.

    Parameters
    ----------
    sources
        The grouped products.
    teacher
        Who writes the prompts.
    n_rows
        Rows in all.
    n_prompts
        Different prompts that the teacher writes for each group.
    task_weights
        How often each task comes, in any unit. A behavioural prediction for a group without clickers outside its
        sample becomes a group analysis, a product comprehension without any picture a prompt generation.
    p_without_group
        Share of the rows about users that speak of all of a product's users, without a group token. The model then
        knows both kinds of prompt, and what the token adds can be measured.
    seed
        Seed of the draws.

    Raises
    ------
    NothingToLearnFrom
        If there is no group.
    """
    groups = [(product, group) for product in sources for group in product.groups]
    if not groups:
        raise NothingToLearnFrom
    rng = np.random.default_rng([seed, 1])
    tasks = list(task_weights)
    weights = np.array([task_weights[task] for task in tasks], dtype=np.float64)
    prompts_of = _prompts(teacher, n_prompts)
    rows = []
    for task_number in rng.choice(len(tasks), size=n_rows, p=weights / weights.sum()):
        product, group = groups[int(rng.integers(len(groups)))]
        whole = rng.random() < p_without_group
        audience = _Audience(product, product.typical if whole else group.typical, None if whole else group)
        rows.append(_row(tasks[int(task_number)], audience, prompts_of, rng))
    return rows


def _prompts(teacher: PromptTeacher, n_prompts: int) -> Callable[[_Audience], list[str]]:
    written: dict[tuple[str, int | None], list[str]] = {}

    def of(audience: _Audience) -> list[str]:
        key = audience.product.product_id, None if audience.group is None else audience.group.group_id
        if key not in written:  # asked once: an endpoint costs time and money
            written[key] = [prompt.text for prompt in teacher.write(audience.brief(), n_prompts)]
        return written[key]

    return of


def _row(
    task: Task, audience: _Audience, prompts_of: Callable[[_Audience], list[str]], rng: np.random.Generator
) -> PretrainRow:
    product, group = audience.product, audience.group
    clickers = [] if group is None else group.clickers
    if task is Task.BEHAVIOURAL_PREDICTION and not clickers:
        task = Task.GROUP_ANALYSIS
    uris = [uri for uri in (product.image_uri, *product.creative_uris) if uri is not None]
    if task is Task.PRODUCT_COMPREHENSION and not uris:
        task = Task.PROMPT_GENERATION
    picture = product.picture_uri
    if task is Task.GROUP_ANALYSIS:
        answer = attributes_text(audience.typical)
    elif task is Task.BEHAVIOURAL_PREDICTION:
        answer = attributes_text(clickers[int(rng.integers(len(clickers)))])
    elif task is Task.PRODUCT_COMPREHENSION:
        answer = sanitise_caption(product.title)
        picture = uris[int(rng.integers(len(uris)))]
    else:
        texts = prompts_of(audience)
        answer = texts[int(rng.integers(len(texts)))]
    template: Template = INSTRUCTIONS[task][int(rng.integers(len(INSTRUCTIONS[task])))]
    return PretrainRow(
        task,
        template.fill(title=product.title, group=group is not None),
        answer,
        picture if template.has_image else None,
        group.feature if group is not None and template.has_users else None,
    )
