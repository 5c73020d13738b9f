"""The GRM: the G-MLLM with a head that says which of two pictures a group clicks more (section 3.3, Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from generator.comparison import Comparison, Floats, Picture
from generator.mllm import GroupMllm, MllmInput

INSTRUCTION: Final = "Describe the picture."
"""X_T of Eq. 8, and what lessons in seeing ask (`offline.seeing`)."""

HEADS_FILE: Final = "heads.pt"
REWARD_FILE: Final = "reward.json"

BATCH_ROWS: Final = 128
HEAD_WIDTH: Final = 64

_N_REMEMBERED: Final = 16_384


class RewardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved reward model has besides weights."""

    name: str
    with_group: bool
    layer: int
    temperature: float


class Judgement(NamedTuple):
    """What the heads say: ``logits`` (B, 2) of either picture's winning, ``ctr`` (B, 2) of both pictures."""

    logits: Tensor
    ctr: Tensor


class ScaledLinear(nn.Linear):
    """A linear layer whose inputs come at a scale of their own: it learns at the rate that it is told whatever that is.

    Parameters
    ----------
    in_features, out_features
        Widths of inputs and outputs.
    """

    middle: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("middle", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit_scale(self, states: Tensor) -> None:
        """Take the mean of states (n, in_features), and their root mean square distance from it, for 0 and 1."""
        self.middle.copy_(states.mean(dim=0))
        spread = (states - self.middle).square().mean().sqrt()
        # What differs by less than a twentieth of what is common is rounding, and stays as small as it is.
        self.scale.copy_(torch.maximum(spread, 0.05 * states.abs().mean() + 1e-6))

    def forward(self, states: Tensor) -> Tensor:
        """Return the outputs for states (..., in_features)."""
        return super().forward((states - self.middle) / self.scale)


class Grm(nn.Module):
    """A reward model on a G-MLLM that was taught to see; without the group it is CAIG's.

    The G-MLLM reads each picture with the instruction, and H_GRM of Eq. 8 is made of one layer's states of the
    picture's tokens and of the group: both are brought to one width and multiplied, for who likes it and what it shows
    have to be multiplied, which a small model finds in sums after some hundreds of steps. FC_cls makes a logit of it
    for each of the two pictures, so that one order of a pair says what the other does. A second head tells the CTRs of
    both pictures, for CAIG's point loss.

    Heads alone learn from pairs: products are few, and a whole model learns theirs by heart. So does the group
    projector's MLP, whose token e_G was made to write prompts by: of the group the head reads what enters that MLP.

    Parameters
    ----------
    mllm
        What it stands on; it stays as it is.
    with_group
        Whether it sees the group.
    layer
        The language model's layer whose states H_GRM is made of: 0 for its inputs, -1 for its last one.
    name
        What it is called in reports.
    readings
        What the same layer of a G-MLLM with the same weights has read in pictures already, and where what this one
        reads is kept.
    """

    def __init__(
        self,
        mllm: GroupMllm,
        *,
        with_group: bool = True,
        layer: int = 0,
        name: str = "grm",
        readings: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.with_group = with_group
        self.layer = layer
        self.temperature = 1.0
        self._mllm = mllm
        self._readings: dict[str, Tensor] = {} if readings is None else readings
        self.backbone = mllm.model.model.requires_grad_(False).eval()
        width = mllm.model.config.get_text_config().hidden_size
        self.look = ScaledLinear(width, HEAD_WIDTH)
        if with_group:
            projector = self.backbone.group_projector
            self.ask = ScaledLinear(projector.n_points * projector.width, HEAD_WIDTH)
        self.fc_cls = nn.Linear(HEAD_WIDTH, 1, bias=False)
        self.fc_ctr = nn.Linear(HEAD_WIDTH, 1)
        self.to(mllm.device)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """What it has besides the G-MLLM, by name."""
        return {name: module for name, module in self.named_children() if name != "backbone"}

    def judge(self, comparisons: Sequence[Comparison]) -> Judgement:
        """Return what the heads say of comparisons."""
        pictures = [picture for row in comparisons for picture in (row.first, row.second)]
        hidden = self.look(self._read(pictures)).unflatten(0, (-1, 2))  # (B, 2, W)
        if self.with_group:
            hidden = hidden * self.ask(self._groups(comparisons)).unsqueeze(1)
        return Judgement(self.fc_cls(hidden).squeeze(2), torch.sigmoid(self.fc_ctr(hidden)).squeeze(2))

    @torch.no_grad()
    def fit_scale(self, comparisons: Sequence[Comparison]) -> None:
        """Start heads that have learnt nothing from what sets pictures and groups apart: mean 0 and deviation 1."""
        pictures = {picture.key: picture for row in comparisons for picture in (row.first, row.second)}
        self.look.fit_scale(self._read(list(pictures.values())))
        if self.with_group:
            self.ask.fit_scale(self._groups(comparisons))

    @torch.no_grad()
    def _groups(self, comparisons: Sequence[Comparison]) -> Tensor:
        """Return each comparison's group feature as it enters the group projector's MLP, (B, 1408)."""
        features = torch.from_numpy(np.stack([row.group_feature for row in comparisons])).to(self._mllm.device)
        normed: Tensor = self.backbone.group_projector.normed(features)
        return normed.float()

    @torch.no_grad()
    def _read(self, pictures: Sequence[Picture]) -> Tensor:
        """Return the mean of the G-MLLM's hidden states over each picture's tokens, (n, D)."""
        missing = list({picture.key: picture for picture in pictures if picture.key not in self._readings}.values())
        for start in range(0, len(missing), BATCH_ROWS):
            batch = missing[start : start + BATCH_ROWS]
            inputs = self._mllm.encode([MllmInput(INSTRUCTION, (picture.open(),)) for picture in batch])
            if self.layer == 0:  # what the projector puts in a picture's place: the language model is not asked
                tokens = self.backbone.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
                means = torch.stack([of_picture.float().mean(dim=0) for of_picture in tokens.pooler_output])
            else:
                states = self.backbone(**inputs, output_hidden_states=True).hidden_states[self.layer].float()
                shown = (inputs["input_ids"] == self._mllm.processor.image_token_id).unsqueeze(2)  # (n, T, 1)
                means = (states * shown).sum(dim=1) / shown.sum(dim=1)  # (n, D)
            self._readings |= {picture.key: mean for picture, mean in zip(batch, means, strict=True)}
        found = torch.stack([self._readings[picture.key] for picture in pictures])
        for key in list(self._readings)[: max(len(self._readings) - _N_REMEMBERED, 0)]:
            del self._readings[key]
        return found

    @torch.no_grad()
    def logits(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return the logit of P(CTR_1 > CTR_2 | G) before calibration, (n,)."""
        found = []
        for start in range(0, len(comparisons), BATCH_ROWS):
            logits = self.judge(comparisons[start : start + BATCH_ROWS]).logits
            found.append((logits[:, 0] - logits[:, 1]).cpu().numpy())
        return np.concatenate(found).astype(np.float64) if found else np.zeros(0)

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return P(CTR_1 > CTR_2 | G), calibrated, (n,)."""
        return np.asarray(1.0 / (1.0 + np.exp(-self.logits(comparisons) / self.temperature)))

    def save(self, folder: Path) -> None:
        """Write the model into a folder that `load` reads."""
        self._mllm.save(folder)
        torch.save({name: head.state_dict() for name, head in self.heads.items()}, folder / HEADS_FILE)
        record = RewardRecord(
            name=self.name, with_group=self.with_group, layer=self.layer, temperature=self.temperature
        )
        (folder / REWARD_FILE).write_bytes(msgspec.json.encode(record))

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Self:
        """Read a model that `save` wrote."""
        record = msgspec.json.decode((folder / REWARD_FILE).read_bytes(), type=RewardRecord)
        mllm = GroupMllm.load(folder, dtype=dtype, device=device)
        model = cls(mllm, with_group=record.with_group, layer=record.layer, name=record.name)
        states = torch.load(folder / HEADS_FILE, weights_only=True, map_location=device)
        for name, head in model.heads.items():
            head.load_state_dict(states[name])
        model.temperature = record.temperature
        return model.eval()
