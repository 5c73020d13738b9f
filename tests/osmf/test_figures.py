from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from osmf.figures import FigureError, Figures, commit, device, figures_json, figures_table, format_number, write_figures


def make(metrics: dict[str, Any] | None = None, **changes: Any) -> Figures:
    values: dict[str, Any] = {
        "command": "osmf bench join",
        "commit": "unknown",
        "seeds": {"world": 7},
        "device": "a processor, 2 threads",
        "seconds": 1.5,
        "metrics": {"rate_events_s": 1200.0} if metrics is None else metrics,
    }
    return Figures(**(values | changes))


def test_the_object_has_the_documented_fields(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "figures.json"
    write_figures(make(detail={"cells": [{"ctr": 0.1}]}), target)
    assert json.loads(target.read_text()) == {
        "command": "osmf bench join",
        "commit": "unknown",
        "seeds": {"world": 7},
        "device": "a processor, 2 threads",
        "seconds": 1.5,
        "metrics": {"rate_events_s": 1200.0},
        "detail": {"cells": [{"ctr": 0.1}]},
    }
    assert os.listdir(target.parent) == ["figures.json"]


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    write_figures(make(), "-")
    assert json.loads(capsys.readouterr().out)["metrics"] == {"rate_events_s": 1200.0}
    stream = io.StringIO()
    write_figures(make(), "-", stdout=stream)
    assert json.loads(stream.getvalue())["seeds"] == {"world": 7}


def test_numpy_numbers_are_plain_numbers() -> None:
    metrics = {"n": np.int64(3), "share": np.float32(0.25)}
    detail = {"array": np.array([[1, 2]]), "flag": np.bool_(True), "pair": (1, np.float64(0.5)), "none": None}
    written = json.loads(figures_json(make(metrics, detail=detail)))
    assert written["metrics"] == {"n": 3, "share": 0.25}
    assert written["detail"] == {"array": [[1, 2]], "flag": True, "pair": [1, 0.5], "none": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"auroc": math.nan}}, r"metrics\['auroc'\] is nan.*leave out what could not be measured"),
        ({"metrics": {"auroc": np.float32("inf")}}, r"metrics\['auroc'\] is inf"),
        ({"metrics": {"ok": True}}, r"metrics\['ok'\] is True; allowed: a number"),
        ({"metrics": {"auroc": None}}, r"metrics\['auroc'\] is None"),
        ({"metrics": {"auroc": "0.7"}}, r"metrics\['auroc'\] is '0.7'"),
        ({"metrics": {"a b": 1}}, "a metric's name is 'a b'"),
        ({"metrics": {"": 1}}, "a metric's name is ''"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"detail": {"rows": [{"x": 1}, {"x": math.nan}]}}, r"detail\['rows'\]\[1\]\['x'\] is nan"),
        ({"detail": {"rows": np.array([1.0, math.nan])}}, r"detail\['rows'\]\[1\] is nan"),
        ({"detail": {"raw": b"x"}}, r"detail\['raw'\] is b'x'"),
        ({"detail": {"path": Path("x")}}, r"detail\['path'\] is PosixPath"),
        ({"detail": {"cells": {3: 1}}}, r"a key in detail\['cells'\] is 3"),
    ],
)
def test_what_json_cannot_carry_is_refused_and_nothing_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    target = tmp_path / "figures.json"
    target.write_text("old")
    with pytest.raises(FigureError, match=message):
        write_figures(make(**changes), target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "figures.json"
    target.write_text("old")

    def refuse(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_figures(make(), target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["figures.json"]


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True), st.floats(allow_nan=False)))
def test_finite_metrics_come_back_exactly(metrics: dict[str, float]) -> None:
    if any(math.isinf(value) for value in metrics.values()):
        with pytest.raises(FigureError):
            figures_json(make(metrics))
    else:
        assert json.loads(figures_json(make(metrics)))["metrics"] == metrics


def test_the_table_joins_a_value_with_its_interval() -> None:
    metrics = {"arm_ratio": 1.18, "arm_ratio_low": 1.11, "arm_ratio_high": 1.26, "n_low": 3, "clicks": 12345}
    console = Console(record=True, width=90, file=io.StringIO())
    console.print(figures_table(make(metrics)))
    lines = console.export_text().splitlines()
    ratio = next(line for line in lines if "arm_ratio" in line)
    assert "1.18" in ratio
    assert "1.11 to 1.26" in ratio
    assert not any("arm_ratio_low" in line or "arm_ratio_high" in line for line in lines)
    assert any("n_low" in line for line in lines)
    assert any("12,345" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234567, "1,234,567"), (0.123456, "0.1235"), (1234.56, "1,235"), (2e-7, "2e-07")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert format_number(value) == text


def test_the_commit_is_that_of_a_checkout_that_tracks_this_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "other.py").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "somebody else's repository")
    (tmp_path / "figures.py").write_text("")
    assert commit(tmp_path) == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert commit(tmp_path) == git("rev-parse", "HEAD")


def test_the_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"
    assert device("gpu") == "unknown GPU"


def test_the_device_names_threads_and_imports_no_torch() -> None:
    code = "import sys; from osmf.figures import device; print(device()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == device()
    assert device().endswith(("thread", "threads"))
