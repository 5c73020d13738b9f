"""``python -m osmf``: the command line."""

from osmf.cli import app

app()
