"""The first step of a run: from a snapshot of the state to GAIP rows and pairs on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from offline.settings import OfflineSettings
from offline.snapshot import Snapshot, snapshot_of
from online.settings import OnlineSettings
from state.artifact import Artifact, ArtifactStore
from state.errors import StateMissingError
from state.reading import StateReader, StateView

if TYPE_CHECKING:
    from offline.pretrain_source import ProductSource

KIND: Final = "gaip"
"""Kind of the artifact that is written."""

SOURCES_FILE: Final = "sources.parquet"
"""What training needs besides rows and pairs; a dataset that nothing is to be trained from has none."""

_DATASET_SETTINGS: Final = (
    "counts",
    "min_product_impressions",
    "min_cell_impressions",
    "min_pair_probability",
    "held_out_share",
    "held_out_by",
    "engine",
)
"""Those that rows and pairs depend on."""

Clock = Callable[[], int]
"""Gives the time, ms since the Unix epoch."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What came of it: a dataset, or the reason why none was built."""

    dataset: Artifact | None
    reason: str | None
    snapshot_id: str | None = None
    n_new_impressions: int | None = None


class _NothingExposed(Exception):
    """No row passed the exposure filter."""

    def __init__(self, settings: OfflineSettings) -> None:
        super().__init__(
            "no row passed the exposure filter: no grouped product has min_product_impressions "
            f"({settings.min_product_impressions:g}) and a creative with min_cell_impressions "
            f"({settings.min_cell_impressions:g}) in a group"
        )


def rebuild(
    settings: OfflineSettings,
    online: OnlineSettings,
    state_path: Path,
    *,
    clock: Clock,
    whatever_is_new: bool = False,
) -> Rebuilt:
    """Write the next dataset, or say why not.

    None is built where there is no state yet, where fewer than ``min_new_impressions`` came since the last one, and
    where no row passes the exposure filter.

    Parameters
    ----------
    settings
        What to build, and where.
    online
        The settings that the state was built with.
    state_path
        Folder of the LMDB environment; it is only read, in one transaction.
    clock
        Gives the time of the artifact.
    whatever_is_new
        Whether to build even when too little is new.
    """
    artifacts = ArtifactStore(settings.dataset_dir)
    try:
        state = StateReader(state_path)
    except StateMissingError as error:
        return Rebuilt(None, str(error))
    with state, state.view() as view:
        snapshot = snapshot_of(view)
        last = artifacts.latest(KIND)
        n_new = snapshot.n_impressions - (0 if last is None else n_impressions_of(last))
        to_train = settings.chain.enabled
        is_enough = n_new >= settings.min_new_impressions or (
            to_train and last is not None and SOURCES_FILE not in last.manifest.files
        )
        if not is_enough and not whatever_is_new:
            since = "so far" if last is None else f"since {last.name}"
            reason = f"{n_new} new impressions {since}, min_new_impressions is {settings.min_new_impressions}"
            return Rebuilt(None, reason, snapshot.snapshot_id, n_new)
        sources = _sources(view, online) if to_train else None
    try:
        dataset = _write(artifacts, settings, snapshot, sources, clock())
    except _NothingExposed as nothing:
        return Rebuilt(None, str(nothing), snapshot.snapshot_id, n_new)
    artifacts.prune(KIND, settings.keep_versions)
    return Rebuilt(dataset, None, snapshot.snapshot_id, n_new)


def _sources(view: StateView, online: OnlineSettings) -> list[ProductSource]:
    from offline.pretrain_source import read_sources  # torch is slow to import

    return read_sources(view, online)


def _write(
    artifacts: ArtifactStore,
    settings: OfflineSettings,
    snapshot: Snapshot,
    sources: list[ProductSource] | None,
    now_ms: int,
) -> Artifact:
    from offline.dataset import make_dataset  # so is Ibis

    with artifacts.write(KIND, created_at_ms=now_ms) as draft:
        dataset = make_dataset(snapshot, draft.path, settings)
        if dataset.rows.num_rows == 0:
            raise _NothingExposed(settings)
        if sources is not None:
            from offline.source_file import write_sources

            write_sources(sources, draft.file(SOURCES_FILE))
        draft.made_from = {
            "snapshot_id": snapshot.snapshot_id,
            "offsets": dict(snapshot.offsets),
            "settings": settings.model_dump(mode="json", include=set(_DATASET_SETTINGS)),
        }
        draft.figures = {
            "n_impressions": snapshot.n_impressions,
            "n_clicks": snapshot.n_clicks,
            "n_products": dataset.n_products,
            "n_rows": dataset.rows.num_rows,
            "n_pairs": dataset.pairs.num_rows,
        }
    assert draft.finished is not None
    return draft.finished


def n_impressions_of(dataset: Artifact) -> int:
    """Return how many impressions had been counted when a dataset was made."""
    return int(dataset.manifest.figures["n_impressions"])
