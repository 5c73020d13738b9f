"""The preference model: clicks from user attributes, the product's title and the creative's image.

Eq. 1-4 of the paper with changes without which users of different products are grouped alike. The
title weights the attribute fields before the user MLP, which makes the user-by-product interaction
multiplicative. The attended title enters through a gate that depends on the user. The attended
image is gated by the user too, and its head starts as a plain sum, so that the user-by-image part
of the logit is bilinear from the first step. With one title vector and one image vector, attention
over them is their value projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

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

RIDGE = 0.3
"""Ridge of the regression that tells products by their standardised titles; it leaves errors of a hundredth."""

HEEDED_SHARE = 0.95
"""Share of its weights that a product gives to the attribute that has been found to decide."""

IDLE_WEIGHT = 0.5
"""Weight below which a product does not heed an attribute; 1 is the mean of all attributes."""

PRIOR_LOGIT = -3.0
"""Logit that learning starts from: a CTR of about 5%."""


class Titles(NamedTuple):
    """Products as their titles describe them: ``e_t`` (P, D), and how much each heeds every attribute, (P, N)."""

    e_t: Tensor
    field_weights: Tensor


class Images(NamedTuple):
    """Creatives as their images show them: ``e_v`` and ``value``, both (C, D)."""

    e_v: Tensor
    value: Tensor


class PreferenceModel(nn.Module):
    """Click logits and product-aware user embeddings.

    Parameters
    ----------
    cardinalities
        Number of codes of each of the N attributes.
    title_dim, image_dim
        Widths of the frozen encoders' features.
    settings
        Widths of the layers.
    """

    USER_LAYERS: ClassVar[tuple[str, ...]] = ("fields", "user_linear", "user")
    """Layers that read the users' attributes."""

    field_starts: Tensor

    def __init__(self, cardinalities: Sequence[int], title_dim: int, image_dim: int, settings: ModelSettings) -> None:
        super().__init__()
        n_fields, d = len(cardinalities), settings.d_model
        self.cardinalities = tuple(cardinalities)
        starts = torch.tensor([0, *cardinalities[:-1]]).cumsum(0)
        self.register_buffer("field_starts", starts, persistent=False)
        self.fields = nn.Embedding(sum(cardinalities), settings.d_field)
        # The linear path learns a single attribute's effect long before the MLP finds those of several.
        self.user_linear = nn.Linear(n_fields * settings.d_field, d)
        self.user = nn.Sequential(
            nn.Linear(n_fields * settings.d_field, settings.d_hidden), nn.GELU(), nn.Linear(settings.d_hidden, d)
        )
        self.title_standard = Standardise(title_dim)
        self.image_standard = Standardise(image_dim)
        self.title = nn.Sequential(nn.LayerNorm(title_dim), nn.Linear(title_dim, d))
        self.image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, d))
        self.field_gate = nn.Linear(d, n_fields)
        # What has been found about which attribute decides, beside what the gate learns; no gradient moves it.
        self.evidence = nn.Linear(title_dim, n_fields).requires_grad_(False)
        nn.init.zeros_(self.evidence.weight)
        nn.init.zeros_(self.evidence.bias)
        self.title_value = nn.Linear(d, d)
        self.title_gate = nn.Linear(d, d)
        self.user_norm = nn.LayerNorm(d)
        self.image_value = nn.Linear(d, d)
        self.image_gate = nn.Linear(d, d)
        self.title_turn = nn.Linear(d, d)
        nn.init.zeros_(self.title_turn.weight)
        nn.init.ones_(self.title_turn.bias)
        self.head_title = nn.Linear(d, 1)
        self.head_image = nn.Linear(d, 1)
        self.head_user = nn.Linear(d, 1)
        self.head_interaction = nn.Linear(d, 1, bias=False)
        nn.init.constant_(self.head_interaction.weight, d**-0.5)
        nn.init.constant_(self.head_title.bias, PRIOR_LOGIT)

    def titles(self, features: Tensor) -> Titles:
        """Return e_t and attribute weights of title features, (P, title_dim). Eq. 1."""
        standard = self.title_standard(features)
        e_t = self.title(standard)  # (P, D)
        logits = self.field_gate(e_t) + self.evidence(standard)  # (P, N)
        return Titles(e_t, torch.softmax(logits, dim=-1) * len(self.cardinalities))

    def images(self, features: Tensor) -> Images:
        """Return e_v and its value of image features, (C, image_dim). Eq. 1."""
        e_v = self.image(self.image_standard(features))  # (C, D)
        return Images(e_v, self.image_value(e_v))

    def users(self, attributes: Tensor, titles: Titles, title_index: Tensor) -> Tensor:
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
        u = self.fields(attributes + self.field_starts)  # (B, N, d_field)
        weighted = (u * titles.field_weights[title_index].unsqueeze(-1)).flatten(1)  # (B, N * d_field)
        e_u = self.user_linear(weighted) + self.user(weighted)  # (B, D)
        attended = self.title_value(titles.e_t)[title_index]  # (B, D): attention over one key is its value
        embedded: Tensor = self.user_norm(e_u + torch.sigmoid(self.title_gate(e_u)) * attended)  # (B, D)
        return embedded

    def tastes(self, e_ut: Tensor, titles: Titles, title_index: Tensor) -> Tensor:
        """Return what of e_{u|t} decides which images a user prefers, (B, D) to (B, D).

        The user-by-image part of the logit is the product of this vector and the image's value: two users with
        equal tastes prefer the same creatives, however much else the model knows apart about them.
        """
        turn = self.title_turn(titles.e_t) * self.head_interaction.weight  # (P, D)
        tastes: Tensor = self.image_gate(e_ut) * turn[title_index]  # (B, D)
        return tastes

    def forward(self, e_ut: Tensor, titles: Titles, title_index: Tensor, images: Images, image_index: Tensor) -> Tensor:
        """Return click logits, (B,): Eq. 3 and 4. ``image_index`` (B,) is each row's image among the distinct ones."""
        logits: Tensor = (
            self.head_title(titles.e_t)[title_index] + self.head_image(images.e_v)[image_index] + self.head_user(e_ut)
        ).squeeze(-1) + (self.tastes(e_ut, titles, title_index) * images.value[image_index]).sum(dim=-1)  # (B,)
        return logits

    @torch.no_grad()
    def heeded_fields(self, features: Tensor) -> Tensor:
        """Return the attribute that each product heeds most, (P,) int64, of title features (P, title_dim)."""
        heeded: Tensor = self.titles(features).field_weights.argmax(dim=1)
        return heeded

    @torch.no_grad()
    def forget_idle(self, features: Tensor, changed: Tensor, fresh: PreferenceModel) -> None:
        """Let attributes that no unchanged product heeds start afresh: what is known of them is wrong now.

        Parameters
        ----------
        features
            Title features of all products, (P, title_dim).
        changed
            Products whose tastes have changed, (P,) bool.
        fresh
            A new model.
        """
        idle = self._idle_fields(features[~changed])
        self._start_afresh(fresh, idle, ~idle)

    @torch.no_grad()
    def heed(self, features: Tensor, chosen: Tensor, field: int, fresh: PreferenceModel) -> None:
        """Let some products heed an attribute more than any other, because it has been found to decide.

        What the title tells is changed as little as it can be so that the other products stay as they are (ridge
        regression over all titles); a new product with a title like theirs is changed with them. An attribute that no
        other product heeds is embedded afresh.

        Parameters
        ----------
        features
            Title features of all products, (P, title_dim).
        chosen
            The products, (P,) bool.
        field
            The attribute.
        fresh
            A new model.
        """
        standard = self.title_standard(features)
        logits = self.field_gate(self.title(standard)) + self.evidence(standard)  # (P, N)
        target = logits.clone()
        rows = torch.nonzero(chosen)[:, 0]
        heeded = logits[rows].argmax(dim=1)
        target[rows, heeded], target[rows, field] = logits[rows, field], logits[rows, heeded]
        others = target[rows]
        others[:, field] = -torch.inf
        least = others.logsumexp(dim=1) + math.log(HEEDED_SHARE / (1 - HEEDED_SHARE))
        target[rows, field] = torch.maximum(target[rows, field], least)
        inputs = torch.cat([standard, torch.ones(len(standard), 1)], dim=1).double()  # (P, title_dim + 1)
        ridge = RIDGE * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        update = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (target - logits).double())
        if bool((heeded != field).any()):
            idle = self._idle_fields(features[~chosen])
            self._start_afresh(fresh, idle & (torch.arange(len(idle)) == field), ~idle)
        self.evidence.weight.add_(update[:-1].T.float())
        self.evidence.bias.add_(update[-1].float())

    def _idle_fields(self, features: Tensor) -> Tensor:
        """Return which attributes no product of some titles heeds, (N,) bool."""
        return (self.titles(features).field_weights < IDLE_WEIGHT).all(dim=0)

    def _start_afresh(self, fresh: PreferenceModel, chosen: Tensor, like: Tensor) -> None:
        """Embed and read some attributes, (N,) bool, as a new model does, on the scale of others of this one, ``like``.

        The scale matters: gates multiply the attributes that are heeded many times, so that their embeddings are
        small, and one of a new model's size among them would drown what the layers above know of the others.
        """
        if not bool(like.any()):
            like = chosen
        rows_of = torch.repeat_interleave(torch.arange(len(self.cardinalities)), torch.tensor(self.cardinalities))
        columns_of = torch.repeat_interleave(torch.arange(len(self.cardinalities)), self.fields.embedding_dim)
        rows, columns = chosen[rows_of], chosen[columns_of]
        self.fields.weight[rows] = _scaled(fresh.fields.weight[rows], self.fields.weight[like[rows_of]])
        for layer, source in zip(self._field_readers(), fresh._field_readers(), strict=True):
            layer.weight[:, columns] = _scaled(source.weight[:, columns], layer.weight[:, like[columns_of]])

    def _field_readers(self) -> tuple[nn.Linear, nn.Linear]:
        first = self.user[0]
        assert isinstance(first, nn.Linear)
        return self.user_linear, first


def _scaled(weights: Tensor, like: Tensor) -> Tensor:
    """Return weights with the root mean square of others."""
    scaled: Tensor = weights * (like.square().mean().sqrt() / weights.square().mean().sqrt().clamp(min=1e-12))
    return scaled


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
