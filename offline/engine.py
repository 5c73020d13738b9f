"""Engines: where the dataset queries run, DuckDB in this process or Spark where the data outgrow one machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from offline.settings import OfflineSettings


class EngineMissingError(RuntimeError):
    """The engine that the settings name is not installed."""

    def __init__(self, engine: str, trouble: str) -> None:
        super().__init__(
            f"offline.engine is {engine!r}, but {trouble}; allowed is an engine that is installed, such as `duckdb`. "
            "No dataset was made."
        )


class Engine:
    """Reads Parquet files and runs expressions over them.

    Parameters
    ----------
    backend
        Ibis's backend.
    run
        Runs one of its expressions.
    """

    def __init__(self, backend: Any, run: Callable[[ir.Table], pa.Table]) -> None:
        self._backend = backend
        self._run = run

    def read(self, path: Path) -> ir.Table:
        """Return a Parquet file as a table to make expressions of."""
        table: ir.Table = self._backend.read_parquet(str(path))
        return table

    def fetch(self, expression: ir.Table, schema: pa.Schema) -> pa.Table:
        """Run an expression and return its rows, in the order that it asks for, with exactly this schema."""
        found: pa.Table = self._run(expression)
        # Engines know neither fixed lengths nor which columns are never empty.
        columns = [found[name].combine_chunks().cast(schema.field(name).type) for name in schema.names]
        return pa.table(columns, schema=schema)


@contextmanager
def open_engine(settings: OfflineSettings) -> Iterator[Engine]:
    """Open the engine that the settings name, and close it afterwards.

    Spark is closed only if it was started here: a session that was there before is used as it is.

    Raises
    ------
    EngineMissingError
        If it is Spark and pyspark is not installed.
    """
    import ibis

    if settings.engine == "duckdb":
        duckdb = ibis.duckdb.connect()
        try:
            yield Engine(duckdb, duckdb.to_pyarrow)
        finally:
            duckdb.disconnect()
        return
    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError as error:
        raise EngineMissingError("spark", "it needs the package pyspark, and Java") from error
    before = SparkSession.getActiveSession()
    # Workers must run this very interpreter, whatever `python3` is on the path.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    session = before or (
        SparkSession.builder.master(settings.spark_master)
        .appName("osmf offline")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", str(settings.spark_partitions))
        .getOrCreate()
    )
    try:
        spark = ibis.pyspark.connect(session)
        # Straight to Arrow: Ibis would go by way of pandas, which turns whole numbers with nulls into floats.
        yield Engine(spark, lambda expression: session.sql(spark.compile(expression)).toArrow())
    finally:
        if before is None:
            session.stop()
