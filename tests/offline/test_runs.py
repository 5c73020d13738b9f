"""The run log."""

from __future__ import annotations

import json

import pytest

from offline.runs import CorruptRunLogError, RunLog, RunRecord


def run(number, outcome="built", **more):
    return RunRecord(run_id=f"run-{number}", started_at_ms=number, finished_at_ms=number + 1, outcome=outcome, **more)


def test_runs_come_back_in_order(tmp_path):
    log = RunLog(tmp_path / "deep" / "runs.jsonl")
    assert log.read() == []
    runs = [
        run(1, step="grm", figures={"n_rows": 4}, artifact="grm/v000001"),
        run(2, "skipped", reason="too little\nis new"),
        run(3, "failed"),
    ]
    for record in runs:
        log.append(record)
    assert log.read() == runs


def test_each_run_is_one_json_line(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(run(1, "skipped", reason="line\nbreak"))
    log.append(run(2))
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["run_id"] for line in lines] == ["run-1", "run-2"]


@pytest.mark.parametrize("torn", [b'{"run_id":"run-2","jo', b"{"])
def test_a_torn_last_line_costs_that_run_alone(tmp_path, torn):
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(run(1))
    with log.path.open("ab") as file:
        file.write(torn)
    assert log.read() == [run(1)]
    log.append(run(3))
    assert log.read() == [run(1), run(3)]


def test_a_whole_line_that_is_no_run_is_refused(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(run(1))
    with log.path.open("ab") as file:
        file.write(b'{"run_id": 3}\n')
    with pytest.raises(CorruptRunLogError, match="line 2"):
        log.read()


def test_lines_from_before_there_were_steps_are_read(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    log.path.write_text(
        '{"run_id":"gaip-1-2","job":"gaip","started_at_ms":1,"finished_at_ms":2,"outcome":"built","n_rows":3}\n'
    )
    [record] = log.read()
    assert (record.run_id, record.step, record.outcome) == ("gaip-1-2", "rebuild", "built")
