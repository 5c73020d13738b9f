"""Benchmark of rendering: milliseconds for one creative of the procedural renderer."""

from __future__ import annotations

import time
from itertools import cycle, islice

import numpy as np

from benchmarks.measured import Measured
from generator.procedural import ProceduralRenderer
from generator.prompt import VOCABULARY, Prompt

N_PICTURES = 120
N_QUICK_PICTURES = 36
SIZE_PX = 512


def bench_render(*, quick: bool) -> Measured:
    """Measure pictures of all scenes in turn, with a product placed, after three that are not counted."""
    from PIL import Image, ImageDraw

    cutout = Image.new("RGBA", (384, 384), (0, 0, 0, 0))
    ImageDraw.Draw(cutout).rounded_rectangle((96, 32, 288, 352), 40, fill=(200, 60, 50, 255))
    slots = [cycle(VOCABULARY[slot]) for slot in ("scene", "palette", "light", "prop", "composition")]
    n_pictures = N_QUICK_PICTURES if quick else N_PICTURES
    prompts = [Prompt("a red flask", *words).text for words in islice(zip(*slots, strict=False), n_pictures)]
    renderer = ProceduralRenderer()
    times_ms = []
    for seed, prompt in enumerate([*prompts[:3], *prompts]):
        started_s = time.perf_counter()
        renderer.render(cutout, prompt, seed=seed, size_px=SIZE_PX)
        times_ms.append(1000 * (time.perf_counter() - started_s))
    counted = np.array(times_ms[3:])
    return Measured(
        {
            "procedural_ms": float(np.median(counted)),
            "procedural_p95_ms": float(np.percentile(counted, 95)),
            "pictures": n_pictures,
        }
    )
