"""Benchmark of rendering: how long a creative takes, and how far apart the creatives of different prompts are."""

from __future__ import annotations

import time
from itertools import cycle, islice

import numpy as np

from benchmarks.measured import Measured
from benchmarks.render_diffusion import bench_diffusion
from benchmarks.variety import bench_variety
from generator.procedural import ProceduralRenderer
from generator.prompt import VOCABULARY, Prompt
from generator.renderer import RenderRequest
from simulator.settings import SimulatorSettings

N_PICTURES = 120
N_QUICK_PICTURES = 12
SIZE_PX = 512


def bench_render(*, quick: bool, simulator: SimulatorSettings | None = None) -> Measured:
    """Measure both renderers' speed, with a product placed, and the variety of what the procedural one draws.

    Metrics: ``procedural_ms``, the median over ``pictures`` of all scenes in turn, and its 95th percentile;
    ``procedural_cpu_ms``, the same in processor time, which other processes do not stretch; and those of
    :func:`benchmarks.render_diffusion.bench_diffusion` and :func:`benchmarks.variety.bench_variety`. ``simulator``
    names the catalogue.
    """
    requests = flask_requests(N_QUICK_PICTURES if quick else N_PICTURES)
    renderer = ProceduralRenderer()
    times_ms, cpu_ms = [], []
    for request in [*requests[:3], *requests]:  # the first three are not counted
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        renderer.render(request.cutout, request.prompt, seed=request.seed, size_px=SIZE_PX)
        times_ms.append(1000 * (time.perf_counter() - started_s))
        cpu_ms.append(1000 * (time.process_time() - cpu_started_s))
    counted = np.array(times_ms[3:])
    diffusion = bench_diffusion(requests, quick=quick)
    variety = bench_variety(simulator or SimulatorSettings(), quick=quick)
    return Measured(
        {
            "procedural_ms": float(np.median(counted)),
            "procedural_p95_ms": float(np.percentile(counted, 95)),
            "procedural_cpu_ms": float(np.median(cpu_ms[3:])),
            "pictures": len(requests),
            **diffusion.metrics,
            **variety.metrics,
        },
        detail=diffusion.detail | variety.detail,
    )


def flask_requests(n_pictures: int) -> list[RenderRequest]:
    """Return requests for a drawn flask in every scene in turn, the other slots' words turning with it."""
    from PIL import Image, ImageDraw

    cutout = Image.new("RGBA", (384, 384), (0, 0, 0, 0))
    ImageDraw.Draw(cutout).rounded_rectangle((96, 32, 288, 352), 40, fill=(200, 60, 50, 255))
    words = zip(*(cycle(words) for words in VOCABULARY.values()), strict=False)
    prompts = [Prompt("a red flask", *row).text for row in islice(words, n_pictures)]
    return [RenderRequest(cutout, prompt, seed) for seed, prompt in enumerate(prompts)]
