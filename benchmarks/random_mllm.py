"""Random G-MLLMs: LLaVA in a given shape, its weights drawn at random, which take as long as trained ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from generator.mllm import GroupMllm


@dataclass(frozen=True)
class MllmShape:
    """The sizes of a LLaVA: its language model's, then those of its vision tower, a CLIP."""

    name: str
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    vocab_size: int
    vision_hidden_size: int
    vision_intermediate_size: int
    n_vision_layers: int
    n_vision_heads: int
    image_px: int
    patch_px: int


LLAVA_7B: Final = MllmShape("llava-1.5-7b", 4096, 11008, 32, 32, 32_064, 1024, 4096, 24, 16, 336, 14)
"""LLaVA 1.5 with 7 billion weights: Vicuna-7B that sees through CLIP-L/14 at 336 px, 576 tokens a picture."""

SMALL: Final = MllmShape("small", 64, 192, 2, 4, 4_096, 32, 64, 2, 2, 32, 16)


def random_mllm(shape: MllmShape, *, seed: int, dtype: torch.dtype, device: str) -> GroupMllm:
    """Build a G-MLLM with random weights on a device, where they are drawn too."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from generator.group_llava import GROUP_TOKEN, GroupLlavaConfig, GroupLlavaForConditionalGeneration
    from generator.mllm import GroupMllm
    from generator.mllm_presets import IMAGE_TOKEN, clip_processor, fit_tokenizer

    tokenizer = fit_tokenizer(vocab_size=min(shape.vocab_size, 4_096))
    tokens = tokenizer.get_vocab()
    config = GroupLlavaConfig(
        text_config=LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_heads,
            max_position_embeddings=4_096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden_size,
            intermediate_size=shape.vision_intermediate_size,
            num_hidden_layers=shape.n_vision_layers,
            num_attention_heads=shape.n_vision_heads,
            image_size=shape.image_px,
            patch_size=shape.patch_px,
        ),
        image_token_index=tokens[IMAGE_TOKEN],
        image_seq_length=(shape.image_px // shape.patch_px) ** 2,
        group_token_id=tokens[GROUP_TOKEN],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = clip_processor(tokenizer, image_px=shape.image_px, patch_px=shape.patch_px)
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = GroupLlavaForConditionalGeneration(config)
    torch.nn.Module.to(model, device, dtype)
    return GroupMllm(model, processor)
