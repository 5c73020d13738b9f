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
from generator.eyes import Eyes
from generator.mllm import IGNORED_LABEL, GroupMllm

INSTRUCTION: Final = "Which picture is clicked more?"
"""X_T of Eq. 8."""

HEADS_FILE: Final = "heads.pt"
REWARD_FILE: Final = "reward.json"

BATCH_ROWS: Final = 128


class RewardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved reward model has besides weights."""

    name: str
    with_group: bool
    temperature: float


class Judgement(NamedTuple):
    """What the heads say: ``logits`` (B, 2) of either picture's winning, ``ctr`` (B, 2) of both pictures."""

    logits: Tensor
    ctr: Tensor


class Grm(nn.Module):
    """A reward model on the backbone of a G-MLLM; without the group it is CAIG's.

    H_GRM is made of hidden states over [group; first picture; second picture; instruction]: that of each picture's last
    token, times that of the group's token, and that of the last token of all. FC_cls makes the two logits of Eq. 8 of
    them, and starts with what speaks for one picture speaking against the other. From the last token alone a small
    model needs some 200 steps to find that there are two pictures to compare, and from sums of group and picture some
    hundreds to find that who likes it and what it shows are to be multiplied. A second head tells the CTRs of both
    pictures, for CAIG's point loss.

    Parameters
    ----------
    mllm
        What it starts from. Its backbone is trained on, so it has to be this model's own.
    with_group
        Whether it sees the group.
    name
        What it is called in reports.
    seen
        Pictures that a model of the same tower has read already, and where those that this one reads are kept.
    """

    def __init__(
        self,
        mllm: GroupMllm,
        *,
        with_group: bool = True,
        name: str = "grm",
        seen: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.with_group = with_group
        self.temperature = 1.0
        self._mllm = mllm
        self._eyes = Eyes(mllm, seen=seen)
        self.backbone = mllm.model.model
        width = mllm.model.config.get_text_config().hidden_size
        self.fc_cls = nn.Linear(3 * width, 2, dtype=torch.float32)
        self.fc_ctr = nn.Linear(3 * width, 2, dtype=torch.float32)
        _prefer_either(self.fc_cls)
        self.to(mllm.device)

    def judge(self, comparisons: Sequence[Comparison]) -> Judgement:
        """Return what the heads say of comparisons, each read in the one order in which it is given."""
        config = self._mllm.model.config
        ids = self._ids(INSTRUCTION, n_images=2, group=self.with_group)
        input_ids = torch.tensor([ids] * len(comparisons), device=self._mllm.device)  # (B, T)
        inputs = self._eyes.look([picture for row in comparisons for picture in (row.first, row.second)])
        if self.with_group:
            features = np.stack([row.group_feature for row in comparisons])
            inputs["group_features"] = torch.from_numpy(features).to(self._mllm.device)  # (B, 11, 128)
        states = self.backbone(input_ids=input_ids, **inputs).last_hidden_state.float()  # (B, T, D)
        places = [place for place, token in enumerate(ids) if token == self._mllm.processor.image_token_id]
        read = [places[len(places) // 2 - 1], places[-1], -1]
        hidden = states[:, read]  # (B, 3, D)
        if self.with_group:
            place = ids.index(config.group_token_id)
            hidden = torch.cat([hidden[:, :2] * states[:, place : place + 1], hidden[:, 2:]], dim=1)
        hidden = hidden.flatten(1)  # (B, 3 * D)
        return Judgement(self.fc_cls(hidden), torch.sigmoid(self.fc_ctr(hidden)))

    def n_tokens(self, answers: Sequence[str]) -> int:
        """Return how many tokens answers have, their ends included."""
        ended = [self._mllm.answer_text(answer) for answer in answers]
        return sum(map(len, self._mllm.tokenizer(ended, add_special_tokens=False)["input_ids"]))

    def lesson_loss(
        self, instruction: str, pictures: Sequence[Picture], answers: Sequence[str], *, n_tokens: float
    ) -> Tensor:
        """Return the G-MLLM's loss on what it is to answer to an instruction on each of some pictures.

        It is the sum over the answers' tokens, over ``n_tokens``.
        """
        tokenizer = self._mllm.tokenizer
        prompt = self._ids(instruction, n_images=1, group=False)
        ended = [self._mllm.answer_text(answer) for answer in answers]
        completions = tokenizer(ended, add_special_tokens=False)["input_ids"]
        batch = tokenizer.pad(
            {"input_ids": [prompt + completion for completion in completions]}, padding_side="left", return_tensors="pt"
        ).to(self._mllm.device)
        # All prompts are of one length, and so are the ends of the rows that answer: what stands before is not learnt.
        length = batch["input_ids"].shape[1]
        answered = torch.tensor([[length - len(completion)] for completion in completions], device=self._mllm.device)
        ignored = torch.arange(length, device=self._mllm.device) < answered  # (B, T)
        labels = batch["input_ids"].masked_fill(ignored, IGNORED_LABEL)
        seen = self._eyes.look(pictures)
        loss: Tensor = self._mllm.model(**batch, labels=labels, num_items_in_batch=n_tokens, **seen).loss
        return loss

    def _ids(self, instruction: str, *, n_images: int, group: bool) -> list[int]:
        """Return the ids of an instruction, with as many placeholders for a picture as the tower has tokens."""
        text = self._mllm.prompt_text(instruction, n_images=n_images, group=group)
        image = self._mllm.processor.image_token
        text = text.replace(image, image * self._mllm.model.config.image_seq_length)
        ids: list[int] = self._mllm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def one_order_logits(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return the logit of the first picture's winning less that of the second's, each read once, (n,)."""
        was_training = self.training
        self.eval()
        found = []
        for start in range(0, len(comparisons), BATCH_ROWS):
            logits = self.judge(comparisons[start : start + BATCH_ROWS]).logits
            found.append((logits[:, 0] - logits[:, 1]).cpu().numpy())
        self.train(was_training)
        return np.concatenate(found).astype(np.float64) if found else np.zeros(0)

    def logits(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return the logit of P(CTR_1 > CTR_2 | G) before calibration, (n,): the mean of both orders."""
        turned = self.one_order_logits([comparison.swapped() for comparison in comparisons])
        return (self.one_order_logits(comparisons) - turned) / 2.0

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return P(CTR_1 > CTR_2 | G), calibrated, (n,)."""
        return np.asarray(1.0 / (1.0 + np.exp(-self.logits(comparisons) / self.temperature)))

    def save(self, folder: Path) -> None:
        """Write the model into a folder that `load` reads."""
        self._mllm.save(folder)
        heads = {"fc_cls": self.fc_cls.state_dict(), "fc_ctr": self.fc_ctr.state_dict()}
        torch.save(heads, folder / HEADS_FILE)
        record = RewardRecord(name=self.name, with_group=self.with_group, temperature=self.temperature)
        (folder / REWARD_FILE).write_bytes(msgspec.json.encode(record))

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Self:
        """Read a model that `save` wrote."""
        record = msgspec.json.decode((folder / REWARD_FILE).read_bytes(), type=RewardRecord)
        model = cls(GroupMllm.load(folder, dtype=dtype, device=device), with_group=record.with_group, name=record.name)
        heads = torch.load(folder / HEADS_FILE, weights_only=True, map_location=device)
        model.fc_cls.load_state_dict(heads["fc_cls"])
        model.fc_ctr.load_state_dict(heads["fc_ctr"])
        model.temperature = record.temperature
        return model.eval()


@torch.no_grad()
def _prefer_either(head: nn.Linear) -> None:
    """Start a head with what speaks for one picture speaking against the other, and nothing said by the last token."""
    width = head.in_features // 3
    nn.init.zeros_(head.bias)
    liking = torch.randn(width) / width**0.5
    head.weight[0] = torch.cat([liking, -liking, torch.zeros(width)])
    head.weight[1] = -head.weight[0]
