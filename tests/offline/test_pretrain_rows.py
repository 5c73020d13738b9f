from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from generator.instructions import Task
from generator.prompt import UNNAMED_CAPTION, Prompt, is_well_formed
from offline.pretrain_rows import NothingToLearnFrom, PretrainRow, attributes_text, make_rows
from offline.pretrain_source import GroupSource, ProductSource
from offline.teacher import Brief, GrammarTeacher

EQUAL = dict.fromkeys(Task, 1.0)
CLICKER = {"age": "over 70", "gender": "female"}


def product(number: int, *, pictures: int = 2, clickers: bool = True) -> ProductSource:
    groups = [
        GroupSource(
            group_id,
            np.full((11, 128), 10 * number + group_id, np.float32),
            {"age": "18-20", "gender": ("male", "female")[group_id]},
            [],
            [CLICKER] if clickers else [],
        )
        for group_id in range(2)
    ]
    uris = [f"creative-{number}-{each}.png" for each in range(pictures)]
    return ProductSource(f"p{number}", f"Product {number}", None, None, uris, {"age": "25-28"}, groups)


class CountingTeacher(GrammarTeacher):
    """The grammar, with a count of what it was asked."""

    def __init__(self) -> None:
        super().__init__(temperature=1.0, seed=0)
        self.asked: Counter[str] = Counter()

    def write(self, brief: Brief, n_prompts: int) -> list[Prompt]:
        self.asked[f"{brief.product_id} {dict(brief.typical)}"] += 1
        return super().write(brief, n_prompts)


def rows_of(sources: list[ProductSource], n_rows: int = 400, **options: object) -> list[PretrainRow]:
    chosen = {
        "task_weights": EQUAL,
        "p_without_group": 0.25,
        "seed": 3,
        "n_prompts": 4,
        **options,
    }
    return make_rows(sources, CountingTeacher(), n_rows=n_rows, **chosen)  # type: ignore[arg-type]


def test_rows_are_of_the_stream_and_each_task_has_its_answer() -> None:
    rows = rows_of([product(1), product(2)])
    assert len(rows) == 400
    n_of_task = Counter(row.task for row in rows)
    # A behavioural prediction that speaks of all users has no clicker of a group, and becomes an analysis.
    assert all(n > 60 for n in n_of_task.values())
    for row in rows:
        if row.task is Task.PROMPT_GENERATION:
            assert is_well_formed(row.answer)
            assert Prompt.parse(row.answer).caption == UNNAMED_CAPTION
            assert "caption Product" in row.instruction
            assert row.picture_uri is not None
            assert row.picture_uri.endswith("-0.png")
        elif row.task is Task.PRODUCT_COMPREHENSION:
            assert row.answer in ("Product 1", "Product 2")
            assert row.picture_uri is not None
            assert row.group_feature is None
            assert row.picture_uri.startswith(f"creative-{row.answer[-1]}-")
        elif row.task is Task.BEHAVIOURAL_PREDICTION:
            assert row.answer == attributes_text(CLICKER)
            assert row.group_feature is not None
            assert row.picture_uri is None
        elif row.group_feature is None:
            assert row.answer == "age 25-28"
            assert "all shoppers" in row.instruction
        else:
            gender = ("male", "female")[int(row.group_feature[0, 0]) % 10]
            assert row.answer == f"age 18-20, gender {gender}"


def test_the_group_token_and_the_words_agree_on_whether_there_is_a_group() -> None:
    rows = [row for row in rows_of([product(1)]) if row.task is not Task.PRODUCT_COMPREHENSION]
    for row in rows:
        assert ("this group of shoppers" in row.instruction) == (row.group_feature is not None)
    without = np.mean([row.group_feature is None for row in rows])
    assert 0.15 < without < 0.35


def test_the_same_arguments_give_the_same_rows() -> None:
    first, again, other = (rows_of([product(1)], seed=seed, n_rows=50) for seed in (1, 1, 2))
    assert [(row.instruction, row.answer) for row in first] == [(row.instruction, row.answer) for row in again]
    assert [(row.instruction, row.answer) for row in first] != [(row.instruction, row.answer) for row in other]


def test_a_teacher_is_asked_once_for_each_group_and_once_for_all_users() -> None:
    teacher = CountingTeacher()
    make_rows(
        [product(1), product(2)],
        teacher,
        n_rows=300,
        n_prompts=3,
        task_weights={Task.PROMPT_GENERATION: 1.0},
        p_without_group=0.3,
        seed=0,
    )
    assert len(teacher.asked) == 6
    assert set(teacher.asked.values()) == {1}


@pytest.mark.parametrize(
    ("source", "task", "instead"),
    [
        (product(1, clickers=False), Task.BEHAVIOURAL_PREDICTION, Task.GROUP_ANALYSIS),
        (product(1, pictures=0), Task.PRODUCT_COMPREHENSION, Task.PROMPT_GENERATION),
    ],
)
def test_what_a_product_lacks_another_task_takes_the_place_of(source: ProductSource, task: Task, instead: Task) -> None:
    rows = rows_of([source], 20, task_weights={task: 1.0}, p_without_group=0.0)
    assert {row.task for row in rows} == {instead}
    assert all(row.picture_uri is None or source.creative_uris for row in rows)


def test_without_a_group_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(NothingToLearnFrom):
        rows_of([])
