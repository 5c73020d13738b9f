"""Snapshots: the state at one commit as an Arrow table of GAIP rows.

A GAIP row is the paper's quadruple (section 4.1): a creative's image, the product's title, the feature of a group,
and the creative's CTR in that group; here with the interval and posterior of that CTR.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa

from offline.settings import OfflineSettings
from online.ctr import shrink
from state.reading import StateReader, StateView
from state.records import Cell, CreativeRecord, ProductGroups, ProductRecord

N_FEATURE_POINTS = 11
"""Points of a group feature (Eq. 6): the centroid and ten of its members."""

D_FEATURE = 128
"""Width of a group feature where no row says otherwise."""

_MIN_LIVE = 1e-6
"""Decayed counts below this are none: dividing by them means nothing."""


class SnapshotError(RuntimeError):
    """The state cannot be turned into rows."""


class UnknownCreativeError(SnapshotError):
    """A cell counts a creative that is not registered."""

    def __init__(self, product_id: str, creative_id: str) -> None:
        super().__init__(
            f"the state counts creative {creative_id!r} of product {product_id!r}, which is not registered; "
            "every counted creative must be. No row was made: the state is damaged."
        )


class GroupFeatureError(SnapshotError):
    """A group's feature does not have the size of the others."""

    def __init__(self, product_id: str, group_id: int, n_bytes: int, allowed: str) -> None:
        super().__init__(
            f"the feature of group {group_id} of product {product_id!r} has {n_bytes} bytes; allowed is {allowed}. "
            "No row was made."
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """GAIP rows and what they include.

    ``offsets`` are the next offsets by ``topic/partition``; the same offsets give the same ``snapshot_id``.
    ``n_impressions`` and ``n_clicks`` are for life and over everything, before any filter.
    """

    snapshot_id: str
    rows: pa.Table
    offsets: dict[str, int]
    n_products: int
    n_impressions: int
    n_clicks: int


def gaip_schema(d_feature: int = D_FEATURE) -> pa.Schema:
    """Return the schema of GAIP rows, each field with its description, for features of 11 x ``d_feature``."""
    return pa.schema(
        [
            _field("snapshot_id", pa.string(), "The snapshot; the same offsets give the same id."),
            _field("product_id", pa.string(), "The product."),
            _field("title", pa.string(), "The product's title."),
            _field("category", pa.string(), "The product's category, where it has one.", nullable=True),
            _field("group_id", pa.int32(), "The group of the product's users; ids are stable and per product."),
            _field("group_share", pa.float32(), "The group's share of the product's users."),
            _field("groups_distinct", pa.bool_(), "Whether the product's groups differ in what they click."),
            _field("encoder_version", pa.int64(), "Version of the encoder that made the group feature."),
            _field("creative_id", pa.string(), "The creative."),
            _field("image_uri", pa.string(), "Where the creative's image lies.", nullable=True),
            _field(
                "prompt", pa.string(), "What the creative was drawn from; none for one that people made.", nullable=True
            ),
            _field(
                "group_feature",
                pa.list_(pa.float32(), N_FEATURE_POINTS * d_feature),
                f"Eq. 6: {N_FEATURE_POINTS} x {d_feature}, row by row, the centroid first.",
            ),
            _field("n_impressions", pa.int64(), "Impressions of the creative in the group, for life."),
            _field("n_clicks", pa.int64(), "Clicks on the creative in the group, for life."),
            _field("live_impressions", pa.float64(), "Impressions that decay with event time."),
            _field("live_clicks", pa.float64(), "Clicks that decay with event time."),
            _field("ctr", pa.float64(), "Empirical-Bayes CTR of the creative in the group: the posterior's mean."),
            _field("ctr_low", pa.float64(), "Lower end of the CTR's 95% interval."),
            _field("ctr_high", pa.float64(), "Upper end of the CTR's 95% interval."),
            _field("ctr_alpha", pa.float64(), "First parameter of the CTR's Beta posterior."),
            _field("ctr_beta", pa.float64(), "Second parameter of the CTR's Beta posterior."),
        ]
    )


def take_snapshot(state: StateReader, settings: OfflineSettings) -> Snapshot:
    """Read the state, each shard in one transaction, and return its GAIP rows.

    A product without groups has no rows. All cells of a product count for its shrinkage; the exposure filter
    then drops products and cells with too few impressions, by the settings.

    Raises
    ------
    SnapshotError
        If the state contradicts itself.
    """
    with state.view() as view:
        return snapshot_of(view, settings)


def snapshot_of(view: StateView, settings: OfflineSettings) -> Snapshot:
    """Return the GAIP rows of a state's view; see `take_snapshot`."""
    offsets = {f"{topic}/{partition}": record.next_offset for (topic, partition), record in view.offsets().items()}
    snapshot_id = _snapshot_id(offsets)
    n_impressions = n_clicks = n_products = 0
    columns = _Columns(snapshot_id)
    for product in view.products():
        cells = view.cells(product.product_id)
        n_impressions += sum(cell.n_impressions for cell in cells)
        n_clicks += sum(cell.n_clicks for cell in cells)
        groups = view.groups(product.product_id)
        if groups is not None and _add_product(
            columns, product, groups, view.creatives(product.product_id), cells, settings
        ):
            n_products += 1
    metadata = {"osmf.snapshot_id": snapshot_id, "osmf.offsets": msgspec.json.encode(offsets, order="sorted").decode()}
    return Snapshot(
        snapshot_id=snapshot_id,
        rows=columns.table().replace_schema_metadata(metadata),
        offsets=offsets,
        n_products=n_products,
        n_impressions=n_impressions,
        n_clicks=n_clicks,
    )


class _Columns:
    """The rows so far, by column; features once per group and not once per row."""

    def __init__(self, snapshot_id: str) -> None:
        self._snapshot_id = snapshot_id
        self._values: dict[str, list[object]] = {
            name: [] for name in gaip_schema().names if name not in ("snapshot_id", "group_feature")
        }
        self._features: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []
        self._feature_of_row: list[int] = []

    def add_feature(self, product_id: str, group_id: int, feature: bytes) -> None:
        """Take the feature of the group whose rows come next."""
        size = N_FEATURE_POINTS * 4
        if not feature or len(feature) % size:
            raise GroupFeatureError(
                product_id, group_id, len(feature), f"a multiple of {size}, {N_FEATURE_POINTS} points"
            )
        values = np.frombuffer(feature, dtype="<f4")
        if self._features and values.size != self._features[0].size:
            raise GroupFeatureError(product_id, group_id, len(feature), f"{self._features[0].nbytes} as for the others")
        self._features.append(values)

    def add_row(self, **values: object) -> None:
        """Take one row of the last feature's group."""
        for name, value in values.items():
            self._values[name].append(value)
        self._feature_of_row.append(len(self._features) - 1)

    def table(self) -> pa.Table:
        """Return the rows."""
        n_rows = len(self._feature_of_row)
        width = self._features[0].size if self._features else N_FEATURE_POINTS * D_FEATURE
        schema = gaip_schema(width // N_FEATURE_POINTS)
        features = np.stack(self._features) if self._features else np.empty((0, width), np.float32)
        flat = features[np.asarray(self._feature_of_row, dtype=np.int64)].ravel()  # (n_rows * width,)
        columns = {
            "snapshot_id": pa.array([self._snapshot_id] * n_rows, pa.string()),
            "group_feature": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), width),
            **{name: pa.array(values, schema.field(name).type) for name, values in self._values.items()},
        }
        return pa.table([columns[name] for name in schema.names], schema=schema)


