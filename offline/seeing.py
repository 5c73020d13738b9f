"""Lessons in seeing: a G-MLLM learns to say what pictures show, before anything is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from generator.comparison import Picture
from generator.eyes import Eyes
from generator.grm import INSTRUCTION
from generator.mllm import IGNORED_LABEL, OWN_TOWERS, GroupMllm
from generator.prompt import Prompt
from offline.data_parallel import DataParallel
from offline.descent import descend
from offline.settings import RewardSettings

_RIDGE: Final = 1e3
"""Ridge of the detectors' fit; from 300 to 3,000 pairs of unseen products are ordered about as well."""

_FROM, _TO, _SLOPE = 0.3, 0.6, 8.0
"""Between which readings of a detector a word comes to be seen, and how sharply."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A picture and the prompt that it was drawn from."""

    picture: Picture
    prompt: str

    @property
    def words(self) -> list[str]:
        """What the picture shows: the prompt's slot words."""
        return list(Prompt.parse(self.prompt).slots().values())

    @property
    def answer(self) -> str:
        """What is to be said of the picture."""
        return ", ".join(self.words)


OnStep = Callable[[str, int, float], None]
"""Is told the stage (`lessons`, `calibration` or `pairs`), the step and its loss."""


def teach(
    mllm: GroupMllm,
    lessons: Sequence[Lesson],
    settings: RewardSettings,
    *,
    seed: int,
    on_step: OnStep | None = None,
    processes: DataParallel | None = None,
) -> None:
    """Teach a G-MLLM to say what pictures show, in place.

    Where its eyes are a frozen tower of ours, the projector behind them is fitted first (`fit_projector`) and stays as
    it is. Nothing of the group is learnt, and without lessons nothing at all.

    Parameters
    ----------
    mllm
        The model.
    lessons
        Pictures with prompts; none may be of held-out creatives.
    settings
        Steps, rates and sizes.
    seed
        Decides the order of the lessons.
    on_step
        Watches the training.
    processes
        Who trains together, by default this process alone: each takes a batch of every step, and all end with the same
        weights.
    """
    if not lessons:
        return
    eyes = Eyes(mllm)
    if isinstance(mllm.model.config.vision_config, OWN_TOWERS):
        fit_projector(mllm, lessons, eyes)
        return
    if processes is None:
        processes = DataParallel(on_gpu=mllm.device.type == "cuda")
    parameters = [parameter for parameter in mllm.model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        processes.copy_first(mllm.model.parameters())
    mllm.model.train()
    losses = _losses(mllm, lessons, eyes, settings.batch_lessons, np.random.default_rng(seed), processes)
    for step, loss in enumerate(
        descend(
            parameters,
            losses,
            processes,
            n_steps=settings.n_lesson_steps,
            learning_rate=settings.lesson_learning_rate,
            weight_decay=settings.lesson_weight_decay,
        )
    ):
        if on_step is not None:
            on_step("lessons", step, loss)
    mllm.model.eval()


@torch.no_grad()
def fit_projector(mllm: GroupMllm, lessons: Sequence[Lesson], eyes: Eyes) -> None:
    """Fit the projector behind a frozen tower: what it puts in a picture's place stands for the words that are seen.

    A ridge regression detects each word that may be said of a picture in what the tower sees. Two hidden units of the
    projector's MLP bound a detector's reading from below and above, so that a word is seen or is not. The second layer
    gives each word that is seen an axis of its own, as long as words' embeddings are: those of words that are used
    alike are nearly the same, and what learns from pairs by Adam finds tastes sooner along axes than across them
    (of held-out winners 1 in 100 more in worlds 101 to 103). Steps down a gradient would find all this only slowly, for
    what words differ by is a small part of what pictures of different products do. Words for which there are no units
    are left out, the rarest first.
    """
    projector = mllm.model.model.multi_modal_projector
    table: Any = mllm.model.get_input_embeddings().weight  # (V, D)
    counts = Counter(word for lesson in lessons for word in lesson.words)
    n_units = projector.linear_1.out_features // 2
    words = sorted(word for word, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:n_units])
    shown = [[float(word in of_lesson) for word in words] for of_lesson in (lesson.words for lesson in lessons)]
    named = torch.tensor(shown, device=mllm.device).double()  # (n, words)
    seen = eyes.see([lesson.picture for lesson in lessons]).double()  # (n, T, W)
    named = named.repeat_interleave(seen.shape[1], dim=0)
    seen = seen.flatten(0, 1)
    middle, usual = seen.mean(dim=0), named.mean(dim=0)
    apart = seen - middle
    gram = apart.T @ apart + _RIDGE * torch.eye(apart.shape[1], dtype=apart.dtype, device=apart.device)
    detectors = torch.linalg.solve(gram, apart.T @ (named - usual)).T  # (words, W)
    offsets = usual - detectors @ middle
    length = table.norm(dim=1).mean()
    codes = length * torch.eye(len(words), table.shape[1], dtype=torch.float64, device=mllm.device)  # (words, D)
    for layer in (projector.linear_1, projector.linear_2):
        layer.weight.zero_()
        layer.bias.zero_()
    for number, (bound, sign) in enumerate(((_FROM, 1.0), (_TO, -1.0))):
        units = slice(number * len(words), (number + 1) * len(words))
        projector.linear_1.weight[units] = (_SLOPE * detectors).to(table.dtype)
        projector.linear_1.bias[units] = (_SLOPE * (offsets - bound)).to(table.dtype)
        projector.linear_2.weight[:, units] = (sign * codes.T / (_SLOPE * (_TO - _FROM))).to(table.dtype)


def _losses(
    mllm: GroupMllm,
    lessons: Sequence[Lesson],
    eyes: Eyes,
    batch_lessons: int,
    rng: np.random.Generator,
    processes: DataParallel,
) -> Iterator[Tensor]:
    """Yield the language model's loss on what is to be said of a batch's pictures.

    It is a mean over the tokens of all processes' answers.
    """
    tokenizer = mllm.tokenizer
    image = mllm.processor.image_token
    text = mllm.prompt_text(INSTRUCTION, n_images=1).replace(image, image * mllm.model.config.image_seq_length)
    prompt: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    ended = [mllm.answer_text(lesson.answer) for lesson in lessons]
    answers: list[list[int]] = tokenizer(ended, add_special_tokens=False)["input_ids"]
    while True:
        drawn = rng.integers(len(lessons), size=batch_lessons * processes.n).tolist()
        n_tokens = sum(len(answers[place]) for place in drawn) / processes.n
        taken = processes.share(drawn)
        batch = tokenizer.pad(
            {"input_ids": [prompt + answers[place] for place in taken]}, padding_side="left", return_tensors="pt"
        ).to(mllm.device)
        # All prompts are of one length, and so are the ends of the rows that answer: what stands before is not learnt.
        length = batch["input_ids"].shape[1]
        answered = torch.tensor([[length - len(answers[place])] for place in taken], device=mllm.device)
        ignored = torch.arange(length, device=mllm.device) < answered  # (B, T)
        labels = batch["input_ids"].masked_fill(ignored, IGNORED_LABEL)
        pixels = eyes.see([lessons[place].picture for place in taken])
        loss: Tensor = mllm.model(**batch, labels=labels, num_items_in_batch=n_tokens, pixel_values=pixels).loss
        yield loss
