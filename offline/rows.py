"""GAIP rows: the paper's quadruples (section 4.1), with how sure the CTR is.

A row is a creative's image, the product's title, the feature of a group, and the creative's CTR in that group; here
with the interval and the posterior of that CTR.
"""

from __future__ import annotations

from typing import Final

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from offline.posterior import Cumulants, ctr_quantile, logit_cumulants
from offline.settings import OfflineSettings
from offline.shrinkage import shrink
from offline.snapshot import D_FEATURE
from state.records import N_FEATURE_POINTS

KEY: Final = ("product_id", "group_id", "creative_id")
"""What a row is of; there is one of each."""

_MIN_LIVE: Final = 1e-6
"""Decayed counts below this are none: dividing by them means nothing."""

_Z_95: Final = 1.959963984540054


def gaip_schema(d_feature: int = D_FEATURE) -> pa.Schema:
    """Return the schema of GAIP rows, each field with its description, for features of 11 x ``d_feature``."""
    return pa.schema(
        [
            _field("snapshot_id", pa.string(), "The snapshot; the same offsets give the same id."),
            _field("product_id", pa.string(), "The product."),
            _field("title", pa.string(), "The product's title."),
            _field("category", pa.string(), "The product's category, where it has one.", nullable=True),
            _field("group_id", pa.int32(), "The group of the product's users; ids are stable and per product."),
            _field("group_share", pa.float64(), "The group's share of the product's users."),
            _field("groups_distinct", pa.bool_(), "Whether the product's groups differ in preference beyond chance."),
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


def gaip_rows(
    products: ir.Table, creatives: ir.Table, groups: ir.Table, cells: ir.Table, settings: OfflineSettings
) -> ir.Table:
    """Return the GAIP rows of a snapshot's tables, sorted by product, group and creative.

    A product without groups has no rows. All cells of a product count for its shrinkage; the exposure filter
    then drops products and cells with too few impressions, by the settings.
    """
    live = settings.counts == "live"
    seen = cells.live_impressions if live else cells.n_impressions.cast("float64")
    clicked = cells.live_clicks if live else cells.n_clicks.cast("float64")
    counted = cells.mutate(n=ibis.ifelse(seen < _MIN_LIVE, 0.0, seen), x=clicked)
    # A click weighs one when it comes, its impression less by then: a decayed cell may hold a little more click.
    counted = counted.mutate(x=ibis.least(counted.x, counted.n))
    groups = groups.mutate(n_groups=groups.count().over(group_by="product_id"))
    # Counts of a group that has died without an heir stay behind here.
    counted = counted.join(groups, ["product_id", "group_id"])
    counted = counted.mutate(exposure=counted.n.sum().over(group_by="product_id"))
    counted = counted.filter(counted.exposure >= max(settings.min_product_impressions, _MIN_LIVE))
    shrunk = shrink(counted)
    shrunk = shrunk.filter(shrunk.n >= max(settings.min_cell_impressions, _MIN_LIVE))
    shrunk = shrunk.mutate(**logit_cumulants(shrunk.ctr_alpha, shrunk.ctr_beta)._asdict())
    logit = Cumulants(*(shrunk[name] for name in Cumulants._fields))
    shrunk = shrunk.mutate(ctr_low=ctr_quantile(logit, -_Z_95), ctr_high=ctr_quantile(logit, _Z_95))
    rows = shrunk.join(creatives, ["product_id", "creative_id"]).join(products, "product_id")
    return rows.order_by(*KEY).select(*(name for name in gaip_schema().names if name != "snapshot_id"))


def _field(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})
