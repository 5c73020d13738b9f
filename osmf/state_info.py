"""State info: the files of a state rather than what it has learnt."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from osmf.figures import Figures, commit, device
from osmf.ledger_figures import ledger_metrics, ledger_words
from state.files import DATA_FILE
from state.reading import StateReader
from state.store import LAYOUT_VERSION


def run_state_info(path: Path) -> tuple[Figures, list[RenderableType]]:
    """Return a state's layout version, size, offsets and tables, as figures and to be shown.

    Raises
    ------
    state.errors.StateError
        There is no state, or it cannot be used: of another layout, damaged, or not to be opened.
    """
    started_s = time.monotonic()
    with StateReader(path) as state, state.view() as view:
        n_entries = view.n_entries()
        offsets = {f"{topic}[{n}]": offset.next_offset for (topic, n), offset in view.offsets().items()}
        stores = state.stores.values()
        ledger = view.ledger()
        metrics: dict[str, float | int] = {
            **ledger_metrics(ledger),
            "layout_version": LAYOUT_VERSION,
            "shards": len(stores),
            "used_bytes": sum(store.size_bytes() for store in stores),
            "file_bytes": sum((store.path / DATA_FILE).stat().st_size for store in stores),
            "map_bytes": sum(store.map_bytes() for store in stores),
        }
    figures = Figures(
        command="state info",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics=metrics,
        detail={"state": str(path), "tables": n_entries, "next_offsets": offsets},
    )
    mib = {name: f"{metrics[f'{name}_bytes'] / 2**20:,.1f} MiB" for name in ("used", "file", "map")}
    words = Text.assemble(
        (f"{path}: layout {LAYOUT_VERSION}. ", "bold"),
        f"{mib['used']} in use, a file of {mib['file']}, a map of {mib['map']}, which grows by itself. ",
        f"{ledger_words(ledger)}.",
    )
    return figures, [words, _counts("partition", "next offset", offsets), _counts("table", "entries", n_entries)]


def _counts(what: str, of: str, counts: dict[str, int]) -> Table:
    table = Table(header_style="dim")
    table.add_column(what)
    table.add_column(of, justify="right")
    for name, n in counts.items():
        table.add_row(name, f"{n:,}")
    return table
