"""Benchmark of alignment: how fast the G-MLLM writes, and how much of the device Group-DPO and the GRM make use of.

With CUDA the model has LLaVA-7B's shape; without, a small one's. Weights are random, which take as long as trained
ones. What is timed is what the chain runs: `generator.mllm.GroupMllm.generate`, TRL's trainer with LoRA as
`offline.group_dpo` makes it, and the GRM, whose time goes into reading pictures: heads alone learn from pairs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from benchmarks.measured import Measured
from benchmarks.random_mllm import LLAVA_7B, SMALL, MllmShape, random_mllm
from generator.prompt import VOCABULARY, Prompt

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import TrainerCallback

    from generator.mllm import GroupMllm
    from offline.tuples import PreferenceTuple

TITLE: Final = "Oak chair with a woven seat"
N_PRODUCTS: Final = 4
_TERA: Final = 1e12

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What is run: the model's shape, and how much of everything goes through it at once.

    Batches are halved until they fit into the device's memory. ``matmul_size`` is the side of the matrices by which the
    device's peak is measured.
    """

    shape: MllmShape
    dtype: str
    batch_pictures: int
    batch_tuples: int
    batch_prompts: int
    n_new_tokens: int
    n_steps: int
    matmul_size: int


ON_CUDA: Final = Workload(LLAVA_7B, "bfloat16", 128, 16, 64, 48, 8, 8_192)
ON_CPU: Final = Workload(SMALL, "float32", 4, 2, 4, 8, 3, 512)


@dataclass(frozen=True)
class Rate:
    """How fast a step is: median over the steps, ``n_tokens`` that it reads, ``n_flops`` in all."""

    batch: int
    step_s: float
    n_tokens: int
    n_flops: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.n_tokens / self.step_s

    def peak_share(self, peak_flops_s: float) -> float:
        """Return which share of the device's peak the step made use of."""
        return self.n_flops / self.step_s / peak_flops_s


class StepMeter:
    """Takes the time of steps but the first, and counts what the last one does instead of timing it.

    Floating-point operations are those of matrix products and attention, forwards and backwards, as PyTorch counts
    them; what activation checkpointing computes again counts too.

    Parameters
    ----------
    mllm
        The model that is run, or the base of one.
    n_steps
        How many steps there will be, 3 or more.
    learns
        Whether tokens count that are read with a gradient, or all: a reference reads the same tokens without one.
    """

    def __init__(self, mllm: GroupMllm, n_steps: int, *, learns: bool = True) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self._on_cuda = mllm.device.type == "cuda"
        self._learns = learns
        self._last = n_steps - 1
        self._step = 0
        self._started_s = 0.0
        self._seconds: list[float] = []
        self._n_tokens = 0
        self._flops = FlopCounterMode(display=False)
        self._hook = mllm.model.model.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def begin(self) -> None:
        """Take note of a step's beginning."""
        if self._step == self._last:
            self._n_tokens = 0
            self._flops.__enter__()  # type: ignore[no-untyped-call]
        self._started_s = self._now_s()

    def end(self) -> None:
        """Take note of its end."""
        seconds = self._now_s() - self._started_s
        if self._step == self._last:
            self._flops.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._hook.remove()
        elif self._step > 0:
            self._seconds.append(seconds)
        self._step += 1

    def rate(self, batch: int) -> Rate:
        """Return what was measured."""
        return Rate(batch, float(np.median(self._seconds)), self._n_tokens, self._flops.get_total_flops())

    def _now_s(self) -> float:
        if self._on_cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if torch.is_grad_enabled() or not self._learns:
            self._n_tokens += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]


def bench_alignment(*, quick: bool) -> Measured:
    """Measure generation, a step of Group-DPO and the GRM's reading of pictures; on CUDA at LLaVA-7B's shape.

    Metrics: ``matmul_tflops``, the device's peak as a large matrix product in the weights' type shows it;
    ``generation_prompts_per_s``; ``dpo_tokens_per_s``, tokens that are learnt from, of both answers;
    ``grm_tokens_per_s`` and ``grm_pictures_per_s``; and ``dpo_peak_share`` and ``grm_peak_share``, floating-point
    operations a second over the peak.
    """
    import torch

    on_cuda = torch.cuda.is_available()
    workload, device = (ON_CUDA, "cuda") if on_cuda else (ON_CPU, "cpu")
    n_steps = 3 if quick else workload.n_steps
    dtype: torch.dtype = getattr(torch, workload.dtype)
    peak = _peak_flops_s(workload.matmul_size, dtype, device)
    mllm = random_mllm(workload.shape, seed=1, dtype=dtype, device=device)
    prompts = _fitting(workload.batch_prompts, lambda batch: _prompts_per_s(mllm, batch, workload.n_new_tokens))
    dpo = _fitting(workload.batch_tuples, lambda batch: _dpo_rate(mllm, batch, n_steps))
    # Last: it takes all weights out of training.
    grm = _fitting(workload.batch_pictures, lambda batch: _grm_rate(mllm, batch, n_steps))
    return Measured(
        {
            "matmul_tflops": peak / _TERA,
            "generation_prompts_per_s": prompts,
            "dpo_tokens_per_s": dpo.tokens_per_s,
            "dpo_peak_share": dpo.peak_share(peak),
            "grm_tokens_per_s": grm.tokens_per_s,
            "grm_pictures_per_s": grm.batch / grm.step_s,
            "grm_peak_share": grm.peak_share(peak),
        },
        detail={
            "alignment": {
                "model": f"{workload.shape.name}, random weights, {workload.dtype}",
                "weights": sum(weights.numel() for weights in mllm.model.parameters()),
                "device": torch.cuda.get_device_name() if on_cuda else "cpu",
                "new_tokens": workload.n_new_tokens,
                "dpo": _as_detail(dpo),
                "grm": _as_detail(grm),
            }
        },
    )


