"""The G-MLLM as it is used: inputs of instruction, pictures and group in, text out.

One class for every preset. What stands where in the sequence is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor
from transformers.utils.import_utils import is_flash_attn_2_available

from generator.efficientnet_tower import EfficientNetTowerConfig
from generator.group_llava import GROUP_TOKEN, GroupLlavaForConditionalGeneration
from generator.statistics_tower import StatisticsTowerConfig

OWN_TOWERS: Final = (EfficientNetTowerConfig, StatisticsTowerConfig)
"""Frozen eyes that a saved G-MLLM may have and transformers does not bring: it loads them once they are imported."""

IGNORED_LABEL = -100
"""Label of a token that the loss leaves out."""

Floats = npt.NDArray[np.float32]


class InstructionHoldsPlaceholder(ValueError):
    """An instruction or answer whose own words hold a placeholder."""

    def __init__(self, text: str, placeholder: str) -> None:
        super().__init__(
            f"the text {text!r} holds {placeholder!r}; allowed is any text without it: where group and pictures stand "
            "is decided by the input's other fields. Nothing was encoded."
        )


class AttentionUnavailable(RuntimeError):
    """An attention that this machine cannot run."""

    def __init__(self, attention: str) -> None:
        super().__init__(
            f"generator.mllm.attention is {attention!r}, which needs a CUDA device and the package flash-attn; allowed "
            "without them are 'sdpa', which takes PyTorch's own flash kernels where it can, and 'eager'. "
            "No model was made."
        )


def check_attention(attention: str) -> None:
    """Raise `AttentionUnavailable` where an attention, by transformers' name, cannot run: it would be downloaded."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise AttentionUnavailable(attention)


@dataclass(frozen=True, eq=False, slots=True)
class MllmInput:
    """One input of the G-MLLM: X_T, X_V and G of Eq. 7.

    ``images`` come in the order in which the instruction speaks of them; ``group_feature`` is (11, 128), or None
    for a prompt without a group token.
    """

    instruction: str
    images: tuple[Image.Image, ...] = ()
    group_feature: Floats | None = None


