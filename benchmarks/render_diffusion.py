"""Benchmark of the diffusion renderer: images per second by batch size, and where the time goes.

With CUDA it is a pipeline of Stable Diffusion 1.5's shape with a ControlNet, at 512 x 512 px and 20 steps; without,
the tiny one of the tests. Both have random weights, which take as long as trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measured import Measured
from benchmarks.random_pipeline import SD15, TINY, PipelineShape, random_pipeline
from generator.renderer import RenderRequest
from generator.settings import DiffusionSettings

if TYPE_CHECKING:
    import torch

    from generator.diffusion import DiffusionRenderer
    from generator.diffusion_pipeline import Pipeline

PARTS: Final = ("unet", "controlnet", "vae.encoder", "vae.decoder", "text_encoder")


@dataclass(frozen=True)
class Workload:
    """What is painted: in what shape of pipeline, how large, in how many steps, in batches of which sizes."""

    shape: PipelineShape
    size_px: int
    n_steps: int
    batch_sizes: tuple[int, ...]


ON_CUDA: Final = Workload(SD15, 512, 20, (1, 2, 4, 8, 16, 32))
ON_CPU: Final = Workload(TINY, 64, 4, (1, 2, 4, 8))


class PartClock:
    """Adds up the time that a pipeline's parts take, while it is entered.

    On CUDA the device's own events are used: waiting for each part would slow the others down.

    Parameters
    ----------
    pipeline
        The pipeline, whose parts are not compiled.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._parts = {name: _part(pipeline, name) for name in PARTS}
        self._on_cuda = pipeline.device.type == "cuda"
        self._marks: dict[str, list[Any]] = {name: [] for name in PARTS}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> PartClock:
        for name, part in self._parts.items():
            self._hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._mark(name)))
            self._hooks.append(part.register_forward_hook(lambda *_, name=name: self._mark(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _mark(self, name: str) -> None:
        if not self._on_cuda:
            self._marks[name].append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks[name].append(event)

    def seconds(self) -> dict[str, float]:
        """Return the time of every part, in seconds; the device has to be idle."""
        total = {}
        for name, marks in self._marks.items():
            pairs = zip(marks[::2], marks[1::2], strict=True)
            if self._on_cuda:
                total[name] = sum(start.elapsed_time(end) for start, end in pairs) / 1000
            else:
                total[name] = sum(end - start for start, end in pairs)
        return total


def _part(pipeline: Pipeline, name: str) -> torch.nn.Module:
    part: Any = pipeline
    for step in name.split("."):
        part = getattr(part, step)
    return part  # type: ignore[no-any-return]


def bench_diffusion(requests: Sequence[RenderRequest], *, quick: bool) -> Measured:
    """Measure images per second at every batch size, compiled too on CUDA, and the parts' shares at the best one."""
    if find_spec("diffusers") is None:
        return Measured({}, detail={"diffusion": "not measured: diffusers is not installed"})
    import torch

    from generator.diffusion import DiffusionRenderer
    from generator.diffusion_pipeline import device_of, dtype_of

    on_cuda = torch.cuda.is_available()
    workload = ON_CUDA if on_cuda else ON_CPU
    sizes = workload.batch_sizes[:3] if quick else workload.batch_sizes
    settings = DiffusionSettings(n_steps=workload.n_steps, batch_size=max(sizes))
    device = device_of(settings)
    with torch.device(device):
        pipeline = random_pipeline(workload.shape, seed=1, control_weight=0.02)
    pipeline = pipeline.to(device, dtype_of(settings, device))
    renderer = DiffusionRenderer(pipeline, settings, size_px=workload.size_px)
    rates = _rates(renderer, workload.size_px, sizes, requests)
    shares = _shares(renderer, workload.size_px, max(rates, key=rates.__getitem__), requests)
    compiled_rates: dict[int, float] = {}
    if on_cuda and not quick:  # on the CPU it pays only for pipelines that are too slow there anyway
        compiled = settings.model_copy(update={"compile": True})
        compiled_rates = _rates(DiffusionRenderer(pipeline, compiled), workload.size_px, sizes, requests)
    best_size, best_rate = max([*rates.items(), *compiled_rates.items()], key=lambda pair: pair[1])
    return Measured(
        {
            "diffusion_images_per_s": best_rate,
            "diffusion_outside_unet_share": 1.0 - shares["unet"],
            "diffusion_batch_size": best_size,
            "diffusion_size_px": workload.size_px,
            "diffusion_steps": workload.n_steps,
        },
        detail={
            "diffusion": {
                "pipeline": f"{workload.shape.name}, random weights",
                "device": torch.cuda.get_device_name() if on_cuda else "cpu",
                "images_per_s_by_batch_size": {str(size): rate for size, rate in rates.items()},
                "images_per_s_by_batch_size_compiled": {str(size): rate for size, rate in compiled_rates.items()},
                "share_by_part": shares,
            }
        },
    )


def _rates(
    renderer: DiffusionRenderer, size_px: int, batch_sizes: Sequence[int], requests: Sequence[RenderRequest]
) -> dict[int, float]:
    """Return images per second by batch size, each after a batch that is not counted."""
    rates = {}
    for size in batch_sizes:
        batch = _of_length(requests, size)
        renderer.render_many(batch, size_px=size_px)
        n_batches = max(batch_sizes) // size
        started_s = time.perf_counter()
        for _ in range(n_batches):  # pictures come back as arrays, so the device is idle when they do
            renderer.render_many(batch, size_px=size_px)
        rates[size] = n_batches * size / (time.perf_counter() - started_s)
    return rates


def _shares(
    renderer: DiffusionRenderer, size_px: int, batch_size: int, requests: Sequence[RenderRequest]
) -> dict[str, float]:
    """Return each part's share of the time of one batch; the rest is Python, copies, and the product's overlay."""
    batch = _of_length(requests, batch_size)
    with PartClock(renderer.pipeline) as clock:
        started_s = time.perf_counter()
        renderer.render_many(batch, size_px=size_px)
        whole_s = time.perf_counter() - started_s
    shares = {name: seconds / whole_s for name, seconds in clock.seconds().items()}
    return shares | {"rest": 1.0 - sum(shares.values())}


def _of_length(requests: Sequence[RenderRequest], length: int) -> list[RenderRequest]:
    return [requests[i % len(requests)] for i in range(length)]
