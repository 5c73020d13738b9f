"""The rebuilding of rows and pairs, as a run of the chain that ends with them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from generator.settings import GeneratorSettings
from offline.chain import ChainRooms, read_runs, run_chain
from offline.dataset import PAIRS_FILE, ROWS_FILE
from offline.settings import ChainSettings, OfflineSettings
from online.settings import OnlineSettings
from state.artifact import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path):
    chain = ChainSettings(enabled=False)
    return OfflineSettings(dataset_dir=tmp_path / "offline", min_new_impressions=1_000, chain=chain)


def run_once(settings, state_path, *, clock):
    [record] = run_chain(ChainRooms(state_path, OnlineSettings(), GeneratorSettings(), settings), clock=clock)
    return record


def ticks(start=5_000):
    counter = itertools.count(start)
    return lambda: next(counter)


def test_a_run_builds_rows_and_pairs(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("clicks", 0, 400)
    writer.commit()
    record = run_once(settings, writer.path, clock=ticks())
    assert record.outcome == "built"
    assert (record.step, record.run_id.split("-")[:2]) == ("rebuild", ["run", "5000"])
    assert 5_000 < record.started_at_ms < record.finished_at_ms < 5_010
    figures = ("n_products", "n_rows", "n_pairs", "n_new_impressions", "n_impressions")
    assert [record.figures[name] for name in figures] == [1, 6, 6, 6_000, 6_000]
    assert record.artifact == "gaip/v000001"
    artifact = ArtifactStore(settings.dataset_dir).latest("gaip")
    assert artifact.manifest.made_from["offsets"] == {"clicks/0": 400}
    assert artifact.manifest.made_from["snapshot_id"] == record.snapshot_id
    assert artifact.manifest.made_from["settings"]["min_pair_probability"] == 0.8
    rows, pairs = pq.read_table(artifact.file(ROWS_FILE)), pq.read_table(artifact.file(PAIRS_FILE))
    assert (rows.num_rows, pairs.num_rows) == (6, 6)
    assert rows.schema.field("ctr").metadata[b"description"]
    assert json.loads(rows.schema.metadata[b"osmf.offsets"]) == {"clicks/0": 400}
    best = {(row["group_id"], row["creative_w"], row["creative_l"]) for row in pairs.to_pylist()}
    assert (0, "p1-blue", "p1-red") in best
    assert (1, "p1-red", "p1-blue") in best
    assert read_runs(settings) == [record]


def test_runs_are_skipped_until_enough_is_new(state_writer, settings):
    writer = state_writer()
    outcomes = []
    for n in (100, 1_000, 1_001, 1_160, 1_170):  # impressions of each of six cells
        writer.conflict("p1", n)
        writer.commit()
        record = run_once(settings, writer.path, clock=ticks(n))
        outcomes.append((record.outcome, record.figures["n_new_impressions"], record.artifact))
    assert outcomes == [
        ("skipped", 600, None),
        ("built", 6_000, "gaip/v000001"),
        ("skipped", 6, None),
        ("skipped", 960, None),
        ("built", 1_020, "gaip/v000002"),
    ]
    reasons = [record.reason for record in read_runs(settings)]
    assert reasons[0] == "600 new impressions so far, min_new_impressions is 1000"
    assert reasons[2] == "6 new impressions since gaip/v000001, min_new_impressions is 1000"
    assert reasons[1] is reasons[4] is None


def test_without_a_state_the_run_is_skipped(tmp_path, settings):
    record = run_once(settings, tmp_path / "nothing", clock=ticks())
    assert record.outcome == "skipped"
    assert "no state at" in record.reason
    assert not (tmp_path / "nothing").exists()


def test_without_exposure_the_run_is_skipped(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    strict = settings.model_copy(update={"min_product_impressions": 1e6})
    record = run_once(strict, writer.path, clock=ticks())
    assert (record.outcome, record.artifact) == ("skipped", None)
    assert "min_product_impressions (1e+06)" in record.reason
    assert ArtifactStore(settings.dataset_dir).latest("gaip") is None


def test_a_failure_is_recorded_and_leaves_no_artifact(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.cell("p1", 0, "stranger", 500, 10)
    writer.commit()
    record = run_once(settings, writer.path, clock=ticks())
    assert record.outcome == "failed"
    assert record.reason.startswith("UnknownCreativeError: the state counts creative 'stranger'")
    assert ArtifactStore(settings.dataset_dir).latest("gaip") is None
    assert read_runs(settings) == [record]


def test_a_run_reads_while_the_state_is_being_written(state_writer, settings):
    from state.store import Store

    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    program = (
        "import sys; from pathlib import Path; from offline.chain import *; from offline.settings import *;"
        "s = OfflineSettings(dataset_dir=Path(sys.argv[2]), min_new_impressions=1, chain=ChainSettings(enabled=False));"
        "print(run_chain(ChainRooms(Path(sys.argv[1]), OnlineSettings(), GeneratorSettings(), s))[0].outcome)"
    )
    with Store(writer.path, map_size_mib=32, sync=False):
        done = subprocess.run(
            [sys.executable, "-c", program, str(writer.path), str(settings.dataset_dir)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == "built"


def test_old_artifacts_are_pruned(state_writer, settings):
    writer = state_writer()
    few = settings.model_copy(update={"keep_versions": 2})
    for step in range(1, 5):
        writer.conflict("p1", 1_000 * step)
        writer.commit()
        assert run_once(few, writer.path, clock=ticks()).outcome == "built"
    assert ArtifactStore(settings.dataset_dir).versions("gaip") == [3, 4]


def test_what_nothing_is_trained_from_imports_no_heavy_library():
    program = (
        "import sys, offline.chain, offline.schedule, offline.reference;"
        "heavy = ('torch', 'faiss', 'sklearn', 'apscheduler', 'sqlalchemy', 'mlflow', 'pandas');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
