"""Borrowed groups: served like any others, from the first impressions of a product on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from online.worker import build_pipeline
from serving.decisions import DecisionRequest, DecisionService
from serving.policy import arm_of
from serving.settings import ServingSettings
from state.reading import StateReader, open_view
from state.store import Store
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Creative, Event, Impression, Product
from streams.merge import Message

LATER_MS = 1_748_822_400_000 + 600_000
USERS = [f"v{n}" for n in range(2_000) if arm_of("groups", f"v{n}") == "group"]


def shown(product_id: str) -> list[Event]:
    """Return a product like "split", and its first two impressions; the others have had 2,500 each."""
    events: list[Event] = [Product(product_id=product_id, title="the split product", updated_at_ms=LATER_MS)]
    events += [Creative(creative_id=each, product_id=product_id, created_at_ms=LATER_MS) for each in "abcd"]
    for number in range(2):
        events.append(
            Impression(
                impression_id=f"{product_id}{number}",
                user_id=f"u{number}",
                product_id=product_id,
                creative_id="abcd"[number],
                shown_at_ms=LATER_MS,
                attributes={"age": ("young", "old")[number], "tier": "1"},
            )
        )
    return events


@pytest.mark.parametrize(("warm_up_impressions", "by_group"), [(2_400, True), (2_600, False)])
def test_a_new_product_is_served_by_its_neighbours_groups_once_the_system_is_warm(
    state: Any, settings: ServingSettings, tmp_path: Path, warm_up_impressions: int, by_group: bool
) -> None:
    copytree(state.path, tmp_path, dirs_exist_ok=True)
    topic_of = event_topics(state.streams.topics)
    messages = [
        Message(topic_of[type(event)], 0, 100_000 + offset, event_time_ms(event), encode(event))
        for offset, event in enumerate(shown("twin"))
    ]
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        pipeline = build_pipeline(state.streams, state.online)
        pipeline.restore(store)
        with store.read() as txn:
            changes, _ = pipeline.run(messages, txn)
        store.commit(changes)
        with open_view(store) as view:
            groups = view.groups("twin")
        warm = settings.model_copy(update={"warm_up_impressions": warm_up_impressions})
        reader = StateReader.of(store)
        service = DecisionService(reader, state.online, warm, impressions_topic=state.streams.topics.impressions)
        service.refresh()
        decisions = {
            age: service.decide_many([DecisionRequest(user, "twin", {"age": age, "tier": "1"}) for user in USERS])
            for age in ("old", "young")
        }
    assert groups is not None
    assert groups.borrowed_from == "split"
    ids = {age: {decision.group_id for decision in of_age} for age, of_age in decisions.items()}
    assert ids["old"] != ids["young"]
    assert ids["old"] | ids["young"] == {group.group_id for group in groups.groups}
    # Nothing was counted but two impressions: it is the model's word that the old like "a" and the young "d".
    shares = {
        age: Counter(decision.creative_id for decision in decisions[age])[liked] / len(USERS)
        for age, liked in (("old", "a"), ("young", "d"))
    }
    arms = {decision.arm for of_age in decisions.values() for decision in of_age}
    if by_group:
        # The other products' creatives are as far apart as 5% and 50%, so that one that nobody knows may be far better.
        assert min(shares.values()) > 0.35
        assert arms == {"group"}
    else:
        assert max(shares.values()) < 0.3
        assert arms == {None}
