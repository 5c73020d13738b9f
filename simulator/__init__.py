"""Simulator: a world with known preferences, real products and creatives."""
