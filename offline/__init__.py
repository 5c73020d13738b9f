"""Offline: scheduled jobs that turn a snapshot of the state into datasets and artifacts."""
