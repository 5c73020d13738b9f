"""The whole loop, small: the same processes and the same broker as `make demo`, a tenth of its impressions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from state.reading import open_view
from state.store import Store
from tests.osmf.browser import open_in_browser

pytestmark = [pytest.mark.broker, pytest.mark.timeout(420)]

N_IMPRESSIONS = 40_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}
    done = subprocess.run(
        [sys.executable, "-m", "osmf", "demo", "--out", str(out), "--impressions", str(N_IMPRESSIONS), "--seed", "31"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "summary.json").read_text())


def test_everything_produced_is_consumed_and_what_was_spoiled_is_dead_lettered(
    run: tuple[Path, dict[str, Any]],
) -> None:
    metrics, detail = run[1]["metrics"], run[1]["detail"]
    assert metrics["consumed"] == metrics["produced"] > N_IMPRESSIONS
    assert metrics["dead_letters"] == metrics["spoiled"] == sum(detail["spoiled_by_reason"].values())
    assert detail["dead_letters_by_reason"] == detail["spoiled_by_reason"]
    assert metrics["used"] == metrics["consumed"] - metrics["dead_letters"]


def test_the_counts_are_the_simulators(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    truth = json.loads((out / "simulate" / "truth.json").read_text())
    assert summary["metrics"]["impressions"] == truth["n_impressions"]
    assert summary["metrics"]["clicks"] == truth["n_clicks"]
    with Store(out / "state", readonly=True) as store, open_view(store) as view:
        totals: dict[str, list[int]] = {}
        for cell in view.cells():
            total = totals.setdefault(cell.creative_id, [0, 0])
            total[0] += cell.n_impressions
            total[1] += cell.n_clicks
    assert totals == {creative: counts for creative, counts in truth["by_creative"].items() if counts[0]}


def test_snapshots_were_taken_and_the_last_one_holds_the_whole_run(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    assert summary["metrics"]["n_snapshots"] >= 1
    manifests = sorted((out / "offline").rglob("manifest.json"))
    assert manifests
    assert json.loads(manifests[-1].read_text())["figures"]["n_impressions"] == summary["metrics"]["impressions"]


def test_what_was_emitted_opens(run: tuple[Path, dict[str, Any]]) -> None:
    metrics = run[1]["metrics"]
    assert metrics["creatives_that_open"] == metrics["creatives_emitted"]
    for path in (run[0] / "creatives").rglob("*.jpg"):
        with Image.open(BytesIO(path.read_bytes())) as image:
            assert image.convert("RGB").size == (512, 512)


@pytest.mark.browser
def test_the_report_opens_without_an_error_and_shows_its_pictures(run: tuple[Path, dict[str, Any]]) -> None:
    findings = open_in_browser(run[0] / "report.html")
    assert findings.problems() == []
