"""Eyes: a G-MLLM's vision tower over many pictures, each read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generator.comparison import Picture
from generator.mllm import GroupMllm


class Eyes:
    """Gives what a projector or a tower starts from, picture by picture.

    What a frozen tower sees of a picture never changes: it is worked out once and kept. Of a tower that learns the
    pixels are kept.

    Parameters
    ----------
    mllm
        Whose tower and image processor are used.
    n_kept
        Pictures that are kept at most, those that were read last.
    """

    def __init__(self, mllm: GroupMllm, *, n_kept: int = 65_536) -> None:
        self._mllm = mllm
        self._n_kept = n_kept
        self._kept: dict[str, Tensor] = {}
        tower = mllm.model.model.vision_tower
        self._frozen = not any(parameter.requires_grad for parameter in tower.parameters())

    def see(self, pictures: Sequence[Picture]) -> Tensor:
        """Return what is kept of pictures: a frozen tower's tokens (n, T, width), else the pixels (n, 3, H, W)."""
        missing = {picture.key: picture for picture in pictures if picture.key not in self._kept}
        for picture in missing.values():
            self._kept[picture.key] = self._read(picture)
        seen = torch.stack([self._kept[picture.key] for picture in pictures])
        for key in list(self._kept)[: max(len(self._kept) - self._n_kept, 0)]:
            del self._kept[key]
        return seen

    def _read(self, picture: Picture) -> Tensor:
        pixels: Tensor = self._mllm.processor.image_processor([picture.open()], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self._mllm.device, self._mllm.model.dtype)  # (1, 3, H, W)
        if not self._frozen:
            return pixels[0]
        config = self._mllm.model.config
        with torch.no_grad():
            layers = self._mllm.model.model.vision_tower(
                pixels, output_hidden_states=True, return_dict=True
            ).hidden_states
        chosen = config.vision_feature_layer
        tokens: Tensor = torch.cat(
            [layers[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1
        )
        return tokens[0, 1:] if config.vision_feature_select_strategy == "default" else tokens[0]  # (T, width)
