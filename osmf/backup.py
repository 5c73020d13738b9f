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
from state.backup import BackupManifest, restore_backups, write_backups


def run_backup(path: Path, folder: Path, *, now_ms: int) -> tuple[Figures, list[RenderableType]]:
    """Back a state up (see `state.backup.write_backups`); return what the backup holds, as figures and in words."""
    started_s = time.monotonic()
    manifests = write_backups(path, folder, now_ms=now_ms, osmf_version=__version__)
    figures = _figures("backup", list(manifests.values()), started_s, {"state": str(path), "backup": str(folder)})
    shown = [Text.assemble((f"{folder}: backup of {path}. ", "bold"), _words(each)) for each in manifests.values()]
    return figures, list(shown)


def run_restore(folder: Path, path: Path, *, now_ms: int, force: bool) -> tuple[Figures, list[RenderableType]]:
    """Restore a backup (see `state.backup.restore_backups`); return what it holds, as figures and in words."""
    started_s = time.monotonic()
    restored = restore_backups(folder, path, now_ms=now_ms, force=force)
    # A replay may remove the state of an earlier replay; this one is a backup's now.
    (path / REPLAY_MARK).unlink(missing_ok=True)
    kept = [str(aside) for _, aside in restored.values() if aside is not None]
    detail = {"state": str(path), "backup": str(folder), "former_state": ", ".join(kept) or None}
    shown = []
    for manifest, aside in restored.values():
        made_at = datetime.fromtimestamp(manifest.created_at_ms / 1000, UTC)
        shown.append(
            Text.assemble(
                (f"{path}: restored from {folder}, made at {made_at:%Y-%m-%d %H:%M:%S} UTC. ", "bold"),
                _words(manifest),
                "" if aside is None else f" The former state is kept in {aside}.",
            )
        )
    readers = "`osmf serve`, `osmf generator`, `osmf offline schedule`"
    shown.append(Text(f"Start again whatever reads this state ({readers})."))
    return _figures("restore", [manifest for manifest, _ in restored.values()], started_s, detail), list(shown)


def _words(manifest: BackupManifest) -> str:
    offsets = ", ".join(f"{each.topic}[{each.partition}] at {each.next_offset:,}" for each in manifest.offsets)
    return (
        f"{manifest.n_impressions:,} impressions and {manifest.n_clicks:,} clicks in {manifest.n_cells:,} cells of "
        f"{manifest.n_products:,} products, {manifest.n_bytes / 2**20:,.1f} MiB. Continues with {offsets or 'nothing'}."
    )


def _figures(command: str, manifests: list[BackupManifest], started_s: float, detail: dict[str, str | None]) -> Figures:
    return Figures(
        command=command,
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics={
            "shards": len(manifests),
            "products": sum(each.n_products for each in manifests),
            "creatives": sum(each.n_creatives for each in manifests),
            "cells": sum(each.n_cells for each in manifests),
            "impressions": sum(each.n_impressions for each in manifests),
            "clicks": sum(each.n_clicks for each in manifests),
            "bytes": sum(each.n_bytes for each in manifests),
        },
        detail={**detail, "manifests": manifests},
    )
