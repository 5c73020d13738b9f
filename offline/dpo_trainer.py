"""TRL's DPO trainer with a group: its collator, what it keeps of a row, and the weights of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl.trainer.dpo_trainer import DPOTrainer

from generator.mllm import IGNORED_LABEL, GroupMllm, MllmInput
from offline.dpo_loss import GroupRobustWeights, dpo_losses
from offline.pretrain import Pictures

ROW_COLUMNS: Final = ("prompt", "chosen", "rejected", "images", "group_feature", "weight", "group")
"""Columns of a row. The first four are TRL's; ``images`` are URIs, ``group`` is the number of the tuple's group."""


class StockCollatorRefused(TypeError):
    """A trainer that was given another collator than ours."""

    def __init__(self, collator: object) -> None:
        found = "none, which stands for TRL's own" if collator is None else type(collator).__name__
        super().__init__(
            f"data_collator is {found}; allowed is a GroupPreferenceCollator: any other one drops group_features "
            "without a word. Nothing was trained."
        )


class GroupPreferenceCollator:
    """Makes a batch of preference rows: all winners, then all losers, each with its prompt, picture and group.

    Parameters
    ----------
    mllm
        Whose inputs the batches are.
    pictures
        What opens the pictures.
    """

    def __init__(self, mllm: GroupMllm, pictures: Pictures) -> None:
        self._mllm = mllm
        self._pictures = pictures

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the inputs for n tuples, (2n, T), a ``completion_mask``, and ``weights`` and ``groups``, (n,)."""
        inputs = [
            MllmInput(
                row["prompt"],
                tuple(self._pictures.get(uri) for uri in row["images"]),
                None if row["group_feature"] is None else np.asarray(row["group_feature"], np.float32),
            )
            for row in rows
        ]
        answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        batch = dict(self._mllm.collate(inputs * 2, answers))
        batch["completion_mask"] = (batch.pop("labels") != IGNORED_LABEL).long()  # (2n, T)
        batch["weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        batch["groups"] = torch.tensor([row["group"] for row in rows])
        return batch


class RobustWeights(GroupRobustWeights, TrainerCallback, ExportableState):
    """Group-robust weights that go into the trainer's checkpoints, and come back from them."""

    def state(self) -> dict[str, Any]:
        """Return what makes these weights again."""
        return {
            "args": {"n_tuples": self.n_tuples, "step": self.step},
            "attributes": {"log_weights": self.log_weights},
        }


class GroupDpoTrainer(DPOTrainer):
    """TRL's trainer for tuples (s, G, y_w, y_l); a `RobustWeights` among its callbacks weighs the groups.

    Parameters
    ----------
    data_collator
        A `GroupPreferenceCollator`.
    **options
        As TRL's trainer takes them.

    Raises
    ------
    StockCollatorRefused
        If the collator is another one.
    """

    def __init__(self, *, data_collator: object = None, **options: Any) -> None:
        if not isinstance(data_collator, GroupPreferenceCollator):
            raise StockCollatorRefused(data_collator)
        super().__init__(data_collator=data_collator, **options)

    @property
    def robust_weights(self) -> RobustWeights | None:
        """The weights of the groups, if there are any; a resumed run has others than it was made with."""
        found = [callback for callback in self.callback_handler.callbacks if isinstance(callback, RobustWeights)]
        return found[0] if found else None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(ROW_COLUMNS)  # type: ignore[assignment]

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss with its mean over tuples weighted."""
        mode = "train" if model.training else "eval"
        read = {name: value for name, value in inputs.items() if name not in ("weights", "groups")}
        weights: Tensor = inputs["weights"]  # (n,)
        mask = read["completion_mask"]  # (2n, T)
        labels = read["input_ids"].masked_fill(mask == 0, IGNORED_LABEL)
        of_model = {name: value for name, value in read.items() if name != "completion_mask"}
        outputs = model(**of_model, labels=labels, use_cache=False, fused_lm_head=True)
        # The reference is the same model with its adapter off: the model that is not wrapped for several processes.
        references = self.compute_ref_log_probs(self.model, read)  # type: ignore[no-untyped-call]
        found = dpo_losses(
            outputs.log_probs.sum(dim=1),
            torch.cat(references),  # (2n,)
            mask.chunk(2)[0].sum(dim=1),
            beta=self.beta,
            sft_weight=dict(zip(self.loss_types, self.loss_weights, strict=True))["sft"],
        )
        robust = self.robust_weights
        if robust is not None and mode == "train":
            groups = inputs["groups"]
            sums = found.losses.detach().new_zeros(len(robust.n_tuples)).index_add_(0, groups, found.losses.detach())
            robust.learn(self.accelerator.reduce(sums), len(groups) * self.accelerator.num_processes)
            weights = weights * robust.tuple_weights(groups)
        margins = found.chosen_rewards - found.rejected_rewards
        for name, values in {
            "rewards/chosen": found.chosen_rewards,
            "rewards/rejected": found.rejected_rewards,
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
        }.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())
        loss = (weights * found.losses).mean()
        return (loss, outputs) if return_outputs else loss
