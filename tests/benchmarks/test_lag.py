from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lag import AHEAD_EVENTS, OVERLOAD, bench_lag
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings
from state.store import Store, Table
from streams.settings import StreamSettings

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]


def test_an_overload_is_worked_off_without_a_loss(simulator: SimulatorSettings, online: OnlineSettings) -> None:
    seen: list[int] = []

    def check(state: Path, streams: StreamSettings) -> int:
        with Store(state, readonly=True) as store, store.read() as txn:
            seen.append(txn.count(Table.IMPRESSIONS))
        return 3

    measured = bench_lag(minutes=0.1, seeds=(21,), check=check, simulator=simulator, online=online)
    metrics, samples = measured.metrics, measured.detail["samples"]
    assert metrics["lost"] == metrics["dead_letters"] == 0
    assert metrics["contradictions"] == 3
    assert seen[0] > 0
    assert 0 < metrics["most_lag"] <= AHEAD_EVENTS + (OVERLOAD - 1) * metrics["sent"]
    assert samples[-1]["n_sent"] == samples[-1]["n_consumed"] == metrics["sent"]
    assert [sample["n_consumed"] for sample in samples] == sorted(sample["n_consumed"] for sample in samples)
    assert metrics["private_mib_most"] >= metrics["private_mib_end"] > 50
    assert measured.seeds == {"world_0": 21}
