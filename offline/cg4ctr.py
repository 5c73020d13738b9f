"""CG4CTR's reward model: CTRs of a product's creatives from three tokens through a transformer.

As its paper describes it: image, title and caption are one token each, four layers of a transformer mix them, and a
head gives a creative's score. The loss is nine tenths a cross-entropy over the list of a product's creatives and a
tenth the squared error of the CTR. It knows no groups. Here image, title and caption are read by the frozen encoders
of `online.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from generator.comparison import Comparison, Floats, Picture
from offline.labelled_pair import Pair
from offline.settings import RewardSettings
from online.encoders import ImageEncoder, TextEncoder

D_MODEL: Final = 128
N_LAYERS: Final = 4
N_HEADS: Final = 4
LEARNING_RATE: Final = 1e-3
WEIGHT_DECAY: Final = 0.05
BATCH_LISTS: Final = 8
LIST_SHARE: Final = 0.9
"""Share of the listwise loss; the rest is the squared error's."""


class Cg4Ctr(nn.Module):
    """CG4CTR's reward model on frozen features.

    Parameters
    ----------
    text, image
        The encoders.
    captions
        Caption of each picture by its key; a picture without one is captioned by the empty text.
    """

    name = "cg4ctr"

    def __init__(self, text: TextEncoder, image: ImageEncoder, captions: dict[str, str]) -> None:
        super().__init__()
        self._text, self._image, self._captions = text, image, captions
        self._features: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        self.image = nn.Sequential(nn.LayerNorm(image.dim), nn.Linear(image.dim, D_MODEL))
        self.title = nn.Sequential(nn.LayerNorm(text.dim), nn.Linear(text.dim, D_MODEL))
        self.caption = nn.Sequential(nn.LayerNorm(text.dim), nn.Linear(text.dim, D_MODEL))
        self.kind = nn.Parameter(torch.randn(3, D_MODEL) * 0.02)
        layer = nn.TransformerEncoderLayer(
            D_MODEL, N_HEADS, 2 * D_MODEL, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, N_LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(D_MODEL, 1)

    def scores(self, creatives: Sequence[tuple[str, Picture]]) -> Tensor:
        """Return the logits of the CTRs of creatives, each a title and a picture, (n,)."""
        image, title, caption = zip(*(self._read(*creative) for creative in creatives), strict=True)
        tokens = torch.stack(
            [self.image(torch.stack(image)), self.title(torch.stack(title)), self.caption(torch.stack(caption))], dim=1
        )  # (n, 3, D)
        scores: Tensor = self.head(self.layers(tokens + self.kind).mean(dim=1)).squeeze(-1)
        return scores

    @torch.no_grad()
    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return P(CTR_1 > CTR_2), (n,): the softmax of the two scores."""
        if not comparisons:
            return np.zeros(0)
        self.eval()
        creatives = {(row.title, picture.key): picture for row in comparisons for picture in (row.first, row.second)}
        found = self.scores([(title, picture) for (title, _), picture in creatives.items()])
        score = dict(zip(creatives, found.double().tolist(), strict=True))
        apart = [score[row.title, row.first.key] - score[row.title, row.second.key] for row in comparisons]
        return np.asarray(1.0 / (1.0 + np.exp(-np.array(apart))))

    def _read(self, title: str, picture: Picture) -> tuple[Tensor, Tensor, Tensor]:
        known = self._features.get((title, picture.key))
        if known is None:
            image = self._image.encode(picture.read(), picture.key)
            texts = [self._text.encode(text) for text in (title, self._captions.get(picture.key, ""))]
            known = torch.from_numpy(image), torch.from_numpy(texts[0]), torch.from_numpy(texts[1])
            self._features[title, picture.key] = known
        return known


def train_cg4ctr(
    model: Cg4Ctr,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    *,
    seed: int,
    on_step: Callable[[str, int, float], None] | None = None,
) -> None:
    """Train on the lists that pairs are of: the creatives of a product in a group, with their CTRs.

    The list's target is the softmax of the logarithms of the CTRs, that is their shares.
    """
    lists: dict[tuple[str, bytes], dict[str, tuple[Picture, float]]] = {}
    for pair in pairs:
        row = pair.winner_first
        creatives = lists.setdefault((row.title, row.group_feature.tobytes()), {})
        creatives[row.first.key] = row.first, pair.ctr_w
        creatives[row.second.key] = row.second, pair.ctr_l
    titles = [title for title, _ in lists]
    contents = list(lists.values())
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.train()
    for step in range(settings.n_steps):
        drawn = rng.integers(len(contents), size=BATCH_LISTS).tolist()
        scores = model.scores([(titles[place], picture) for place in drawn for picture, _ in contents[place].values()])
        sizes = [len(contents[place]) for place in drawn]
        losses = []
        for place, of_list in zip(drawn, torch.split(scores, sizes), strict=True):
            ctrs = torch.tensor([ctr for _, ctr in contents[place].values()], dtype=torch.float32)
            listwise = nn.functional.cross_entropy(of_list, ctrs / ctrs.sum())
            losses.append(
                LIST_SHARE * listwise + (1.0 - LIST_SHARE) * nn.functional.mse_loss(torch.sigmoid(of_list), ctrs)
            )
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step("pairs", step, loss.item())
    model.eval()