class GroupMllm:
    """A G-MLLM: the model with the processor of its texts and pictures.

    Parameters
    ----------
    model
        The model, on its device and in its dtype.
    processor
        The processor. Its chat template says how an instruction is laid out, its tokenizer's end-of-sequence
        token ends an answer.
    """

    def __init__(self, model: GroupLlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self.model = model
        if isinstance(model.config.vision_config, OWN_TOWERS):  # loading would leave their weights to be trained
            model.model.vision_tower.requires_grad_(False)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        # LLaVA's template leaves the first token to the tokenizer; the group comes right after it.
        first = self.tokenizer("a")["input_ids"][0]
        self._start: str = self.tokenizer.bos_token if first == self.tokenizer.bos_token_id else ""
        # A placeholder that the model wrote itself would stand for no group and no picture.
        self.model.generation_config.suppress_tokens = sorted({model.config.group_token_id, processor.image_token_id})
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    def prompt_text(self, instruction: str, *, n_images: int = 0, group: bool = False) -> str:
        """Return an instruction as the model reads it, with the group's placeholder first and one for each picture.

        Special tokens are all in the text: it is tokenized without adding any. This is the ``prompt`` column of a
        trainer's dataset.

        Raises
        ------
        InstructionHoldsPlaceholder
            If the instruction's own words hold a placeholder.
        """
        self._refuse_placeholders(instruction)
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": instruction}]
        messages: Any = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._start + (GROUP_TOKEN if group else "") + text.removeprefix(self._start)

    def answer_text(self, answer: str) -> str:
        """Return an answer as the model writes it, ended: the ``completion``, ``chosen`` or ``rejected`` column."""
        self._refuse_placeholders(answer)
        return f"{answer}{self.tokenizer.eos_token}"

    def encode(self, inputs: Sequence[MllmInput], answers: Sequence[str] | None = None) -> BatchFeature:
        """Return a batch for the model on its device; see `collate`."""
        return self.collate(inputs, answers).to(self.device)

    def collate(self, inputs: Sequence[MllmInput], answers: Sequence[str] | None = None) -> BatchFeature:
        """Return a batch for the model, padded on the left; a trainer moves it to its device.

        Parameters
        ----------
        inputs
            The rows; some may have pictures or a group and others not.
        answers
            What the model is to say to each; adds ``labels``, with all other tokens ignored by the loss.

        Returns
        -------
        ``input_ids`` and ``attention_mask`` (B, T), with answers ``labels`` (B, T), and where any row has some
        ``pixel_values`` (n, 3, H, W) and ``group_features`` (n, 11, 128), in the order of the rows.
        """
        prompts = [
            self.prompt_text(row.instruction, n_images=len(row.images), group=row.group_feature is not None)
            for row in inputs
        ]
        images = [image.convert("RGB") for row in inputs for image in row.images]
        processed = self.processor(images=images or None, text=prompts, add_special_tokens=False)
        ids: list[list[int]] = processed["input_ids"]
        starts = [len(of_row) for of_row in ids]
        if answers is not None:
            ended = [self.answer_text(answer) for answer in answers]
            completions = self.tokenizer(ended, add_special_tokens=False)["input_ids"]
            ids = [prompt + completion for prompt, completion in zip(ids, completions, strict=True)]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        data = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}  # (B, T)
        if answers is not None:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
            for row, (of_row, start) in enumerate(zip(ids, starts, strict=True)):
                labels[row, : labels.shape[1] - len(of_row) + start] = IGNORED_LABEL
            data["labels"] = labels
        if images:
            pixels = processed["pixel_values"]
            data["pixel_values"] = torch.as_tensor(np.stack(pixels)).to(self.model.dtype)  # (n, 3, H, W)
        groups = [row.group_feature for row in inputs if row.group_feature is not None]
        if groups:
            data["group_features"] = torch.from_numpy(np.stack(groups).astype(np.float32))  # (n, 11, 128)
        return BatchFeature(data)

    @torch.no_grad()
    def generate(
        self,
        inputs: Sequence[MllmInput],
        *,
        max_new_tokens: int,
        n_samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[list[str]]:
        """Return ``n_samples`` answers to each input; the same arguments give the same answers.

        Parameters
        ----------
        inputs
            The rows.
        max_new_tokens
            Longest answer, in tokens.
        temperature, top_p
            Temperature and nucleus of the draws; temperature 0 takes the likeliest token each time.
        seed
            Seed of the draws; the process's own random state is left as it is.
        batch_size
            Rows, times samples, that go through the model at once.
        """
        was_training = self.model.training
        self.model.train(False)
        # Without top_k = 0 it would be 50, whatever the checkpoint: not the model's own distribution.
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        n_rows = max(1, batch_size // n_samples)
        answers: list[list[str]] = []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for first in range(0, len(inputs), n_rows):
                batch = self.encode(inputs[first : first + n_rows])
                ids = self.model.generate(
                    **batch,
                    **{"do_sample": False, **drawing},
                    num_return_sequences=n_samples if drawing else 1,
                    max_new_tokens=max_new_tokens,
                )
                texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                texts = [text.strip() for text in texts]
                for row in range(batch["input_ids"].shape[0]):
                    of_row = texts[row * n_samples : (row + 1) * n_samples] if drawing else [texts[row]] * n_samples
                    answers.append(of_row)
        self.model.train(was_training)
        return answers

    @torch.no_grad()
    def log_probs(
        self, inputs: Sequence[MllmInput], answers: Sequence[str], *, batch_size: int = 16
    ) -> npt.NDArray[np.float64]:
        """Return how probable the model thinks each answer to its input, its end included, in nats, (n,)."""
        was_training = self.model.training
        self.model.train(False)
        found: list[float] = []
        for first in range(0, len(inputs), batch_size):
            batch = self.encode(inputs[first : first + batch_size], answers[first : first + batch_size])
            labels = batch.pop("labels")[:, 1:]  # (B, T - 1)
            logits = self.model(**batch).logits[:, :-1].float()  # (B, T - 1, V)
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
            )
            found += (-losses.sum(dim=1)).tolist()
        self.model.train(was_training)
        return np.array(found, np.float64)

    def save(self, folder: Path) -> None:
        """Write model and processor into a folder that `load` reads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "sdpa"
    ) -> GroupMllm:
        """Read a G-MLLM that `save` wrote; for anybody's LLaVA see `generator.mllm_presets`.

        Raises
        ------
        AttentionUnavailable
            If this machine cannot run that attention.
        """
        check_attention(attention)
        model = GroupLlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        torch.nn.Module.to(model, device)
        return cls(model, LlavaProcessor.from_pretrained(folder, local_files_only=True))

    def _refuse_placeholders(self, text: str) -> None:
        for placeholder in (GROUP_TOKEN, self.processor.image_token):
            if placeholder in text:
                raise InstructionHoldsPlaceholder(text, placeholder)
