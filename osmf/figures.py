"""Figures: what a command measured, in one form for machines and one table for people.

``--json FILE`` (``-``: standard output) writes one JSON object with the fields of :class:`Figures`.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import numpy as np
from rich.table import Table

_METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.@-]*")
_TIMEOUT_S = 10


class FigureError(ValueError):
    """A figure that JSON cannot carry: not finite, not a number, or a name that is not flat."""

    def __init__(self, where: str, value: object, allowed: str) -> None:
        super().__init__(f"{where} is {value!r}; allowed: {allowed}. No figures are written.")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a command measured.

    ``metrics`` maps flat names to numbers (units in the name, as in ``rate_events_s``); a metric that
    could not be measured is left out. ``detail`` holds everything nested. ``seconds`` is wall time.
    """

    command: str
    commit: str
    seeds: dict[str, int]
    device: str
    seconds: float
    metrics: dict[str, float | int]
    detail: dict[str, Any] = {}


def figures_json(figures: Figures) -> str:
    """Return the figures as indented JSON with a final newline.

    NumPy scalars and arrays are written as plain numbers and lists.

    Raises
    ------
    FigureError
        A number is NaN or infinite, a metric is no number (True and False are none either), a metric's
        name is not flat, or ``detail`` holds what JSON has no form for. The message names the place.
    """
    for name in figures.metrics:
        if not _METRIC_NAME.fullmatch(name):
            raise FigureError("a metric's name", name, "a letter, then letters, digits and _ . @ -")
    plain = {
        "command": figures.command,
        "commit": figures.commit,
        "seeds": {name: int(seed) for name, seed in figures.seeds.items()},
        "device": figures.device,
        "seconds": _number("seconds", figures.seconds),
        "metrics": {name: _number(f"metrics[{name!r}]", value) for name, value in figures.metrics.items()},
        "detail": _plain("detail", figures.detail),
    }
    return msgspec.json.format(msgspec.json.encode(plain), indent=2).decode() + "\n"


def write_figures(figures: Figures, target: str | Path, *, stdout: TextIO | None = None) -> None:
    """Write the figures as JSON to a file, or to standard output when the target is ``-``.

    A file appears whole or not at all: it is written beside its place, synced and renamed. Missing
    folders are made. Nothing is written when a figure is refused (see :func:`figures_json`).
    """
    text = figures_json(figures)
    if str(target) == "-":
        stream = sys.stdout if stdout is None else stdout
        stream.write(text)
        stream.flush()
        return
    write_whole(Path(target), text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def figures_table(figures: Figures) -> Table:
    """Return the metrics as a table; ``x`` with ``x_low`` and ``x_high`` becomes one row with its interval."""
    title = f"{figures.command}  ·  {figures.seconds:,.1f} s  ·  {figures.device}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95% interval", justify="right", no_wrap=True, style="dim")
    metrics = figures.metrics
    for name, value in metrics.items():
        stem = name.removesuffix("_low").removesuffix("_high")
        if stem != name and {stem, f"{stem}_low", f"{stem}_high"} <= metrics.keys():
            continue
        interval = ""
        if {f"{name}_low", f"{name}_high"} <= metrics.keys():
            interval = f"{format_number(metrics[f'{name}_low'])} to {format_number(metrics[f'{name}_high'])}"
        table.add_row(name, format_number(value), interval)
    return table


def format_number(value: float) -> str:
    """Return a number for people: thousands separated, four significant digits below a thousand."""
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def commit(folder: Path | None = None) -> str:
    """Return the commit of the checkout that this code runs from, or "unknown".

    An installed copy inside somebody else's repository is not ours: the commit counts only when
    this file is tracked there. ``folder`` is where to look (default: this file's folder).
    """
    here = Path(__file__).resolve()
    folder = here.parent if folder is None else folder
    if _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", "--", here.name]) is None:
        return "unknown"
    return _output(["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]) or "unknown"


def device(kind: Literal["cpu", "gpu"] = "cpu") -> str:
    """Return the device in words: the processor's model and the threads at hand, or the GPU's name.

    Say "gpu" where the work ran on one; its name comes from the driver, so nothing is imported.
    """
    if kind == "gpu":
        names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
        return ", ".join(name.strip() for name in names.splitlines()) if names else "unknown GPU"
    n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {n_threads} thread{'' if n_threads == 1 else 's'}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), flags=re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine() or "unknown processor"


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _number(where: str, value: object) -> float | int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise FigureError(where, value, "a number")
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if not math.isfinite(number):
        raise FigureError(where, number, "a finite number; leave out what could not be measured")
    return number


def _plain(where: str, value: object) -> object:
    """Return the value as dicts, lists, strings, numbers, booleans and None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Real):
        return _number(where, value)
    if isinstance(value, np.ndarray):
        return _plain(where, value.tolist())
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise FigureError(f"a key in {where}", key, "a string")
        return {key: _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, msgspec.Struct):
        return _plain(where, msgspec.to_builtins(value))
    raise FigureError(where, value, "null, strings, booleans, finite numbers, lists and objects of those")