def _as_detail(rate: Rate) -> dict[str, float]:
    return {
        "batch": rate.batch,
        "step_s": rate.step_s,
        "tokens_per_step": rate.n_tokens,
        "tflop_per_step": rate.n_flops / _TERA,
    }


def _fitting(batch: int, measure: Callable[[int], T]) -> T:
    """Measure with the largest batch that fits: it is halved as long as the device's memory does not do."""
    import torch

    while True:
        try:
            return measure(batch)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def _peak_flops_s(size: int, dtype: torch.dtype, device: str) -> float:
    """Return the most floating-point operations a second that a product of two square matrices came to."""
    import torch

    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best_s = np.inf
    for _ in range(20):
        started_s = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - started_s)
    return float(2 * size**3 / best_s)


def _prompts_per_s(mllm: GroupMllm, batch: int, n_new_tokens: int) -> float:
    """Return prompts a second of a batch, each of so many tokens, after a batch that is not counted."""
    from generator.mllm import MllmInput

    rows = [MllmInput(f"Write a prompt for {TITLE}.", (_picture(0),), _group(row)) for row in range(batch)]
    for n_tokens in (2, n_new_tokens):
        mllm.model.generation_config.min_new_tokens = n_tokens  # random weights would stop anywhere
        started_s = time.perf_counter()
        mllm.generate(rows, max_new_tokens=n_tokens, temperature=1.0, batch_size=batch)
    mllm.model.generation_config.min_new_tokens = None
    return batch / (time.perf_counter() - started_s)


def _dpo_rate(mllm: GroupMllm, batch: int, n_steps: int) -> Rate:
    """Return the rate of steps of Group-DPO with LoRA; the model stays as it was."""
    from offline.group_dpo import make_trainer
    from offline.settings import GroupDpoSettings

    settings = GroupDpoSettings(n_epochs=1, batch_tuples=batch, held_out_share=0, learning_rate=1e-6)
    meter = StepMeter(mllm, n_steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = _tuples(batch * n_steps, Path(folder))
        trainer = make_trainer(mllm, rows, settings, folder=Path(folder) / "run", seed=1, callbacks=[_metering(meter)])
        try:
            trainer.train()
        finally:
            adapted: Any = trainer.model
            mllm.model = adapted.unload()
    return meter.rate(batch)


def _metering(meter: StepMeter) -> TrainerCallback:
    from transformers import TrainerCallback

    class Metering(TrainerCallback):
        """Tells the meter of the trainer's steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

    return Metering()


def _grm_rate(mllm: GroupMllm, batch: int, n_steps: int) -> Rate:
    """Return the rate at which the GRM reads pictures that it has not seen; what follows is no work beside that."""
    from generator.comparison import Comparison, Picture
    from generator.grm import Grm

    pictures = [Picture.of(_picture(seed)) for seed in range(batch)]
    comparisons = [Comparison("p0", TITLE, _group(0), pictures[0], picture) for picture in pictures]
    meter = StepMeter(mllm, n_steps, learns=False)
    for _ in range(n_steps):
        grm = Grm(mllm, layer=-1)  # one that remembers none of them
        meter.begin()
        grm.p_first_wins(comparisons)
        meter.end()
    return meter.rate(batch)


def _tuples(n_tuples: int, folder: Path) -> Sequence[PreferenceTuple]:
    from offline.tuples import PreferenceTuple

    _picture(0).save(folder / "product.png")
    scenes = VOCABULARY["scene"]
    texts = [
        Prompt(TITLE, scene, *(words[0] for slot, words in VOCABULARY.items() if slot != "scene")).text
        for scene in scenes
    ]
    return [
        PreferenceTuple(
            f"p{row % N_PRODUCTS}",
            row % 2,
            TITLE,
            (folder / "product.png").as_uri(),
            row % 4,
            _group(row),
            texts[row % len(texts)],
            texts[(row + 1) % len(texts)],
            0.9,
        )
        for row in range(n_tuples)
    ]


def _picture(seed: int) -> Image.Image:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _group(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a group's feature, (11, 128)."""
    return np.random.default_rng(seed).normal(size=(11, 128)).astype(np.float32)
