"""A demo that ends early, by whatever signal, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILDREN = 4
PATIENCE_S = 60.0


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, from the kernel's table."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    """Return whether a process goes on; what has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["TERM", "INT", "KILL"])
def test_a_demo_that_ends_early_takes_its_processes_along(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "osmf", "demo", "--out", str(tmp_path / "demo"), "--impressions", "40000"]
    with (tmp_path / "demo.log").open("wb") as log:
        demo = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            while len(children_of(demo.pid)) < CHILDREN and time.monotonic() < deadline_s:
                assert demo.poll() is None, (tmp_path / "demo.log").read_text()
                time.sleep(0.1)
            started = children_of(demo.pid)
            assert len(started) >= CHILDREN
            demo.send_signal(number)
            assert demo.wait(PATIENCE_S) != 0
        finally:
            demo.kill()
            demo.wait()
    deadline_s = time.monotonic() + PATIENCE_S
    while any(map(is_running, started)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert [pid for pid in started if is_running(pid)] == []
