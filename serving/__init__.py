"""Serving: which creative to show, over HTTP, and the experiments on it."""
