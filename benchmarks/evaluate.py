"""Evaluation of a state: how much its groups differ, and how far they agree with batch clustering and the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.measured import Measured
from offline.reference import agreement, batch_groups
from online.assignment import Assigner
from online.ranking import mean_ndcg_between_groups, null_ndcg
from online.settings import OnlineSettings
from simulator.truth import read_truth
from state.reading import StateReader, StateView

N_USERS = 2_000
N_QUICK_USERS = 500


def evaluate_groups(state: Path, truth: Path | None, online: OnlineSettings, *, quick: bool) -> Measured:
    """Evaluate the groups of a state; with the simulator's ``truth.json`` also against the true segments.

    Raises
    ------
    state.errors.StateError
        There is no state, or it cannot be read.
    """
    with StateReader(state) as reader, reader.view() as view:
        metrics = _differences(view)
        if truth is not None:
            metrics |= _agreement(view, truth, online, N_QUICK_USERS if quick else N_USERS)
    return Measured(metrics)


def _differences(view: StateView) -> dict[str, float | int]:
    rng = np.random.default_rng(0)
    between, by_chance, n_grouped, n_distinct = [], [], 0, 0
    products = view.products()
    for product in products:
        grouping = view.groups(product.product_id)
        if grouping is None or len(grouping.groups) < 2:
            continue
        n_grouped += 1
        n_distinct += grouping.distinct
        row = {group.group_id: position for position, group in enumerate(grouping.groups)}
        cells = [cell for cell in view.cells(product.product_id) if cell.group_id in row]
        if not cells:  # all of its groups were born in the last regrouping, and nothing has been shown to them yet
            continue
        column = {creative: position for position, creative in enumerate(sorted({c.creative_id for c in cells}))}
        counts = np.zeros((2, len(row), len(column)))
        for cell in cells:
            counts[:, row[cell.group_id], column[cell.creative_id]] = cell.n_impressions, cell.n_clicks
        ndcg = mean_ndcg_between_groups(counts[0], counts[1])
        chance = null_ndcg(counts[0], counts[1], rng, n_splits=5)
        if ndcg is not None and chance is not None:
            between.append(ndcg)
            by_chance.append(chance)
    metrics: dict[str, float | int] = {
        "products": len(products),
        "products_with_groups": n_grouped,
        "products_with_distinct_groups": n_distinct,
    }
    if between:
        metrics |= {"ndcg_between_groups": float(np.mean(between)), "ndcg_null_split": float(np.mean(by_chance))}
    return metrics


def _agreement(view: StateView, path: Path, online: OnlineSettings, n_users: int) -> dict[str, float | int]:
    from sklearn.metrics import normalized_mutual_info_score

    truth = read_truth(path)
    users = truth.users[:n_users]
    attributes = [user.known_attributes for user in users]
    assigner = Assigner(online)
    assigner.load(view)
    grouped = set(assigner.product_ids())
    nmi, ari = [], []
    for product in truth.products:
        if product.product_id not in grouped:
            continue
        groups = assigner.assign_many([product.product_id] * len(users), attributes)
        nmi.append(normalized_mutual_info_score([u.segments_at_end[product.category] for u in users], groups))
        embedded = assigner.embed_many(product.product_id, attributes)
        batch = batch_groups(embedded, k_min=online.groups.k_min, k_max=online.groups.k_max)
        ari.append(agreement([-1 if group is None else group for group in groups], batch.labels))
    return {"nmi": float(np.mean(nmi)), "ari_batch": float(np.mean(ari))} if nmi else {}