def _add_product(
    columns: _Columns,
    product: ProductRecord,
    groups: ProductGroups,
    creatives: list[CreativeRecord],
    cells: list[Cell],
    settings: OfflineSettings,
) -> bool:
    """Add a product's rows; return whether there were any."""
    if not groups.groups or not creatives:
        return False
    row_of = {group.group_id: row for row, group in enumerate(groups.groups)}
    column_of = {creative.creative_id: column for column, creative in enumerate(creatives)}
    table: dict[tuple[int, int], Cell] = {}
    live = settings.counts == "live"
    n = np.zeros((len(row_of), len(column_of)))  # (G, C)
    x = np.zeros_like(n)
    for cell in cells:
        if cell.creative_id not in column_of:
            raise UnknownCreativeError(product.product_id, cell.creative_id)
        if cell.group_id not in row_of:  # counts of a group that has died without an heir
            continue
        place = row_of[cell.group_id], column_of[cell.creative_id]
        table[place] = cell
        n[place], x[place] = (cell.live_impressions, cell.live_clicks) if live else (cell.n_impressions, cell.n_clicks)
    faded = n < _MIN_LIVE
    n[faded] = x[faded] = 0.0
    if n.sum() < max(settings.min_product_impressions, _MIN_LIVE):
        return False
    # A click weighs one when it comes, its impression less by then: a decayed cell may hold a little more click.
    shrunk = shrink(n, np.minimum(x, n))
    kept = n >= max(settings.min_cell_impressions, _MIN_LIVE)
    for g, group in enumerate(groups.groups):
        if not kept[g].any():
            continue
        columns.add_feature(product.product_id, group.group_id, group.feature)
        for c in np.flatnonzero(kept[g]).tolist():
            cell, creative = table[g, c], creatives[c]
            columns.add_row(
                product_id=product.product_id,
                title=product.title,
                category=product.category,
                group_id=group.group_id,
                group_share=group.share,
                groups_distinct=groups.distinct,
                encoder_version=groups.encoder_version,
                creative_id=creative.creative_id,
                image_uri=creative.image_uri,
                prompt=creative.prompt,
                n_impressions=cell.n_impressions,
                n_clicks=cell.n_clicks,
                live_impressions=cell.live_impressions,
                live_clicks=cell.live_clicks,
                ctr=float(shrunk.ctr[g, c]),
                ctr_low=float(shrunk.ctr_low[g, c]),
                ctr_high=float(shrunk.ctr_high[g, c]),
                ctr_alpha=float(shrunk.alpha[g, c]),
                ctr_beta=float(shrunk.beta[g, c]),
            )
    return bool(kept.any())


def _snapshot_id(offsets: dict[str, int]) -> str:
    return "snapshot-" + hashlib.sha256(msgspec.json.encode(offsets, order="sorted")).hexdigest()[:16]


def _field(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})
