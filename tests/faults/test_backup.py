"""The online process on a full disk, and from a backup that was taken while it ran: it ends with the same state."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from osmf.verify import verify_state
from state.backup import restore_backup, write_backup
from streams.broker import LocalBroker
from streams.settings import StreamSettings
from tests.faults.stream import Online, produce
from tests.faults.worker import differences, n_consumed

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_full_disk_and_a_restored_backup_leave_no_trace(tmp_path: Path) -> None:
    undisturbed, state, restored = tmp_path / "undisturbed", tmp_path / "state", tmp_path / "restored"
    with LocalBroker(topics={}, log_path=tmp_path / "broker.log") as broker:
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, batch_events=512)
        broker.create_topics(dict.fromkeys(streams.topics.model_dump().values(), 1))
        n_events = produce(streams, tmp_path, n_impressions=5_000)
        Online(streams, undisturbed).run_to_its_end()

        # A limit on the size of files is the full disk that needs no rights.
        online = Online(streams, state)
        process = online.start()
        limit = (undisturbed / "data.mdb").stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        assert process.wait(100) == 1, online.log.read_text()
        said = online.log.read_text()
        assert f"osmf: state at {state} could not be written (mdb_txn_commit: " in said
        assert "offsets included, and all earlier commits were kept. Make room on that disk" in said
        assert "Traceback" not in said
        assert verify_state(state, streams).broken == []
        n_before = n_consumed(state)
        assert 0 < n_before < n_events

        process = online.start()
        while n_consumed(state) == n_before:
            assert process.poll() is None, online.log.read_text()
            time.sleep(0.002)
        manifest = write_backup(state, tmp_path / "backup", now_ms=1, osmf_version="test")
        assert process.wait(100) == 0, online.log.read_text()
        assert differences(undisturbed, state) == []

        restore_backup(tmp_path / "backup", restored, now_ms=2, force=False)
        found = verify_state(restored, streams)
        assert (found.broken, found.totals.n_impressions) == ([], manifest.n_impressions)
        n_at_backup = n_consumed(restored)
        assert n_at_backup == sum(offset.next_offset for offset in manifest.offsets)
        assert n_before < n_at_backup < n_events
        Online(streams, restored).run_to_its_end()
        assert differences(undisturbed, restored) == []
