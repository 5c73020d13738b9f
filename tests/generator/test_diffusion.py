"""The diffusion renderer's own: what the mask and the control image do, and what it refuses to load."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMPipeline, StableDiffusionControlNetInpaintPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from pydantic import ValidationError
from transformers import CLIPConfig, CLIPImageProcessorPil

from benchmarks.random_pipeline import TINY, random_pipeline
from generator.checks import check_renderer_verdict
from generator.composition import LAYOUTS, full_mask, place
from generator.diffusion import DiffusionRenderer
from generator.diffusion_pipeline import DiffusersMissing, UnusableDevice, UnusablePipeline, open_pipeline
from generator.procedural import ProceduralRenderer
from generator.renderer import RenderRequest, UnusableSize
from generator.renderer_choice import choose_renderer
from generator.settings import DiffusionSettings, GeneratorSettings

SIZE_PX = 64
PROMPT = "misty mountains background for red flask, warm palette, soft daylight, no props, centred composition"


@pytest.fixture(scope="module")
def diffusion(diffusion_settings: DiffusionSettings) -> DiffusionRenderer:
    return DiffusionRenderer.load(diffusion_settings)


def painted(renderer: DiffusionRenderer, flask: Image.Image, seed: int = 3) -> np.ndarray:
    """Return a picture's levels, ready for differences."""
    return np.asarray(renderer.render(flask, PROMPT, seed=seed, size_px=SIZE_PX).image).astype(np.int16)


def settings_of(base: DiffusionSettings, **changes: object) -> DiffusionSettings:
    return base.model_copy(update=changes)


def test_the_product_stays_and_everything_else_is_painted(diffusion: DiffusionRenderer, flask: Image.Image) -> None:
    rendering = diffusion.render(flask, PROMPT, seed=3, size_px=128)
    placement = place(flask, LAYOUTS["centred"], 128)
    alpha = full_mask(placement, 128)
    shown, expected = np.asarray(rendering.image), np.zeros((128, 128, 3), np.uint8)
    box = placement.box
    expected[box.top : box.bottom, box.left : box.right] = placement.pixels[..., :3]
    inside, outside = alpha == 255, alpha == 0
    assert inside.sum() > 1_000
    assert (shown[inside] == expected[inside]).all()
    # No neutral ground is left anywhere, and no two seeds paint the same.
    assert shown[outside].std() > 5
    other = np.asarray(diffusion.render(flask, PROMPT, seed=4, size_px=128).image)
    assert (shown[outside] != other[outside]).any(axis=-1).mean() > 0.9
    assert (shown[inside] == other[inside]).all()


@pytest.mark.parametrize(("control_weight", "has_effect"), [(0.0, False), (0.3, True)])
def test_the_control_image_has_an_effect_once_the_zero_convolutions_are_not_zero(
    flask: Image.Image, diffusion_settings: DiffusionSettings, control_weight: float, has_effect: bool
) -> None:
    pictures = []
    for scale in (0.0, 1.0):
        pipeline = random_pipeline(TINY, seed=1, control_weight=control_weight)
        renderer = DiffusionRenderer(pipeline, settings_of(diffusion_settings, control_scale=scale))
        pictures.append(painted(renderer, flask))
    assert (np.abs(pictures[0] - pictures[1]).mean() > 1) == has_effect


@pytest.mark.parametrize("n_unet_channels", [4, 9])
@pytest.mark.parametrize("control", ["edges", "masked"])
def test_both_kinds_of_weights_and_both_control_images_paint(
    flask: Image.Image, diffusion_settings: DiffusionSettings, n_unet_channels: int, control: str
) -> None:
    pipeline = random_pipeline(TINY, seed=1, control_weight=0.3, n_unet_channels=n_unet_channels)
    renderer = DiffusionRenderer(pipeline, settings_of(diffusion_settings, control=control))
    assert painted(renderer, flask).std() > 5


def test_what_decides_the_pixels_is_in_the_version(
    diffusion: DiffusionRenderer, diffusion_settings: DiffusionSettings
) -> None:
    again = DiffusionRenderer(random_pipeline(TINY, seed=1, control_weight=0.3), diffusion_settings)
    assert again.version == diffusion.version
    others = {
        DiffusionRenderer(random_pipeline(TINY, seed=2, control_weight=0.3), diffusion_settings).version,
        DiffusionRenderer(random_pipeline(TINY, seed=1), diffusion_settings).version,
        DiffusionRenderer(
            random_pipeline(TINY, seed=1, control_weight=0.3), settings_of(diffusion_settings, n_steps=4)
        ).version,
    }
    assert len(others | {diffusion.version}) == 4
    batched = settings_of(diffusion_settings, batch_size=1)
    assert DiffusionRenderer(random_pipeline(TINY, seed=1, control_weight=0.3), batched).version == diffusion.version


def test_what_the_pipelines_safety_checker_finds_is_refused(
    flask: Image.Image, diffusion_settings: DiffusionSettings
) -> None:
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=tiny, vision_config={**tiny, "image_size": 32, "patch_size": 16}, projection_dim=16)
    )
    base = random_pipeline(TINY, seed=1)
    parts = {**base.components, "safety_checker": checker.eval()}
    parts["feature_extractor"] = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    renderer = DiffusionRenderer(StableDiffusionControlNetInpaintPipeline(**parts), diffusion_settings)
    for threshold, refused in ((2.0, False), (-2.0, True)):  # a cosine is never above 2, and always above -2
        torch.nn.init.constant_(checker.concept_embeds_weights, threshold)
        rendering = renderer.render(flask, PROMPT, seed=3, size_px=SIZE_PX)
        verdict = check_renderer_verdict(rendering.flagged)
        assert verdict.passed != refused
        assert ("unsafe" in verdict.detail) == refused


