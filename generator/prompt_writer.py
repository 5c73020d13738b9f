"""Prompt writer: the G-MLLM that is in use, asked for prompts for the groups of a product (section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from generator.comparison import Feature
from generator.instructions import INSTRUCTIONS, Task
from generator.prompt import Prompt, is_well_formed
from generator.settings import MllmSettings

if TYPE_CHECKING:
    from generator.mllm import GroupMllm, MllmInput

_OVERSAMPLING: Final = 2
"""How much larger than the vision tower's input a picture is kept: the processor does the last step, as it does for
pictures that come whole."""


def picture_side_px(mllm: GroupMllm) -> int:
    """Return the longest side of a picture that a model can make use of."""
    return _OVERSAMPLING * int(mllm.processor.patch_size) * math.isqrt(mllm.model.config.image_seq_length)


def on_white(image: Image.Image, side_px: int) -> Image.Image:
    """Return a picture as a G-MLLM is shown it: RGB, at most ``side_px`` on a side; transparency becomes white."""
    small = image.convert("RGBA")
    small.thumbnail((side_px, side_px))
    return Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")


def prompt_request(
    title: str, picture: Image.Image | None, group_feature: Feature | None, *, wording: int = 0
) -> MllmInput:
    """Return what asks a G-MLLM for a prompt for a group of a product; without a feature, for all of its users."""
    from generator.mllm import MllmInput

    instruction = INSTRUCTIONS[Task.PROMPT_GENERATION][wording].fill(title=title, group=group_feature is not None)
    return MllmInput(instruction, () if picture is None else (picture,), group_feature)


class PromptWriter:
    """Writes prompts for groups with a G-MLLM.

    Parameters
    ----------
    mllm
        The model.
    name
        Its artifact, such as ``mllm/v000003``.
    settings
        How prompts are drawn from it.
    """

    def __init__(self, mllm: GroupMllm, name: str, settings: MllmSettings) -> None:
        self.name = name
        self._mllm = mllm
        self._settings = settings

    def write(
        self, title: str, picture: Image.Image, features: Mapping[int, Feature], *, n_prompts: int, seed: int
    ) -> dict[int, list[Prompt]]:
        """Return the well-formed and different prompts among ``n_prompts`` sampled for each group, in their order.

        The same arguments give the same prompts.

        Parameters
        ----------
        title, picture
            The product.
        features
            The groups' features, (11, 128) each.
        n_prompts
            Samples for each group.
        seed
            Seed of the wording and of the draws.
        """
        small = on_white(picture, picture_side_px(self._mllm))
        wordings = np.random.default_rng(seed).integers(len(INSTRUCTIONS[Task.PROMPT_GENERATION]), size=len(features))
        answers = self._mllm.generate(
            [
                prompt_request(title, small, feature, wording=int(wording))
                for feature, wording in zip(features.values(), wordings, strict=True)
            ],
            max_new_tokens=self._settings.max_new_tokens,
            n_samples=n_prompts,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=seed,
        )
        return {
            group_id: [Prompt.parse(text).named(title) for text in dict.fromkeys(filter(is_well_formed, texts))]
            for group_id, texts in zip(features, answers, strict=True)
        }
