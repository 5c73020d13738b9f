from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from generator.mllm import GroupMllm
from offline.group_dpo import align
from offline.pretrain import Pictures, PromptReport, pretrain
from offline.pretrain_source import ProductSource
from offline.prompt_gate import PromptQuality, measure_prompts, refusals
from offline.settings import PretrainSettings, PromptGateSettings
from offline.teacher import GrammarTeacher
from tests.offline import dpo_world

# PEFT 0.21 still asks transformers 5.24 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

WRITING = dpo_world.SMALL.model_copy(update={"temperature": 0.3})
TYPICAL = ({"age": "18-20", "target_group": "student"}, {"age": "over 70", "target_group": "pensioner"})
GATE = PromptGateSettings()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ProductSource]:
    return [
        replace(product, groups=[replace(group, typical=TYPICAL[group.group_id]) for group in product.groups])
        for product in dpo_world.products(tmp_path_factory.mktemp("products"))
    ]


@pytest.fixture(scope="module")
def pretrained(sources: list[ProductSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a model is that writes prompts, of all words, but does not yet tell the groups apart."""
    mllm = dpo_world.mllm()
    settings = PretrainSettings(
        n_rows=1_200,
        batch_rows=8,
        checkpoint_steps=1_000,
        n_evaluated=2,
        learning_rate=3e-3,
        group_analysis=0,
        behavioural_prediction=0,
        product_comprehension=0,
    )
    teacher = GrammarTeacher(temperature=1, seed=0)
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(mllm, sources, teacher, settings, WRITING, folder=folder / "run", seed=0)
    mllm.save(folder / "model")
    return folder / "model"


def quality(mllm: GroupMllm, sources: list[ProductSource], *, with_group: bool = True) -> PromptQuality:
    return measure_prompts(
        mllm, sources, WRITING, n_groups=8, with_group=with_group, seed=0, pictures=Pictures.of(mllm)
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_overtrained_to_collapse_is_refused_and_trained_in_measure_is_not(
    sources: list[ProductSource], pretrained: Path, tmp_path: Path
) -> None:
    before = quality(GroupMllm.load(pretrained), sources)
    assert before.drawn.p_well_formed == 1
    found: dict[float, Any] = {}
    for learning_rate, n_epochs in ((1.5e-3, 8), (5e-3, 16)):
        mllm = GroupMllm.load(pretrained)
        settings = dpo_world.SHORT.model_copy(
            update={"learning_rate": learning_rate, "n_epochs": n_epochs, "checkpoint_steps": 1_000}
        )
        report = align(mllm, dpo_world.tuples(sources), settings, folder=tmp_path / str(learning_rate), seed=0)
        after = quality(mllm, sources)
        found[learning_rate] = report, after, refusals(before, after, GATE, with_group=True)
    _, in_measure, reasons = found[1.5e-3]
    assert reasons == ()
    assert in_measure.p_group_specific > before.p_group_specific
    report, collapsed, reasons = found[5e-3]
    assert report.last_loss < found[1.5e-3][0].last_loss / 2  # by the tuples alone it is much the better one
    assert collapsed.drawn.p_well_formed <= 0.5
    assert reasons[0].startswith("the share of well-formed prompts is 0")


def test_without_the_group_token_no_prompt_is_a_groups_own(sources: list[ProductSource], pretrained: Path) -> None:
    found = quality(GroupMllm.load(pretrained), sources, with_group=False)
    assert (found.drawn.p_well_formed, found.drawn.specificity_nats, found.p_group_specific) == (1, 0, 0)
    assert refusals(found, found, GATE, with_group=False) == ()
    assert len(refusals(found, found, GATE, with_group=True)) == 1


def q(p_well_formed: float, p_group_specific: float, n_choices: int) -> PromptQuality:
    return PromptQuality(PromptReport(16, p_well_formed, 1.0), p_group_specific, n_choices)


@pytest.mark.parametrize(
    ("after", "with_group", "reasons"),
    [
        (q(0.98, 0.5, 12), True, []),
        (q(0.95, 0.2, 3), True, []),
        (q(0.92, 0.5, 12), True, ["well-formed prompts is 0.920, at least 0.930"]),
        (q(0.98, 0.1, 12), True, ["prompts of their own is 0.100, at least 0.200"]),
        (q(0.98, 0.0, 12), False, []),
        (q(0.98, 0.5, 2), True, ["choices of words is 2.000, at least 3.000"]),
        (q(0.0, 0.0, 0), True, ["well-formed", "choices of words", "of their own"]),
    ],
)
def test_each_demand_is_made(after: PromptQuality, with_group: bool, reasons: list[str]) -> None:
    found = refusals(q(0.98, 0.6, 12), after, GATE, with_group=with_group)
    assert len(found) == len(reasons)
    assert all(part in reason for part, reason in zip(reasons, found, strict=True))


def test_a_model_that_was_bad_before_is_no_excuse() -> None:
    assert len(refusals(q(0.1, 0.5, 4), q(0.1, 0.5, 4), GATE, with_group=True)) == 1
