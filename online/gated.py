"""The gated form of the preference model, the one that is shipped.

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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from online.model import ImageSide, PreferenceModel, TitleSide
from online.settings import ModelSettings

RIDGE = 0.3
"""Ridge of the regression that tells products by their standardised titles; it leaves errors of a hundredth."""

HEEDED_SHARE = 0.95
"""Share of its weights that a product gives to the attribute that has been found to decide."""

IDLE_WEIGHT = 0.5
"""Weight below which a product does not heed an attribute; 1 is the mean of all attributes."""


class Titles(NamedTuple):
    """Products as their titles describe them: ``e_t`` (P, D), and how much each heeds every attribute, (P, N)."""

    e_t: Tensor
    field_weights: Tensor


class Images(NamedTuple):
    """Creatives as their images show them: ``e_v`` and ``value``, both (C, D)."""

    e_v: Tensor
    value: Tensor


class GatedModel(PreferenceModel):
    """The preference model with attributes weighted by the title, and images gated by the user.

    Parameters
    ----------
    cardinalities
        Number of codes of each of the N attributes.
    title_dim, image_dim
        Widths of the frozen encoders' features.
    settings
        Widths of the layers.
    """

    def __init__(self, cardinalities: Sequence[int], title_dim: int, image_dim: int, settings: ModelSettings) -> None:
        super().__init__(cardinalities, title_dim, image_dim, settings)
        self._frozen_table: Tensor | None = None
        n_fields, d = len(cardinalities), settings.d_model
        # The linear path learns a single attribute's effect long before the MLP finds those of several.
        self.user_linear = nn.Linear(n_fields * settings.d_field, d)
        self.field_gate = nn.Linear(d, n_fields)
        # What has been found about which attribute decides, beside what the gate learns; no gradient moves it.
        self.evidence = nn.Linear(title_dim, n_fields).requires_grad_(False)
        nn.init.zeros_(self.evidence.weight)
        nn.init.zeros_(self.evidence.bias)
        self.title_value = nn.Linear(d, d)
        self.title_gate = nn.Linear(d, d)
        self.image_value = nn.Linear(d, d)
        self.image_gate = nn.Linear(d, d)
        self.title_turn = nn.Linear(d, d)
        nn.init.zeros_(self.title_turn.weight)
        nn.init.ones_(self.title_turn.bias)
        self.head_interaction = nn.Linear(d, 1, bias=False)
        nn.init.constant_(self.head_interaction.weight, d**-0.5)

    def fit_features(self, titles: Tensor, images: Tensor) -> None:
        """Set the constants of the features from those of all products and creatives."""
        self.title_standard.fit(titles)
        self.image_standard.fit(images)

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

    def users(self, attributes: Tensor, titles: TitleSide, title_index: Tensor) -> Tensor:
        """Return e_{u|t}, Eq. 2, (B, D)."""
        e_t, field_weights = titles
        linear, hidden = self._read(attributes, field_weights[title_index])
        e_u = linear + self.user[1:](hidden)  # (B, D)
        attended = self.title_value(e_t)[title_index]  # (B, D): attention over one key is its value
        embedded: Tensor = self.user_norm(e_u + torch.sigmoid(self.title_gate(e_u)) * attended)  # (B, D)
        return embedded

    def _read(self, attributes: Tensor, field_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the linear path, (B, D), and the MLP's first layer, (B, d_hidden), read of weighted attributes.

        Parameters
        ----------
        attributes
            Codes, (B, N) int64.
        field_weights
            How much each row's product heeds every attribute, (B, N).
        """
        codes = attributes + self.field_starts
        # Both layers are linear: where nothing is learnt, what they make of every value is worked out once and summed
        # by row, which takes a quarter of the time. Of fewer rows than that many values it would take longer.
        if torch.is_grad_enabled() or codes.numel() < len(self.fields.weight):
            weighted = (self.fields(codes) * field_weights.unsqueeze(-1)).flatten(1)  # (B, N * d_field)
            return self.user_linear(weighted), self.user[0](weighted)
        readers = self._field_readers()
        table = self._value_table() if self._frozen_table is None else self._frozen_table
        read = nn.functional.embedding_bag(codes, table, mode="sum", per_sample_weights=field_weights)
        read += torch.cat([layer.bias for layer in readers])
        linear, hidden = torch.split(read, [layer.out_features for layer in readers], dim=1)
        return linear, hidden

    def _value_table(self) -> Tensor:
        """Return what the first layers read of each value of each attribute, (sum of cardinalities, D + d_hidden)."""
        by_field = torch.split(
            torch.cat([layer.weight for layer in self._field_readers()]), self.fields.embedding_dim, dim=1
        )
        values = torch.split(self.fields.weight, list(self.cardinalities))
        return torch.cat([of_field @ weight.T for of_field, weight in zip(values, by_field, strict=True)])

    @torch.no_grad()
    def freeze(self) -> None:
        """Work out once what is read of the attributes' values."""
        self._frozen_table = self._value_table()

    def tastes(self, e_ut: Tensor, titles: TitleSide, title_index: Tensor) -> Tensor:
        """Return what of e_{u|t} decides which images a user prefers, (B, D) to (B, D).

        The user-by-image part of the logit is the product of this vector and the image's value: two users with
        equal tastes prefer the same creatives, however much else the model knows apart about them.
        """
        turn = self.title_turn(titles[0]) * self.head_interaction.weight  # (P, D)
        tastes: Tensor = self.image_gate(e_ut) * turn[title_index]  # (B, D)
        return tastes

    def forward(
        self, e_ut: Tensor, titles: TitleSide, title_index: Tensor, images: ImageSide, image_index: Tensor
    ) -> Tensor:
        """Return click logits, (B,): Eq. 3 and 4."""
        e_v, value = images
        logits: Tensor = (
            self.head_title(titles[0])[title_index] + self.head_image(e_v)[image_index] + self.head_user(e_ut)
        ).squeeze(-1) + (self.tastes(e_ut, titles, title_index) * value[image_index]).sum(dim=-1)  # (B,)
        return logits

    def cross(self, e_ut: Tensor, titles: TitleSide, images: ImageSide) -> Tensor:
        """Return the click logits of a product's users for each image, (U, C)."""
        e_v, value = images
        of_users = self.head_title(titles[0]) + self.head_user(e_ut)  # (U, 1)
        tastes = self.tastes(e_ut, titles, torch.zeros(len(e_ut), dtype=torch.int64))
        logits: Tensor = of_users + self.head_image(e_v).T + tastes @ value.T
        return logits

    def preferences(
        self,
        e_ut: Tensor,
        titles: TitleSide,
        title_index: Tensor,
        images: ImageSide,
        image_index: Tensor,
        owners: Tensor,
    ) -> Tensor:
        """Return what users' tastes add to the logits, less the mean over the product's creatives, (B,)."""
        value = images[1]  # (C, D)
        n_titles = len(titles[0])
        sums = torch.zeros(n_titles, value.shape[1]).index_add_(0, owners, value)
        means = sums / torch.bincount(owners, minlength=n_titles).clamp(min=1).unsqueeze(-1)  # (P, D)
        own = value[image_index] - means[title_index]  # (B, D)
        preferences: Tensor = (self.tastes(e_ut, titles, title_index) * own).sum(dim=-1)
        return preferences

    @torch.no_grad()
    def heeded_fields(self, features: Tensor) -> Tensor:
        """Return the attribute that each product heeds most, (P,) int64, of title features (P, title_dim)."""
        heeded: Tensor = self.titles(features).field_weights.argmax(dim=1)
        return heeded

    @torch.no_grad()
    def heed(self, features: Tensor, chosen: Tensor, field: int, likeness: Tensor, fresh: GatedModel) -> None:
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
        likeness
            Its values as they have been clicked, (V, R): values that prefer the same images lie together.
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
            if bool(idle[field]):
                self._start_afresh(fresh, field, likeness, ~idle)
        self.evidence.weight.add_(update[:-1].T.float())
        self.evidence.bias.add_(update[-1].float())

    def _idle_fields(self, features: Tensor) -> Tensor:
        """Return which attributes no product of some titles heeds, (N,) bool."""
        return (self.titles(features).field_weights < IDLE_WEIGHT).all(dim=0)

    def _start_afresh(self, fresh: GatedModel, field: int, likeness: Tensor, like: Tensor) -> None:
        """Embed and read an attribute anew, on the scale of others of this model, ``like`` (N,) bool.

        Values that have been clicked alike start alike: from random places their tastes would have to find together
        one by one. The scale matters: gates multiply the attributes that are heeded many times, so that their
        embeddings are small, and one of a new model's size among them would drown what the layers above know of the
        others.
        """
        if not bool(like.any()):
            like = torch.arange(len(like)) == field
        rows_of = torch.repeat_interleave(torch.arange(len(self.cardinalities)), torch.tensor(self.cardinalities))
        columns_of = torch.repeat_interleave(torch.arange(len(self.cardinalities)), self.fields.embedding_dim)
        rows, columns = rows_of == field, columns_of == field
        n_axes = min(likeness.shape[1], self.fields.embedding_dim)
        axes, _ = torch.linalg.qr(fresh.fields.weight[rows][:n_axes].T)  # (d_field, R): the directions are arbitrary
        placed = likeness[:, : axes.shape[1]] @ axes.T  # (V, d_field)
        self.fields.weight[rows] = _scaled(placed, self.fields.weight[like[rows_of]])
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
