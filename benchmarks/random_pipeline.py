"""Random pipelines: Stable Diffusion with a ControlNet in a given shape, its weights drawn at random.

No package carries diffusion weights. What can be shown without them is that everything fits together,
what the control image and the mask do, and how long it takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from generator.prompt import VOCABULARY

if TYPE_CHECKING:
    from generator.diffusion_pipeline import Pipeline

_N_TOKENS: Final = 77


@dataclass(frozen=True)
class PipelineShape:
    """The sizes of a pipeline's parts.

    ``unet_channels`` and ``vae_channels`` are per level, ``text_width`` is the text states' width.
    """

    name: str
    unet_channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    norm_groups: int
    n_unet_layers: int
    n_heads: int
    text_width: int
    n_text_layers: int
    n_text_heads: int


TINY: Final = PipelineShape("tiny", (16, 32), (8, 8, 16, 16), 8, 1, 2, 32, 2, 4)
"""Some 200,000 weights: a picture of 64 x 64 px in a tenth of a second on a CPU."""

SD15: Final = PipelineShape("sd15", (320, 640, 1280, 1280), (128, 256, 512, 512), 32, 2, 8, 768, 12, 12)
"""Stable Diffusion 1.5 with its ControlNet: 860 and 361 million weights."""


def random_pipeline(
    shape: PipelineShape, *, seed: int, n_unet_channels: int = 4, control_weight: float = 0.0
) -> Pipeline:
    """Build a pipeline with random weights on torch's default device.

    Parameters
    ----------
    shape
        Its sizes.
    seed
        Of the weights.
    n_unet_channels
        4 for a text-to-image UNet, 9 for an inpainting one.
    control_weight
        Standard deviation of the weights of the ControlNet's outputs. They are zero convolutions: at 0, as they are
        before training, the control image has no effect.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetInpaintPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        n_levels = len(shape.unet_channels)
        common: dict[str, Any] = {
            "block_out_channels": shape.unet_channels,
            "down_block_types": ("CrossAttnDownBlock2D",) * (n_levels - 1) + ("DownBlock2D",),
            "layers_per_block": shape.n_unet_layers,
            "norm_num_groups": shape.norm_groups,
            "attention_head_dim": shape.n_heads,
            "cross_attention_dim": shape.text_width,
        }
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=n_unet_channels,
            out_channels=4,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n_levels - 1),
            **common,
        )
        controlnet = ControlNetModel(in_channels=4, **common)  # it sees the latents alone, also beside 9 channels
        with torch.no_grad():
            for weights in _zero_convolutions(controlnet):
                weights.normal_(0.0, control_weight)
        vae = AutoencoderKL(
            block_out_channels=shape.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(shape.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(shape.vae_channels),
            latent_channels=4,
            layers_per_block=shape.n_unet_layers,
            norm_num_groups=shape.norm_groups,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=shape.text_width,
                intermediate_size=4 * shape.text_width,
                num_hidden_layers=shape.n_text_layers,
                num_attention_heads=shape.n_text_heads,
                max_position_embeddings=_N_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    built: tuple[Any, ...] = (unet, controlnet, vae, text_encoder)  # diffusers' models are torch modules: types deny it
    for part in built:
        part.eval()
    return StableDiffusionControlNetInpaintPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _zero_convolutions(controlnet: Any) -> Iterator[Any]:
    for block in (controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block):
        yield from block.parameters()
    yield from controlnet.controlnet_down_blocks.parameters()


def _tokenizer() -> Any:
    """Return a CLIP tokenizer that writes most words of the prompts' vocabulary as one token, so that 77 are enough."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    words = sorted({word for words in VOCABULARY.values() for phrase in words for word in re.findall(r"\w+", phrase)})
    tokens = ["<|startoftext|>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [token + "</w>" for token in tokens[2:]]
    merges: list[Any] = []
    for word in [*words, "background", "palette", "composition"]:
        letters = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(letters)):
            pair = ("".join(letters[:end]), letters[end])
            if pair not in merges:
                merges.append(pair)
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=_N_TOKENS
    )
