"""Sources on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from offline.pretrain_source import GroupSource, ProductSource
from offline.source_file import read_sources_file, write_sources
from state.records import ProfileTrait


def test_sources_come_back_as_they_were(tmp_path: Path) -> None:
    feature = np.random.default_rng(0).normal(size=(11, 128)).astype(np.float32)
    trait = ProfileTrait("age", "25-28", 0.5, 2.5)
    group = GroupSource(4, feature, {"age": "25-28", "city tier": "1"}, [trait], [{"age": "29-34"}, {}])
    bare = ProductSource("p2", "Lamp", None, None, [], {}, [GroupSource(0, feature, {}, [], [])])
    product = ProductSource("p1", "Chair", "chairs", "file:///p1.png", ["file:///c.png"], {"age": "25-28"}, [group])
    write_sources([product, bare], tmp_path / "sources.parquet")
    found = read_sources_file(tmp_path / "sources.parquet")
    assert [repr(each) for each in found] == [repr(product), repr(bare)]
    np.testing.assert_array_equal(found[0].groups[0].feature, feature)
    write_sources([], tmp_path / "none.parquet")
    assert read_sources_file(tmp_path / "none.parquet") == []
