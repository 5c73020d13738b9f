"""The paper's form of the preference model: Eq. 1-4 as they are written.

Every impression attends to the tokens of its title and to the patches of its image. With one vector as key and value
the softmax over one key would be 1 and the result would not depend on the user, so keys and values are tokens; a
residual path with a LayerNorm keeps the user in what comes out. It is the yardstick of the shipped form, in quality
and in speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from online.encoders import IMAGE_TOKENS, TITLE_TOKENS
from online.model import ImageSide, PreferenceModel, TitleSide
from online.settings import ModelSettings


class Titles(NamedTuple):
    """Products: ``e_t`` (P, D), the tokens' mean; ``tokens`` (P, T, D), and where they are ``padding`` (P, T)."""

    e_t: Tensor
    tokens: Tensor
    padding: Tensor


class Images(NamedTuple):
    """Creatives: ``e_v`` (C, D), the patches' mean, and ``tokens`` (C, T, D)."""

    e_v: Tensor
    tokens: Tensor


class PaperModel(PreferenceModel):
    """The preference model with attention over tokens.

    Parameters
    ----------
    cardinalities
        Number of codes of each of the N attributes.
    title_dim, image_dim
        Widths of the features of whole titles and images: all tokens, flat.
    settings
        Widths of the layers.
    """

    def __init__(self, cardinalities: Sequence[int], title_dim: int, image_dim: int, settings: ModelSettings) -> None:
        super().__init__(cardinalities, title_dim // TITLE_TOKENS, image_dim // IMAGE_TOKENS, settings)
        d, n_heads = settings.d_model, settings.n_heads
        self.title_attention = nn.MultiheadAttention(d, n_heads, batch_first=True)
        self.image_attention = nn.MultiheadAttention(d, n_heads, batch_first=True)
        self.image_norm = nn.LayerNorm(d)

    def fit_features(self, titles: Tensor, images: Tensor) -> None:
        """Set the constants of the features, one for each place of a token's features."""
        tokens, padding = _title_tokens(titles)
        self.title_standard.fit(tokens[~padding])
        self.image_standard.fit(images.reshape(len(images) * IMAGE_TOKENS, -1))

    def titles(self, features: Tensor) -> Titles:
        """Return the embedded tokens of title features, (P, title_dim). Eq. 1."""
        tokens, padding = _title_tokens(features)  # (P, T, width), (P, T)
        embedded = self.title(self.title_standard(tokens))  # (P, T, D)
        kept = (~padding).unsqueeze(-1)
        return Titles((embedded * kept).sum(dim=1) / kept.sum(dim=1), embedded, padding)

    def images(self, features: Tensor) -> Images:
        """Return the embedded patches of image features, (C, image_dim). Eq. 1."""
        tokens = features.reshape(len(features), IMAGE_TOKENS, -1)  # (C, T, width)
        embedded = self.image(self.image_standard(tokens))  # (C, T, D)
        return Images(embedded.mean(dim=1), embedded)

    def users(self, attributes: Tensor, titles: TitleSide, title_index: Tensor) -> Tensor:
        """Return e_{u|t}, Eq. 2, (B, D)."""
        _, tokens, padding = titles
        e_u = self.user(self.fields(attributes + self.field_starts).flatten(1))  # (B, D)
        keys = tokens[title_index]  # (B, T, D)
        attended, _ = self.title_attention(
            e_u.unsqueeze(1), keys, keys, key_padding_mask=padding[title_index], need_weights=False
        )
        embedded: Tensor = self.user_norm(e_u + attended.squeeze(1))  # (B, D)
        return embedded

    def forward(
        self, e_ut: Tensor, titles: TitleSide, title_index: Tensor, images: ImageSide, image_index: Tensor
    ) -> Tensor:
        """Return click logits, (B,): Eq. 3 and 4."""
        logits: Tensor = (
            self.head_title(titles[0])[title_index]
            + self.head_image(images[0])[image_index]
            + self._attended(e_ut, images, image_index)
        ).squeeze(-1)  # (B,)
        return logits

    def _attended(self, e_ut: Tensor, images: ImageSide, image_index: Tensor) -> Tensor:
        """Return h_{u|c}(e_{u|c}), Eq. 3, (B, 1)."""
        keys = images[1][image_index]  # (B, T, D)
        attended, _ = self.image_attention(e_ut.unsqueeze(1), keys, keys, need_weights=False)
        logits: Tensor = self.head_user(self.image_norm(e_ut + attended.squeeze(1)))
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
        """Return h_{u|c} of each row's image, less its mean over the product's creatives, (B,)."""
        own = self._attended(e_ut, images, image_index).squeeze(-1)  # (B,)
        sizes = torch.bincount(owners, minlength=len(titles[0]))  # (P,)
        order = torch.argsort(owners, stable=True)  # creatives by product
        starts = sizes.cumsum(0) - sizes
        total = torch.zeros_like(own)
        for place in range(int(sizes.max())):
            rows = torch.nonzero(sizes[title_index] > place)[:, 0]
            peers = order[starts[title_index[rows]] + place]
            total[rows] += self._attended(e_ut[rows], images, peers).squeeze(-1)
        return own - total / sizes[title_index]


def _title_tokens(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of titles (P, T, width) and where they only fill up, (P, T); the first one always counts."""
    tokens = features.reshape(len(features), TITLE_TOKENS, -1)
    padding = (tokens == 0).all(dim=-1)
    padding[:, 0] = False
    return tokens, padding
