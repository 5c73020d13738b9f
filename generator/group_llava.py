"""The G-MLLM: LLaVA with a token for the group in front (section 3.3, Eq. 7).

The group token is put in by the backbone and not by the language-modelling head's class, because trainers that
fuse the head with the loss call the backbone alone.
"""

from os import PathLike
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from state.records import N_FEATURE_POINTS

GROUP_TOKEN: Final = "<group>"
"""Placeholder whose embedding is replaced by e_G."""

D_GROUP: Final = 128
"""Width of each point of a group feature."""

GROUP_PROJECTOR: Final = "group_projector"
"""Name of the MLP of e_G = MLP(G) in the backbone; an adapter keeps it among its `modules_to_save`."""


class GroupFeatureMismatch(ValueError):
    """The `<group>` placeholders of a batch and its group features are not one to one."""

    def __init__(self, n_placeholders: int, n_features: int) -> None:
        super().__init__(
            f"the ids hold {n_placeholders} {GROUP_TOKEN} placeholders and there are {n_features} group features; "
            "allowed is one feature for each placeholder, in the order of the rows. A prompt without a group has "
            "neither. Nothing was computed: the model would have read an embedding that stands for no group."
        )
        self.n_placeholders = n_placeholders
        self.n_features = n_features


class GroupFeatureShapeError(ValueError):
    """Group features of another shape than the model was made for."""

    def __init__(self, shape: tuple[int, ...], n_points: int, width: int) -> None:
        super().__init__(
            f"the group features have shape {shape}; allowed is (n, {n_points}, {width}), Eq. 6. Nothing was computed."
        )
        self.shape = shape


