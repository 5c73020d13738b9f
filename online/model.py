"""The preference model: clicks from user attributes, the product's title and the creative's image, Eq. 1-4.

What its forms have in common is here; `online.gated` holds the one that is shipped, `online.paper` the paper's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from online.settings import ModelSettings


class Standardise(nn.Module):
    """Features shifted and scaled by constants, so that each has mean 0 and deviation 1 over what was registered.

    The constants are parameters that no gradient moves: they travel with the weights.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(dim), requires_grad=False)

    def fit(self, features: Tensor) -> None:
        """Set the constants from features, (n, dim); a feature that never differs is left unscaled."""
        deviation = features.std(dim=0, correction=0)
        self.mean.data.copy_(features.mean(dim=0))
        self.scale.data.copy_(torch.where(deviation > MIN_DEVIATION, 1 / deviation.clamp(min=MIN_DEVIATION), 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardised features."""
        return (features - self.mean) * self.scale


MIN_DEVIATION = 1e-4

PRIOR_LOGIT = -3.0
"""Logit that learning starts from: a CTR of about 5%."""

TitleSide = tuple[Tensor, ...]
"""What a form of the model makes of titles: e_t (P, D) first."""

ImageSide = tuple[Tensor, ...]
"""What a form of the model makes of images: e_v (C, D) first."""


class PreferenceModel(nn.Module, ABC):
    """Click logits and product-aware user embeddings.

    Parameters
    ----------
    cardinalities
        Number of codes of each of the N attributes.
    title_width, image_width
        Widths of the frozen encoders' features: of the whole title or image, or of one token.
    settings
        Widths of the layers.
    """

    USER_LAYERS: ClassVar[tuple[str, ...]] = ("fields", "user_linear", "user")
    """Layers that read the users' attributes."""

    FIELD_READERS: ClassVar[tuple[str, ...]] = ("user_linear.weight", "user.0.weight")
    """Weights whose columns each read one attribute's embedding."""

    field_starts: Tensor

    def __init__(
        self, cardinalities: Sequence[int], title_width: int, image_width: int, settings: ModelSettings
    ) -> None:
        super().__init__()
        d, d_fields = settings.d_model, len(cardinalities) * settings.d_field
        self.cardinalities = tuple(cardinalities)
        self.register_buffer("field_starts", torch.tensor([0, *cardinalities[:-1]]).cumsum(0), persistent=False)
        self.fields = nn.Embedding(sum(cardinalities), settings.d_field)
        self.user = nn.Sequential(nn.Linear(d_fields, settings.d_hidden), nn.GELU(), nn.Linear(settings.d_hidden, d))
        self.title_standard = Standardise(title_width)
        self.image_standard = Standardise(image_width)
        self.title = nn.Sequential(nn.LayerNorm(title_width), nn.Linear(title_width, d))
        self.image = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, d))
        self.user_norm = nn.LayerNorm(d)
        self.head_title = nn.Linear(d, 1)
        self.head_image = nn.Linear(d, 1)
        self.head_user = nn.Linear(d, 1)
        nn.init.constant_(self.head_title.bias, PRIOR_LOGIT)

    def freeze(self) -> None:
        """Work out once what follows from the weights alone: they will not change any more."""

    def field_of_parameter(self) -> Tensor:
        """Return the attribute that each weight belongs to alone, (W,) int64; N, their number, for what is shared.

        These are an attribute's embeddings and the columns of the layers that read them.
        """
        n_fields, d_field = len(self.cardinalities), self.fields.embedding_dim
        found = []
        for name, parameter in self.named_parameters():
            owners = torch.full(parameter.shape, n_fields)
            if name == "fields.weight":
                owners[:] = torch.repeat_interleave(torch.arange(n_fields), torch.tensor(self.cardinalities))[:, None]
            elif name in self.FIELD_READERS:
                owners[:] = torch.arange(n_fields).repeat_interleave(d_field)
            found.append(owners.reshape(-1))
        return torch.cat(found)

    @abstractmethod
    def fit_features(self, titles: Tensor, images: Tensor) -> None:
        """Set the constants of the features from those of all products and creatives."""

    @abstractmethod
    def titles(self, features: Tensor) -> TitleSide:
        """Return what the model makes of title features, (P, title_dim). Eq. 1."""

    @abstractmethod
    def images(self, features: Tensor) -> ImageSide:
        """Return what the model makes of image features, (C, image_dim). Eq. 1."""

    @abstractmethod
    def users(self, attributes: Tensor, titles: TitleSide, title_index: Tensor) -> Tensor:
        """Return e_{u|t}, Eq. 2: users as these products see them, (B, D).

        Parameters
        ----------
        attributes
            Codes, (B, N) int64.
        titles
            The distinct products.
        title_index
            Each row's product among them, (B,) int64.
        """

    @abstractmethod
    def forward(
        self, e_ut: Tensor, titles: TitleSide, title_index: Tensor, images: ImageSide, image_index: Tensor
    ) -> Tensor:
        """Return click logits, (B,): Eq. 3 and 4. ``image_index`` (B,) is each row's image among the distinct ones."""

    def cross(self, e_ut: Tensor, titles: TitleSide, images: ImageSide) -> Tensor:
        """Return the click logits of a product's users, (U, D), for each image, (U, C).

        ``titles`` is that of the product alone.
        """
        n_users, title_index = len(e_ut), torch.zeros(len(e_ut), dtype=torch.int64)
        columns = [
            self(e_ut, titles, title_index, images, torch.full((n_users,), column)) for column in range(len(images[0]))
        ]
        return torch.stack(columns, dim=1)

    @abstractmethod
    def preferences(
        self,
        e_ut: Tensor,
        titles: TitleSide,
        title_index: Tensor,
        images: ImageSide,
        image_index: Tensor,
        owners: Tensor,
    ) -> Tensor:
        """Return the part of the logits by which users differ in the images, less its mean over the product's, (B,).

        ``images`` are all creatives of the products, ``owners`` (C,) each one's product among the titles.
        """


class FlatParameters:
    """All parameters of a model as one contiguous vector, with its gradient beside it.

    The optimiser, the moving average and the state then handle one array each.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self.vector = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self.gradient = torch.zeros_like(self.vector)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.vector[start:end].view_as(parameter)
            if parameter.requires_grad:
                parameter.grad = self.gradient[start:end].view_as(parameter)
            start = end


def weight_decays(model: PreferenceModel, settings: ModelSettings) -> Tensor:
    """Return the weight decay of every parameter, flat: none for biases, norms and what no gradient moves."""
    decays = []
    for name, parameter in model.named_parameters():
        of_user = name.split(".")[0] in model.USER_LAYERS
        decay = settings.user_weight_decay if of_user else settings.weight_decay
        decays.append(
            torch.full((parameter.numel(),), decay if parameter.dim() > 1 and parameter.requires_grad else 0.0)
        )
    return torch.cat(decays)
