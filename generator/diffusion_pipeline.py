"""The diffusion pipeline: finds Stable Diffusion and its ControlNet, checks them, and puts them on a device."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from generator.renderer import RendererUnavailable
from generator.settings import DiffusionSettings

log = logging.getLogger(__name__)

Pipeline: TypeAlias = Any
"""A ``StableDiffusionControlNetInpaintPipeline``. Its parts are registered at run time, so types know none of them."""

ControlNet: TypeAlias = Any
"""A ``ControlNetModel``, whose ``config`` types do not know either."""

PIPELINE_KINDS: Final = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
"""Kinds of saved pipelines whose parts can be used; all hold the same VAE, text encoder and UNet."""

WEIGHED_PARTS: Final = ("unet", "controlnet", "vae", "text_encoder")
"""Parts of a pipeline whose weights decide the pixels."""

IMAGE_MIB: Final = 768
"""Memory that one picture of 512 x 512 px needs while it is painted, with guidance, in MiB: an upper estimate."""

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED_PIPELINE: Final = (
    "a folder written by a pipeline's save_pretrained, or a hub id (see generator.diffusion.download)"
)
_SAVED_CONTROLNET: Final = "a folder written by ControlNetModel.save_pretrained, or a hub id"


class DiffusersMissing(RendererUnavailable):
    """The package diffusers is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the diffusion renderer needs the package diffusers, which is not installed: install the extra "
            '`diffusion`, or set generator.renderer to "procedural". Nothing was rendered.'
        )


class UnusablePipeline(RendererUnavailable):
    """A pipeline or ControlNet that is not there, cannot be read, or is of the wrong kind."""

    def __init__(self, setting: str, value: str | None, why: str, allowed: str) -> None:
        super().__init__(f"generator.diffusion.{setting} {value!r} {why}; allowed: {allowed}. Nothing was rendered.")


