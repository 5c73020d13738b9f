"""How differently two groups rank the same creatives: NDCG@k between groups, and its null."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online.ctr import CountsShapeError, shrink

_Vector: TypeAlias = NDArray[np.float64]


class RankingError(ValueError):
    """CTRs or a depth that no ranking can be made of."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"{found}; allowed is {allowed}. No NDCG was computed.")


def ndcg_at(reference_ctr: ArrayLike, predicted_ctr: ArrayLike, k: int = 5) -> float:
    """NDCG@k of one group's ranking of the creatives against another's (the paper's section 5.2).

    The gain of a creative is its CTR in the reference group, the order that of the predicted CTRs, and
    the ideal order the reference's own. 1 means the same top k; lower means other preferences. Creatives
    tied in the prediction share their mean gain, so that the answer does not hang on their order.

    Parameters
    ----------
    reference_ctr, predicted_ctr
        CTRs ``(C,)`` of the same creatives in two groups.
    k
        How many of the top creatives count, at least 1.

    Returns
    -------
    A number in [0, 1]; 1 where the reference is zero everywhere, since every order is then as good.

    Raises
    ------
    RankingError
        If the two differ in shape, are empty, hold a negative or unknown CTR, or k is below 1.
    """
    reference = np.asarray(reference_ctr, dtype=np.float64)
    predicted = np.asarray(predicted_ctr, dtype=np.float64)
    if reference.shape != predicted.shape or reference.ndim != 1 or reference.size == 0:
        raise RankingError(
            f"reference_ctr has shape {reference.shape} and predicted_ctr {predicted.shape}",
            "(C,) for both, C at least 1",
        )
    if k < 1:
        raise RankingError(f"k is {k}", "1 or more")
    if not (np.isfinite(reference).all() and (reference >= 0.0).all() and np.isfinite(predicted).all()):
        raise RankingError("a CTR is negative or not finite", "a finite CTR of 0 or more")
    discount = 1.0 / np.log2(np.arange(2, min(k, reference.size) + 2))
    ideal = float(np.sort(reference)[::-1][: discount.size] @ discount)
    if ideal == 0.0:
        return 1.0
    _, place, n_tied = np.unique(-predicted, return_inverse=True, return_counts=True)
    mean_gain = np.bincount(place, weights=reference) / n_tied
    gains = np.repeat(mean_gain, n_tied)[: discount.size]
    return min(float(gains @ discount) / ideal, 1.0)


def mean_ndcg_between_groups(n_impressions: ArrayLike, n_clicks: ArrayLike, k: int = 5) -> float | None:
    """Mean NDCG@k over all ordered pairs of a product's groups, on shrunk CTRs.

    Raw CTRs would let noise pass for difference: two equal groups with 50 impressions for each of nine creatives
    scored 0.83 in simulation on raw CTRs, 0.98 on shrunk ones. Put the answer beside `null_ndcg` of the same counts.

    Parameters
    ----------
    n_impressions, n_clicks
        Counts ``(G, C)`` as for `online.ctr.shrink`.

    Returns
    -------
    The mean, or None where fewer than two groups have impressions: there is no pair then.
    """
    n = np.asarray(n_impressions, dtype=np.float64)
    ctr = shrink(n, n_clicks).ctr
    seen = np.flatnonzero(n.sum(axis=1) > 0.0)
    scores = [ndcg_at(ctr[a], ctr[b], k) for a in seen for b in seen if a != b]
    return float(np.mean(scores)) if scores else None


def null_ndcg(
    n_impressions: ArrayLike, n_clicks: ArrayLike, rng: np.random.Generator, *, k: int = 5, n_splits: int = 1
) -> float | None:
    """`mean_ndcg_between_groups` of groups drawn by lot: what noise alone gives at these sizes.

    Each creative's impressions, pooled over the groups, are dealt out at random in the sizes that the groups have,
    their clicks with them (a multivariate hypergeometric draw). Fractional counts are rounded first.

    Parameters
    ----------
    n_impressions, n_clicks
        Counts ``(G, C)``.
    rng
        Source of the split.
    n_splits
        How many splits are averaged.

    Returns
    -------
    The mean over the splits, or None where fewer than two groups have impressions.
    """
    if n_splits < 1:
        raise RankingError(f"n_splits is {n_splits}", "1 or more")
    exact_n, exact_x = np.asarray(n_impressions, dtype=np.float64), np.asarray(n_clicks, dtype=np.float64)
    if exact_n.shape != exact_x.shape or exact_n.ndim != 2:
        raise CountsShapeError(exact_n.shape, exact_x.shape, "(G, C), the same for both")
    n = np.rint(exact_n).astype(np.int64)
    clicks = np.minimum(np.rint(exact_x.sum(axis=0)).astype(np.int64), n.sum(axis=0))  # (C,)
    scores = []
    for _ in range(n_splits):
        dealt = np.stack(
            [rng.multivariate_hypergeometric(n[:, c], clicks[c], method="marginals") for c in range(n.shape[1])], axis=1
        )  # (G, C)
        score = mean_ndcg_between_groups(n, dealt, k)
        if score is None:
            return None
        scores.append(score)
    return float(np.mean(scores))