class GroupLlavaConfig(LlavaConfig):
    """A LLaVA's configuration with that of the group token.

    ``group_token_id`` is the placeholder's id, ``group_n_points`` x ``group_width`` the size of a group feature and
    ``group_hidden_size`` the width of the MLP's hidden layer.
    """

    model_type = "group_llava"

    group_token_id: int = 32002
    group_n_points: int = N_FEATURE_POINTS
    group_width: int = D_GROUP
    group_hidden_size: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over the settings of a native LLaVA, but not its model type: checkpoint keys are converted by that."""
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.__dict__.pop("model_type", None)


class GroupProjector(torch.nn.Module):
    """e_G = MLP(G): a group feature (n, 11, 128) becomes one token (n, D) of the language model."""

    def __init__(self, config: GroupLlavaConfig) -> None:
        super().__init__()
        self.n_points, self.width = config.group_n_points, config.group_width
        n_in = config.group_n_points * config.group_width
        # The scale of embeddings drifts while their encoder learns; their direction is what tells groups apart.
        self.norm = torch.nn.LayerNorm(n_in)
        self.linear_1 = torch.nn.Linear(n_in, config.group_hidden_size)
        self.act = torch.nn.GELU()
        self.linear_2 = torch.nn.Linear(config.group_hidden_size, config.get_text_config().hidden_size)

    @torch.no_grad()
    def fit_scale(self, group_features: torch.Tensor) -> None:
        """Start from what sets groups apart: scale and shift of the norm make each input's mean 0 and deviation 1.

        Most of a group's feature is what all groups have in common, some ten times what they differ by: from it a
        projector would learn only slowly to tell them apart. Weights that were learnt behind another scale are not
        taken along, so it is for a projector that has learnt nothing.

        Parameters
        ----------
        group_features
            Features of many groups, (n, 11, 128).
        """
        self.norm.reset_parameters()
        normed = self.norm(group_features.flatten(1).to(self.norm.weight))  # (n, 1408)
        deviation = normed.std(dim=0, correction=0)
        # Inputs that hardly vary are rounding, and stay as small as they are.
        scale = 1.0 / deviation.clamp(min=1e-3 + 0.1 * float(deviation.mean()))
        self.norm.weight.copy_(scale)
        self.norm.bias.copy_(-normed.mean(dim=0) * scale)

    def forward(self, group_features: torch.Tensor) -> torch.Tensor:
        """Return one token for each group feature.

        Raises
        ------
        GroupFeatureShapeError
            If the features are not (n, 11, 128).
        """
        token: torch.Tensor = self.linear_2(self.act(self.linear_1(self.normed(group_features))))  # (n, D)
        return token

    def normed(self, group_features: torch.Tensor) -> torch.Tensor:
        """Return group features as they enter the MLP: at the scale of what sets groups apart, (n, 1408).

        Raises
        ------
        GroupFeatureShapeError
            If the features are not (n, 11, 128).
        """
        if group_features.ndim != 3 or group_features.shape[1:] != (self.n_points, self.width):
            raise GroupFeatureShapeError(tuple(group_features.shape), self.n_points, self.width)
        normed: torch.Tensor = self.norm(group_features.flatten(1).to(self.linear_1.weight.dtype))
        return normed


class GroupLlavaModel(LlavaModel):
    """The backbone: LLaVA's, with the embeddings of `<group>` placeholders replaced by e_G (Eq. 7)."""

    config: GroupLlavaConfig

    def __init__(self, config: GroupLlavaConfig) -> None:
        super().__init__(config)
        self.group_projector = GroupProjector(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        group_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Return the language model's hidden states over group, image and text tokens.

        Parameters
        ----------
        input_ids
            (B, T), with a placeholder where the group token goes and as many image placeholders as image tokens.
        group_features
            (n, 11, 128): one for each `<group>` in the ids, in the order of the rows.
        mm_encoder_outputs
            Image features that are there already (``"image"``), in place of ``pixel_values``.

        Raises
        ------
        GroupFeatureMismatch
            If placeholders and features are not one to one.
        """
        if input_ids is None:
            if group_features is not None:
                raise GroupFeatureMismatch(0, len(group_features))
            return self._read(
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                mm_encoder_outputs=mm_encoder_outputs,
                **kwargs,
            )
        embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        is_group = input_ids == self.config.group_token_id
        n_placeholders, n_features = int(is_group.sum()), 0 if group_features is None else len(group_features)
        if n_placeholders != n_features:
            raise GroupFeatureMismatch(n_placeholders, n_features)
        if group_features is not None:
            tokens = self.group_projector(group_features).to(embeds.device, embeds.dtype)  # (n, D)
            embeds = embeds.masked_scatter(is_group.unsqueeze(-1), tokens)
        images = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            images["image"] = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        if images.get("image") is not None:
            # Placed here, by the ids: what the parent class sees are embeddings alone.
            features = torch.cat(list(images["image"].pooler_output)).to(embeds.device, embeds.dtype)  # (n, D)
            is_image = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features[None])
            embeds = embeds.masked_scatter(is_image, features)
        output = self._read(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if images.get("image") is not None:
            output["image_outputs"] = images["image"]
        return output

    def _read(self, **inputs: Any) -> ModelOutput:
        output: ModelOutput = super().forward(return_dict=True, **inputs)
        return output


class GroupLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The G-MLLM: the backbone and the language-modelling head; `generate` takes ``group_features``."""

    config: GroupLlavaConfig

    def __init__(self, config: GroupLlavaConfig) -> None:
        # Not LLaVA's own: that would build its backbone only for ours to take its place.
        super(LlavaForConditionalGeneration, self).__init__(config)
        text = config.get_text_config()
        self.model = GroupLlavaModel(config)
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        group_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Return the logits, and the loss where ``labels`` (B, T) are given; see the backbone for the inputs."""
        # `generate` reads this signature: what it does not find here by name it refuses or leaves out.
        output: ModelOutput = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            group_features=group_features,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        return output

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the weights under their own names.

        By default they would get those of old LLaVA checkpoints, and a `Trainer` that goes on from a checkpoint loads
        it without converting them back: it then trains random weights, with nothing but a warning.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        group_features: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass the group features on while the ids hold the placeholder: at prefill, or always without a cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["group_features"] = group_features
        return inputs


def _register() -> None:
    """Make the classes known to transformers: by model type, and with LLaVA's conversion of checkpoint keys.

    Without the conversion a native LLaVA checkpoint loads as random weights, with nothing but a warning.
    """
    AutoConfig.register(GroupLlavaConfig.model_type, GroupLlavaConfig)
    AutoModel.register(GroupLlavaConfig, GroupLlavaModel)
    AutoModelForImageTextToText.register(GroupLlavaConfig, GroupLlavaForConditionalGeneration)
    for native, ours in (("llava", GroupLlavaConfig.model_type), ("LlavaModel", GroupLlavaModel.__name__)):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(native))


_register()