class UnusableDevice(RendererUnavailable):
    """A device that this machine lacks."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"generator.diffusion.device is {device!r} and torch sees no such device; allowed here: auto, cpu. "
            "Nothing was rendered."
        )


def open_pipeline(settings: DiffusionSettings) -> Pipeline:
    """Load the pipeline that the settings name, with its ControlNet, in their number format, on their device.

    Nothing but safetensors is read: a pickled checkpoint can run code.

    Raises
    ------
    DiffusersMissing
        The package is not installed.
    UnusablePipeline
        A part is missing, unreadable or of the wrong kind.
    UnusableDevice
        The named device is not there.
    """
    try:
        from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetInpaintPipeline
    except ModuleNotFoundError as error:
        raise DiffusersMissing from error
    device = device_of(settings)
    named = settings.pipeline
    if named is None:
        raise UnusablePipeline("pipeline", None, "is not set", _SAVED_PIPELINE)
    source = _source("pipeline", named, _SAVED_PIPELINE)
    options: dict[str, Any] = {"local_files_only": not settings.download, "revision": settings.revision}
    try:
        index = DiffusionPipeline.load_config(source, **options)
    except (OSError, ValueError) as error:
        raise UnusablePipeline("pipeline", named, f"cannot be read ({_first_line(error)})", _SAVED_PIPELINE) from error
    kind = index.get("_class_name")
    if kind not in PIPELINE_KINDS:
        raise UnusablePipeline("pipeline", named, f"holds a {kind}", f"a {', '.join(PIPELINE_KINDS)}")
    loading = {"dtype": dtype_of(settings, device), "use_safetensors": True}
    parts: dict[str, Any] = {}
    if settings.controlnet is not None:
        parts["controlnet"] = _open_controlnet(ControlNetModel, settings.controlnet, settings, loading)
    elif "controlnet" not in index:
        raise UnusablePipeline("controlnet", None, f"is not set, and the {kind} has none of its own", _SAVED_CONTROLNET)
    try:
        pipeline = StableDiffusionControlNetInpaintPipeline.from_pretrained(source, **options, **loading, **parts)
    except (OSError, ValueError) as error:
        raise UnusablePipeline(
            "pipeline", named, f"cannot be loaded ({_first_line(error)})", _SAVED_PIPELINE
        ) from error
    _check_parts(pipeline, settings)
    if pipeline.safety_checker is None:
        log.warning(
            "pipeline %s has no safety checker of its own: only the generator's checks look at its pictures", named
        )
    return pipeline.to(device)


def _open_controlnet(kind: Any, named: str, settings: DiffusionSettings, loading: dict[str, Any]) -> ControlNet:
    source = _source("controlnet", named, _SAVED_CONTROLNET)
    local = not settings.download
    try:
        found = kind.load_config(source, local_files_only=local).get("_class_name")
        if found != kind.__name__:
            raise UnusablePipeline("controlnet", named, f"is a {found}", f"a {kind.__name__}")
        return kind.from_pretrained(source, local_files_only=local, **loading)
    except UnusablePipeline:
        raise
    except (OSError, ValueError) as error:
        why = f"cannot be loaded ({_first_line(error)})"
        raise UnusablePipeline("controlnet", named, why, _SAVED_CONTROLNET) from error


def _source(setting: str, named: str, allowed: str) -> str:
    """Return what diffusers is told to load: a folder that is there, or what can be a hub id."""
    path = Path(named).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise UnusablePipeline(setting, named, "is a file", allowed)
    if _HUB_ID.fullmatch(named) is None:
        raise UnusablePipeline(setting, named, "is not there", allowed)
    return named


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _check_parts(pipeline: Pipeline, settings: DiffusionSettings) -> None:
    """Check that the parts were made for each other, which diffusers finds out in the middle of the first picture."""
    from diffusers import ControlNetModel

    is_one = isinstance(pipeline.controlnet, ControlNetModel)
    if not is_one:
        kind = type(pipeline.controlnet).__name__
        raise UnusablePipeline("controlnet", settings.controlnet, f"is a {kind}", "one ControlNet")
    unet, controlnet = pipeline.unet.config, pipeline.controlnet.config
    if unet.in_channels not in (4, 9):
        why = f"has a UNet of {unet.in_channels} channels"
        raise UnusablePipeline("pipeline", settings.pipeline, why, "4 (text to image) or 9 (inpainting)")
    if controlnet.in_channels != 4:
        why = f"takes latents of {controlnet.in_channels} channels"
        raise UnusablePipeline("controlnet", settings.controlnet, why, "4")
    for name in ("cross_attention_dim", "block_out_channels"):
        of_unet, of_controlnet = unet[name], controlnet[name]
        if list(_as_tuple(of_unet)) != list(_as_tuple(of_controlnet)):
            why = f"has {name} {of_controlnet}, and the pipeline's UNet {of_unet}: they were not made for each other"
            raise UnusablePipeline("controlnet", settings.controlnet, why, "a ControlNet of the same Stable Diffusion")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def device_of(settings: DiffusionSettings) -> torch.device:
    """Return the device that the settings mean on this machine.

    Raises
    ------
    UnusableDevice
        The named device is not there.
    """
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UnusableDevice(settings.device)
    return torch.device(settings.device)


def dtype_of(settings: DiffusionSettings, device: torch.device) -> torch.dtype:
    """Return the number format of the weights on a device."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]


def tune_pipeline(pipeline: Pipeline, settings: DiffusionSettings, size_px: int) -> None:
    """Make a loaded pipeline quick on its device.

    On CUDA the convolutions get their faster memory format, and attention stays whole (fused kernels) unless
    the memory left cannot hold a batch: then attention and the VAE work in slices, slower and smaller.
    """
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline.device
    if device.type == "cuda":
        for part in (pipeline.unet, pipeline.controlnet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
        free_mib = torch.cuda.mem_get_info(device)[0] / 2**20
        needed_mib = settings.batch_size * IMAGE_MIB * (size_px / 512) ** 2
        if free_mib < needed_mib:
            log.warning(
                "%.0f MiB are free on %s and a batch of %d needs about %.0f: attention is sliced, which is slower; "
                "a smaller generator.diffusion.batch_size would do without",
                free_mib,
                device,
                settings.batch_size,
                needed_mib,
            )
            pipeline.enable_attention_slicing()
            pipeline.vae.enable_slicing()
    if settings.compile:
        for part in (pipeline.unet, pipeline.controlnet):
            part.compile()


def weights_sha256(pipeline: Pipeline) -> str:
    """Return the SHA-256 of the weights that decide the pixels, with names and shapes, and of the tokenizer."""
    digest = hashlib.sha256(pipeline.tokenizer.backend_tokenizer.to_str().encode())
    for part in WEIGHED_PARTS:
        for name, tensor in sorted(getattr(pipeline, part).state_dict().items()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
