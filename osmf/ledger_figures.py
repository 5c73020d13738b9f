"""Ledger figures: what the ledger holds, what has left it, and what corrections took back."""

from __future__ import annotations

from state.records import LedgerRecord


def ledger_metrics(ledger: LedgerRecord) -> dict[str, float | int]:
    """Return the ledger's numbers by name."""
    return {
        "ledger_entries": ledger.n_entries,
        "ledger_expired": ledger.n_expired,
        "ledger_dropped": ledger.n_dropped,
        "users_forgotten": ledger.n_users_forgotten,
        "impressions_taken_back": ledger.n_impressions_taken_back,
        "clicks_taken_back": ledger.n_clicks_taken_back,
        "clicks_retracted": ledger.n_clicks_retracted,
    }


def ledger_words(ledger: LedgerRecord) -> str:
    """Return the same in words; what was dropped beyond the ceiling is named only where something was."""
    words = f"{ledger.n_entries:,} ledger entries ({ledger.n_expired:,} expired"
    if ledger.n_dropped:
        words += f", {ledger.n_dropped:,} dropped beyond online.ledger.max_entries"
    return (
        f"{words}), {ledger.n_clicks_retracted:,} clicks retracted, {ledger.n_users_forgotten:,} users forgotten "
        f"with {ledger.n_impressions_taken_back:,} impressions and {ledger.n_clicks_taken_back:,} clicks"
    )
