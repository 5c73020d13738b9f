"""The lag chart: a picture that stands by itself, with what was seen in it."""

from __future__ import annotations

from xml.etree import ElementTree

from osmf.figures import Figures
from osmf.lag_chart import lag_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_lag_and_memory_are_drawn_over_the_same_moments() -> None:
    samples = [
        {"seconds": float(n), "n_sent": 3_000 * n, "n_consumed": 1_000 * n, "private_mib": 500.0 + n % 2}
        for n in range(21)
    ]
    figures = Figures(
        command="bench lag",
        commit="",
        seeds={},
        device="",
        seconds=21.0,
        metrics={"overload_from_s": 5.0, "overload_s": 10.0},
        detail={"samples": samples},
    )
    root = ElementTree.fromstring(lag_chart(figures))
    assert root.tag == f"{SVG}svg"
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert words.count("three times too much") == words.count("no more is sent") == 2
    assert [word for word in words if word in ("40", "500")][-1:] == ["500"]
    assert "40" in words  # the last lag, in thousands, at the line's end
    lines = [path for path in root.iter(f"{SVG}path") if path.get("class", "").startswith("line")]
    assert len(lines) == 2
