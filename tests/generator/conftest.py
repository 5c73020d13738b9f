from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.random_pipeline import TINY, random_pipeline
from generator.certificate import load_identity
from generator.manifest import ManifestSigner
from generator.procedural import ProceduralRenderer
from generator.renderer import Renderer
from generator.settings import CheckSettings, DiffusionSettings, GeneratorSettings, SigningSettings
from generator.storage import FileSigner
from tests.generator.bench import CHECKS, NOW_MS, SIZE_PX, Bench, picture, write_online_state


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """A tiny network is slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A saved text-to-image pipeline with its ControlNet, whose control image has an effect."""
    folder = tmp_path_factory.mktemp("diffusion") / "tiny"
    random_pipeline(TINY, seed=1, control_weight=0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def diffusion_settings(tiny_pipeline: Path) -> DiffusionSettings:
    return DiffusionSettings(pipeline=str(tiny_pipeline), n_steps=3, batch_size=3, device="cpu")


@pytest.fixture(scope="session", params=["procedural", "diffusion"])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    """Every renderer there is."""
    if request.param == "procedural":
        return ProceduralRenderer()
    from generator.diffusion import DiffusionRenderer

    return DiffusionRenderer.load(request.getfixturevalue("diffusion_settings"))


@pytest.fixture(scope="session")
def flask() -> Image.Image:
    """A product with a body, a neck and soft edges, on a transparent ground."""
    image = Image.new("RGBA", (240, 320), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((40, 90, 200, 300), 30, fill=(200, 60, 40, 255))
    draw.rectangle((100, 30, 140, 90), fill=(40, 40, 60, 255))
    draw.rectangle((60, 160, 180, 220), fill=(240, 230, 200, 255))
    return image.resize((120, 160), Image.Resampling.LANCZOS)


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> FileSigner:
    identity = load_identity(SigningSettings(folder=tmp_path_factory.mktemp("signing") / "made"), now_ms=NOW_MS)
    assert identity is not None
    return ManifestSigner(identity)


@pytest.fixture
def make_bench(tmp_path: Path, signer: FileSigner) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(*, title: str = "Red kettle", **changed: object) -> Bench:
        folder = tmp_path / str(len(benches))
        folder.mkdir()
        write_online_state(folder / "state", picture(folder / "cutout.png"), title)
        settings = GeneratorSettings(
            size_px=SIZE_PX,
            storage_url=str(folder / "creatives"),
            review_url=str(folder / "review"),
            state_path=folder / "own",
            models_dir=folder / "models",
            **{"checks": CheckSettings(**CHECKS), **changed},
        )
        benches.append(Bench(folder, settings, signer))
        return benches[-1]

    yield make
    for bench in benches:
        bench.online.close()
