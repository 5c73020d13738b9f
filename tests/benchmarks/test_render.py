from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.random_pipeline import SD15, TINY, random_pipeline
from benchmarks.render import N_QUICK_PICTURES, bench_render, flask_requests
from benchmarks.render_diffusion import ON_CPU, PARTS, PartClock
from benchmarks.variety import median_distance
from generator.diffusion import DiffusionRenderer
from generator.settings import DiffusionSettings
from online.encoders import HashedImageEncoder
from simulator.settings import SimulatorSettings


def test_pictures_take_time_and_differ(simulator: SimulatorSettings) -> None:
    measured = bench_render(quick=True, simulator=simulator)
    metrics = measured.metrics
    assert metrics["pictures"] == N_QUICK_PICTURES
    assert 0 < metrics["procedural_ms"] <= metrics["procedural_p95_ms"]
    assert metrics["diffusion_images_per_s"] > 0
    assert 0 < metrics["diffusion_outside_unet_share"] < 1
    assert metrics["prompt_distance"] > 0.1
    assert metrics["catalogue_distance"] > 0.1
    shares = measured.detail["diffusion"]["share_by_part"]
    assert sum(shares.values()) == pytest.approx(1)
    assert {*shares} == {*PARTS, "rest"}


def test_the_clock_runs_for_the_parts_and_stops_at_the_end() -> None:
    settings = DiffusionSettings(n_steps=2, device="cpu")
    renderer = DiffusionRenderer(random_pipeline(TINY, seed=1), settings)
    requests = flask_requests(1)
    with PartClock(renderer.pipeline) as clock:
        renderer.render_many(requests, size_px=ON_CPU.size_px)
    seconds = clock.seconds()
    assert all(seconds[part] > 0 for part in PARTS)
    renderer.render_many(requests, size_px=ON_CPU.size_px)
    assert clock.seconds() == seconds


def test_the_distance_of_equal_pictures_is_none_and_of_unlike_ones_about_one() -> None:
    files = []
    for level in range(8):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    encoder = HashedImageEncoder(tokens=True)
    assert median_distance([files[0]] * 4, encoder) == pytest.approx(0, abs=1e-6)
    assert median_distance(files, encoder) == pytest.approx(1, abs=0.15)


def test_the_large_shape_is_that_of_stable_diffusion_1_5() -> None:
    with torch.device("meta"):  # shapes alone, no memory
        pipeline = random_pipeline(SD15, seed=1)
    n_weights = {
        part: sum(weights.numel() for weights in getattr(pipeline, part).parameters())
        for part in ("unet", "controlnet", "vae")
    }
    # As published with the weights of runwayml/stable-diffusion-v1-5 and lllyasviel/sd-controlnet-canny.
    assert n_weights == {"unet": 859_520_964, "controlnet": 361_279_120, "vae": 83_653_863}
