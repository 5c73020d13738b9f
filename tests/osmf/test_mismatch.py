"""A state that was built with other settings is refused by every process that would use it, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from osmf.cli import app
from state.records import SPACE_KEY
from state.store import ChangeSet, Store, Table


@pytest.mark.parametrize(
    "command", [["online"], ["serve", "--port", "0"], ["eval", "groups", "--quick"]], ids=lambda command: command[0]
)
def test_groups_of_another_space_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    truth = tmp_path / "truth.json"
    with Store(tmp_path / "state", map_size_mib=16, sync=False) as store:
        changes = ChangeSet()
        changes.put(Table.ENCODERS, SPACE_KEY, b"embedding")
        store.commit(changes)
    truth.write_text(
        '{"run_id":"r","seed":1,"completed":true,"started_at_ms":0,"ended_at_ms":1,"shifted_at_ms":null,'
        '"shifted_after_impressions":null,"shifted_categories":[],"shift_kind":"swap","n_impressions":0,"n_clicks":0,'
        '"n_late_clicks":0,"produced":{},"duplicates":{},"spoiled":{},"spoiled_by_topic":{},"by_creative":{},'
        '"by_arm":{},"n_creatives_learned":0,"n_creatives_without_style":0,"policies":{},"products":[],"users":[]}'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSMF_STATE__PATH", str(tmp_path / "state"))
    arguments = [*command, "--truth", str(truth)] if command[0] == "eval" else command
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    shown = " ".join(result.output.split())
    assert "users are grouped by embedding, online.groups.space is 'taste': no user was grouped" in shown
    assert "Traceback" not in shown
