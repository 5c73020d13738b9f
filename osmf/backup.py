"""Backup: what `osmf backup` and `osmf restore` do and say."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from osmf import __version__
from osmf.figures import Figures, commit, device
from osmf.replay import REPLAY_MARK
from state.backup import BackupManifest, restore_backup, write_backup


def run_backup(path: Path, folder: Path, *, now_ms: int) -> tuple[Figures, list[RenderableType]]:
    """Back a state up (see `state.backup.write_backup`); return what the backup holds, as figures and in words."""
    started_s = time.monotonic()
    manifest = write_backup(path, folder, now_ms=now_ms, osmf_version=__version__)
    figures = _figures("backup", manifest, started_s, {"state": str(path), "backup": str(folder)})
    return figures, [Text.assemble((f"{folder}: backup of {path}. ", "bold"), _words(manifest))]


def run_restore(folder: Path, path: Path, *, now_ms: int, force: bool) -> tuple[Figures, list[RenderableType]]:
    """Restore a backup (see `state.backup.restore_backup`); return what it holds, as figures and in words."""
    started_s = time.monotonic()
    manifest, aside = restore_backup(folder, path, now_ms=now_ms, force=force)
    # A replay may remove the state of an earlier replay; this one is a backup's now.
    (path / REPLAY_MARK).unlink(missing_ok=True)
    detail = {"state": str(path), "backup": str(folder), "former_state": None if aside is None else str(aside)}
    made_at = datetime.fromtimestamp(manifest.created_at_ms / 1000, UTC)
    words = Text.assemble(
        (f"{path}: restored from {folder}, made at {made_at:%Y-%m-%d %H:%M:%S} UTC. ", "bold"),
        _words(manifest),
        "" if aside is None else f" The former state is kept in {aside}.",
        " Start again whatever reads this state (`osmf serve`, `osmf generator`, `osmf offline`).",
    )
    return _figures("restore", manifest, started_s, detail), [words]


def _words(manifest: BackupManifest) -> str:
    offsets = ", ".join(f"{each.topic}[{each.partition}] at {each.next_offset:,}" for each in manifest.offsets)
    return (
        f"{manifest.n_impressions:,} impressions and {manifest.n_clicks:,} clicks in {manifest.n_cells:,} cells of "
        f"{manifest.n_products:,} products, {manifest.n_bytes / 2**20:,.1f} MiB. Continues with {offsets or 'nothing'}."
    )


def _figures(command: str, manifest: BackupManifest, started_s: float, detail: dict[str, str | None]) -> Figures:
    return Figures(
        command=command,
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics={
            "products": manifest.n_products,
            "creatives": manifest.n_creatives,
            "cells": manifest.n_cells,
            "impressions": manifest.n_impressions,
            "clicks": manifest.n_clicks,
            "bytes": manifest.n_bytes,
        },
        detail={**detail, "manifest": manifest},
    )
