"""Benchmarks: the measurements behind ``osmf bench`` and ``osmf eval``."""
