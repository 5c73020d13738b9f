"""Processes: the demo's children, started, watched and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from osmf.settings import PREFIX
from streams.bound import bound_to_this_process

STOP_TIMEOUT_S = 20.0
TAIL_LINES = 15


class ChildFailedError(RuntimeError):
    """A process of the demo ended when it should not have."""

    def __init__(self, name: str, code: int, log_path: Path) -> None:
        lines = log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log_path.exists() else []
        super().__init__(
            f"`osmf {name}` ended with status {code}, and the demo with it. The end of {log_path}:\n  "
            + "\n  ".join(lines or ["(nothing was written)"])
        )
        self.name = name


class Children:
    """The ``osmf`` processes of one run, each with a log of its own.

    Parameters
    ----------
    log_dir
        Where the logs go.
    environment
        Variables of all children, beside those of this process that are no settings of ours.
    """

    def __init__(self, log_dir: Path, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._environment = {**inherited, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, arguments: Sequence[str] = ()) -> None:
        """Start ``osmf NAME``."""
        with (self._log_dir / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                bound_to_this_process([sys.executable, "-m", "osmf", name, *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def is_running(self, name: str) -> bool:
        """Return whether a child still runs; one that failed raises."""
        code = self._running[name].poll()
        if code:
            raise ChildFailedError(name, code, self._log_dir / f"{name}.log")
        return code is None

    def check(self) -> None:
        """Raise `ChildFailedError` when a child has failed."""
        for name in self._running:
            self.is_running(name)

    def stop(self, name: str) -> None:
        """End a child with SIGTERM, and with SIGKILL when it does not end."""
        process = self._running.pop(name)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
