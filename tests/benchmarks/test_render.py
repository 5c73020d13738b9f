from __future__ import annotations

from benchmarks.render import N_QUICK_PICTURES, bench_render


def test_pictures_take_time() -> None:
    metrics = bench_render(quick=True).metrics
    assert metrics["pictures"] == N_QUICK_PICTURES
    assert 0 < metrics["procedural_ms"] <= metrics["procedural_p95_ms"]