def test_settings_choose_the_renderer(diffusion_settings: DiffusionSettings) -> None:
    assert isinstance(choose_renderer(GeneratorSettings()), ProceduralRenderer)
    chosen = choose_renderer(GeneratorSettings(renderer="diffusion", diffusion=diffusion_settings))
    assert isinstance(chosen, DiffusionRenderer)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"diffusion": DiffusionSettings()}, "pipeline is not set"), ({"size_px": 500}, "500 is not divisible by 8")],
)
def test_settings_that_cannot_work_are_refused(
    diffusion_settings: DiffusionSettings, changes: dict[str, object], what: str
) -> None:
    with pytest.raises(ValidationError, match=what):
        GeneratorSettings(**{"renderer": "diffusion", "diffusion": diffusion_settings, **changes})


@pytest.mark.parametrize(("seed", "size_px", "what"), [(0, 100, "divisible by 8"), (2**63, 64, "seed")])
def test_numbers_that_cannot_be_painted_are_refused(
    diffusion: DiffusionRenderer, flask: Image.Image, seed: int, size_px: int, what: str
) -> None:
    with pytest.raises(UnusableSize, match=what):
        diffusion.render_many([RenderRequest(flask, PROMPT, seed)], size_px=size_px)


def test_without_diffusers_it_says_what_to_do(
    diffusion_settings: DiffusionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DiffusersMissing, match="install the extra"):
        open_pipeline(diffusion_settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(diffusion_settings: DiffusionSettings) -> None:
    with pytest.raises(UnusableDevice, match="'cuda'"):
        open_pipeline(settings_of(diffusion_settings, device="cuda"))


def test_a_separate_controlnet_is_used(diffusion_settings: DiffusionSettings, tmp_path: Path) -> None:
    pipeline = random_pipeline(TINY, seed=1, control_weight=0.6)
    pipeline.controlnet.save_pretrained(tmp_path / "other")
    loaded = open_pipeline(settings_of(diffusion_settings, controlnet=str(tmp_path / "other")))
    for name, weights in pipeline.controlnet.state_dict().items():
        assert torch.equal(loaded.controlnet.state_dict()[name], weights), name


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of things that are no Stable Diffusion with a ControlNet."""
    folder = tmp_path_factory.mktemp("shelf")
    base = random_pipeline(TINY, seed=1)
    DDIMPipeline(unet=base.unet, scheduler=base.scheduler).save_pretrained(folder / "other-kind")
    base.unet.save_pretrained(folder / "unet")
    ControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=64,
    ).save_pretrained(folder / "wider-controlnet")
    (folder / "empty").mkdir()
    (folder / "weights.ckpt").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("setting", "name", "why"),
    [
        ("pipeline", "nowhere", "is not there"),
        ("pipeline", "weights.ckpt", "is a file"),
        ("pipeline", "empty", "cannot be read"),
        ("pipeline", "other-kind", "holds a DDIMPipeline"),
        ("controlnet", "nowhere", "is not there"),
        ("controlnet", "unet", "is a UNet2DConditionModel"),
        ("controlnet", "empty", "cannot be loaded"),
        ("controlnet", "wider-controlnet", "cross_attention_dim 64"),
    ],
)
def test_what_is_no_pipeline_is_refused_with_the_reason(
    diffusion_settings: DiffusionSettings, shelf: Path, setting: str, name: str, why: str
) -> None:
    with pytest.raises(UnusablePipeline, match=why) as caught:
        open_pipeline(settings_of(diffusion_settings, **{setting: str(shelf / name)}))
    assert f"generator.diffusion.{setting}" in str(caught.value)
    assert "allowed:" in str(caught.value)


# diffusers hands huggingface_hub an argument that it no longer knows.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_hub_id_is_not_fetched_unasked(diffusion_settings: DiffusionSettings) -> None:
    with pytest.raises(UnusablePipeline, match="cannot be read"):
        open_pipeline(settings_of(diffusion_settings, pipeline="osmf-tests/no-such-pipeline"))


def test_a_pipeline_without_a_controlnet_needs_one(diffusion_settings: DiffusionSettings, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    parts = random_pipeline(TINY, seed=1).components
    del parts["controlnet"]
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    plain = settings_of(diffusion_settings, pipeline=str(tmp_path))
    with pytest.raises(UnusablePipeline, match="has none of its own"):
        open_pipeline(plain)
    random_pipeline(TINY, seed=1).controlnet.save_pretrained(tmp_path / "control")
    open_pipeline(settings_of(plain, controlnet=str(tmp_path / "control")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_paints_in_bfloat16_the_same_twice(
    diffusion_settings: DiffusionSettings, flask: Image.Image
) -> None:
    renderer = DiffusionRenderer.load(settings_of(diffusion_settings, device="cuda"))
    first, again = painted(renderer, flask), painted(renderer, flask)
    assert (first == again).all()
    assert "weights" in renderer.version
