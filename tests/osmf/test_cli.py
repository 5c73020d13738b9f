"""The command line: what commands there are, and that its help is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer.main
from typer.testing import CliRunner

from osmf.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *("demo", "broker", "online", "generator", "serve", "simulate"),
    *(
        "replay",
        "inspect",
        "forget",
        "verify",
        "backup",
        "restore",
        "bench",
        "eval",
        "schemas",
        "settings",
        "offline",
        "state",
        "creative",
    ),
]
HEAVY = ("torch", "transformers", "scipy", "sklearn", "kafka", "duckdb", "lmdb", "numpy", "pyarrow")


def test_the_commands() -> None:
    assert list(typer.main.get_group(app).commands) == COMMANDS
    for command in COMMANDS:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, command
        assert command in result.output


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom osmf.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
