"""Sources on disk: what pre-training and alignment need to know of a snapshot, as a Parquet file of its dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offline.pretrain_source import GroupSource, ProductSource
from state.records import N_FEATURE_POINTS, ProfileTrait

_WORDS: Final = pa.map_(pa.string(), pa.string())
_TRAIT: Final = pa.struct(
    [("attribute", pa.string()), ("value", pa.string()), ("share", pa.float64()), ("lift", pa.float64())]
)
_GROUP: Final = pa.struct(
    [
        ("group_id", pa.int64()),
        ("feature", pa.list_(pa.float32())),
        ("typical", _WORDS),
        ("distinctive", pa.list_(_TRAIT)),
        ("clickers", pa.list_(_WORDS)),
    ]
)
_SCHEMA: Final = pa.schema(
    [
        ("product_id", pa.string()),
        ("title", pa.string()),
        ("category", pa.string()),
        ("image_uri", pa.string()),
        ("creative_uris", pa.list_(pa.string())),
        ("typical", _WORDS),
        ("groups", pa.list_(_GROUP)),
    ]
)


def write_sources(sources: Sequence[ProductSource], path: Path) -> None:
    """Write products with their groups and clickers; `read_sources_file` gives the same ones back."""
    rows = [
        {
            "product_id": product.product_id,
            "title": product.title,
            "category": product.category,
            "image_uri": product.image_uri,
            "creative_uris": product.creative_uris,
            "typical": list(product.typical.items()),
            "groups": [
                {
                    "group_id": group.group_id,
                    "feature": group.feature.reshape(-1),
                    "typical": list(group.typical.items()),
                    "distinctive": [
                        {"attribute": trait.attribute, "value": trait.value, "share": trait.share, "lift": trait.lift}
                        for trait in group.distinctive
                    ],
                    "clickers": [list(clicker.items()) for clicker in group.clickers],
                }
                for group in product.groups
            ],
        }
        for product in sources
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd")


def read_sources_file(path: Path) -> list[ProductSource]:
    """Read products that `write_sources` wrote."""
    return [
        ProductSource(
            row["product_id"],
            row["title"],
            row["category"],
            row["image_uri"],
            row["creative_uris"],
            dict(row["typical"]),
            [_group(group) for group in row["groups"]],
        )
        for row in pq.read_table(path).to_pylist()
    ]


def _group(row: dict[str, Any]) -> GroupSource:
    return GroupSource(
        row["group_id"],
        np.asarray(row["feature"], np.float32).reshape(N_FEATURE_POINTS, -1),
        dict(row["typical"]),
        [ProfileTrait(**trait) for trait in row["distinctive"]],
        [dict(clicker) for clicker in row["clickers"]],
    )
