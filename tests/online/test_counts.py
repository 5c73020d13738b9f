"""Counts: whatever groups do, no impression and no click is lost or made up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.counts import Cell, Counts, TakenBack
from state.reading import open_view
from state.records import ArmRecord, ImpressionRecord, encode_record
from state.store import ChangeSet, Store, Table

HOUR_MS = 3_600_000


def impression(
    product: str = "p", creative: str = "c", group: int = 0, *, arm: str | None = None, bucket: int = 0
) -> ImpressionRecord:
    experiment = None if arm is None else "groups"
    return ImpressionRecord(product, creative, b"", group, 0, bucket, experiment, arm, False, False)


def totals(counts: Counts, product: str = "p") -> dict[str, tuple[int, int]]:
    """Return (impressions, clicks) by creative, over all groups."""
    found: dict[str, tuple[int, int]] = {}
    for (_, creative), cell in counts.cells_of(product).items():
        n, x = found.get(creative, (0, 0))
        found[creative] = (n + cell.n_impressions, x + cell.n_clicks)
    return found


def test_impressions_and_clicks_count_in_the_group_that_is_given() -> None:
    counts = Counts(HOUR_MS)
    shown = [impression(group=1), impression(group=1), impression(group=2, creative="d")]
    counts.count_impressions(shown, 0)
    counts.count_clicks([(shown[0], 1), (shown[2], 5)], 0)
    found = {key: (cell.n_impressions, cell.n_clicks) for key, cell in counts.cells_of("p").items()}
    assert found == {(1, "c"): (2, 1), (2, "d"): (1, 0), (5, "d"): (0, 1)}
    assert counts.cells_of("q") == {}


@pytest.mark.parametrize(("n_half_lives", "left"), [(0, 1.0), (1, 0.5), (2, 0.25), (0.5, 0.5**0.5), (2_000, 0.0)])
def test_live_counts_lose_half_of_their_weight_in_a_half_life(n_half_lives: float, left: float) -> None:
    cell = Cell(8, 4, 8.0, 4.0, 1_000)
    cell.decay(1_000 + int(n_half_lives * HOUR_MS), HOUR_MS)
    assert (cell.live_impressions, cell.live_clicks) == pytest.approx((8 * left, 4 * left))
    assert (cell.n_impressions, cell.n_clicks) == (8, 4)


def test_a_clock_that_steps_back_gives_no_weight_back() -> None:
    cell = Cell(8, 4, 8.0, 4.0, HOUR_MS)
    cell.decay(0, HOUR_MS)
    assert cell == Cell(8, 4, 8.0, 4.0, HOUR_MS)


def test_decay_in_steps_is_decay_at_once() -> None:
    steps, once = Cell(1, 1, 3.0, 2.0, 0), Cell(1, 1, 3.0, 2.0, 0)
    for at_ms in range(0, HOUR_MS * 3 + 1, HOUR_MS // 7):
        steps.decay(at_ms, HOUR_MS)
    steps.decay(3 * HOUR_MS, HOUR_MS)
    once.decay(3 * HOUR_MS, HOUR_MS)
    assert steps.live_impressions == pytest.approx(once.live_impressions, rel=1e-12)


def test_a_click_after_some_decay_still_counts_live() -> None:
    counts = Counts(HOUR_MS)
    shown = impression()
    counts.count_impressions([shown], 0)
    counts.count_clicks([(shown, 0)], HOUR_MS // 100)
    cell = counts.cells_of("p")[0, "c"]
    assert cell.n_clicks == 1
    assert 0.99 < cell.live_clicks <= cell.live_impressions < 1


def test_a_click_on_an_impression_before_a_restart_gives_no_ctr_over_1() -> None:
    counts = Counts(HOUR_MS)
    shown = [impression() for _ in range(3)]
    counts.count_impressions(shown, 0)
    counts.restart_live("p", {(0, "c"): (1, 0)}, 0, 0)
    counts.count_clicks([(each, 0) for each in shown], 0)
    cell = counts.cells_of("p")[0, "c"]
    assert (cell.n_impressions, cell.n_clicks, cell.live_impressions, cell.live_clicks) == (3, 3, 1.0, 1.0)


def test_a_restart_sets_live_counts_to_the_evidence_and_leaves_life_alone() -> None:
    counts = Counts(HOUR_MS)
    shown = [impression(creative=c) for c in "aab"] + [impression("q")]
    counts.count_impressions(shown, 0)
    counts.restart_live("p", {(0, "a"): (1, 1)}, 500, 0)
    cells = counts.cells_of("p")
    assert cells[0, "a"] == Cell(2, 0, 1.0, 1.0, 500)
    assert cells[0, "b"] == Cell(1, 0, 0.0, 0.0, 500)
    assert counts.cells_of("q")[0, "c"] == Cell(1, 0, 1.0, 0.0, 0)


# What may happen: impressions, clicks of the n-th impression, one group's counts handed to another, time passing.
actions = st.lists(
    st.one_of(
        st.tuples(st.just("show"), st.integers(0, 3), st.sampled_from("abc")),
        st.tuples(st.just("click"), st.integers(0, 100), st.just("")),
        st.tuples(st.just("merge"), st.integers(0, 3), st.sampled_from("0123")),
        st.tuples(st.just("wait"), st.integers(0, 5 * HOUR_MS), st.just("")),
        st.tuples(st.just("restart"), st.integers(0, 0), st.just("")),
    ),
    max_size=60,
)


@given(actions)
def test_sums_over_groups_are_the_creatives_totals_after_any_merges(actions: list[tuple[str, int, str]]) -> None:
    counts = Counts(HOUR_MS)
    shown: list[ImpressionRecord] = []
    clicked: set[int] = set()
    heirs: dict[int, int] = {}
    now_ms = 0
    expected: dict[str, Counter[str]] = {"n": Counter(), "x": Counter()}

    def current(group: int) -> int:
        while group in heirs:
            group = heirs[group]
        return group

    for action, number, word in actions:
        if action == "show":
            # Groups that have merged get no new impressions.
            record = impression(creative=word, group=current(number))
            shown.append(record)
            counts.count_impressions([record], now_ms)
            expected["n"][word] += 1
        elif action == "click" and shown and number % len(shown) not in clicked:
            record = shown[number % len(shown)]
            clicked.add(number % len(shown))
            counts.count_clicks([(record, current(record.group_id))], now_ms)
            expected["x"][record.creative_id] += 1
        elif action == "merge":
            old, heir = current(number), current(int(word))
            if old != heir:
                heirs[old] = heir
                counts.hand_over("p", old, heir, now_ms)
                assert all(group != old for group, _ in counts.cells_of("p"))
        elif action == "wait":
            now_ms += number
        elif action == "restart":
            counts.restart_live("p", {}, now_ms, 0)
        assert totals(counts) == {c: (n, expected["x"][c]) for c, n in expected["n"].items()}
        for cell in counts.cells_of("p").values():
            assert 0 <= cell.n_clicks <= cell.n_impressions
            assert 0 <= cell.live_clicks <= cell.live_impressions <= cell.n_impressions + 1e-9


def test_new_groups_get_the_live_counts_of_their_users_as_far_as_they_are_remembered() -> None:
    counts = Counts(HOUR_MS)
    shown = [impression() for _ in range(40)] + [impression(group=1) for _ in range(40)]
    counts.count_impressions(shown, 0)
    counts.count_clicks([(each, each.group_id) for each in shown[::10]], 0)
    # Half of the 80 are remembered, with half of the clicks.
    counts.distribute_live("p", {(2, "c"): (30, 3), (3, "c"): (10, 1)}, 0)
    live = {key: (cell.live_impressions, cell.live_clicks) for key, cell in counts.cells_of("p").items()}
    assert live == {(0, "c"): (20, 2), (1, "c"): (20, 2), (2, "c"): (30, 3), (3, "c"): (10, 1)}
    assert totals(counts) == {"c": (80, 8)}


cell_counts = st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda pair: (max(pair), min(pair)))


@given(
    st.dictionaries(st.integers(0, 3), cell_counts, min_size=1),
    st.dictionaries(st.integers(0, 5), cell_counts.filter(lambda pair: pair[0] > 0), min_size=1),
)
def test_live_impressions_are_neither_lost_nor_made_up_when_they_are_distributed(
    before: dict[int, tuple[int, int]], remembered: dict[int, tuple[int, int]]
) -> None:
    counts = Counts(HOUR_MS)
    for group_id, (n, n_clicks) in before.items():
        counts.count_impressions([impression(group=group_id)] * n, 0)
        counts.count_clicks([(impression(group=group_id), group_id)] * n_clicks, 0)
    counts.distribute_live("p", {(group_id, "c"): pair for group_id, pair in remembered.items()}, 0)
    cells = counts.cells_of("p").values()
    assert sum(cell.live_impressions for cell in cells) == pytest.approx(sum(n for n, _ in before.values()))
    assert sum(cell.live_clicks for cell in cells) <= sum(n for _, n in before.values()) + 1e-9
    assert all(0 <= cell.live_clicks <= cell.live_impressions for cell in cells)


def test_handing_over_decays_both_sides_to_the_same_time() -> None:
    counts = Counts(HOUR_MS)
    counts.count_impressions([impression(group=1)] * 4, 0)
    counts.count_impressions([impression(group=2)] * 2, HOUR_MS)
    counts.hand_over("p", 1, 2, 2 * HOUR_MS)
    assert counts.cells_of("p") == {(2, "c"): Cell(6, 0, 4 / 4 + 2 / 2, 0.0, 2 * HOUR_MS)}


def test_what_is_written_is_read_back_and_merged_cells_are_gone(tmp_path: Path) -> None:
    counts = Counts(HOUR_MS)
    shown = [impression(group=g, creative=c, arm="all", bucket=3) for g in (1, 2) for c in "ab"]
    with Store(tmp_path, map_size_mib=16, sync=False) as store:

        def commit(of: Counts) -> int:
            changes = ChangeSet()
            of.write(changes)
            store.commit(changes)
            return len(changes)

        counts.count_impressions(shown, 5)
        counts.count_clicks([(shown[0], 1)], 6)
        assert commit(counts) == 5
        assert commit(counts) == 0  # only what has changed
        counts.hand_over("p", 1, 2, 7)
        commit(counts)
        with open_view(store) as view:
            cells = [(c.group_id, c.creative_id, c.n_impressions, c.n_clicks) for c in view.cells("p")]
            assert cells == [(2, "a", 2, 1), (2, "b", 2, 0)]
            assert view.arms() == {("groups", "all", 3): ArmRecord(4, 1)}
        again = Counts(HOUR_MS)
        with store.read() as txn:
            again.restore(txn)
            assert again.cells_of("p") == {}
            again.bring_in("p", txn)
        assert again.cells_of("p") == counts.cells_of("p")
        again.count_impressions(shown[:1], 8)
        counts.count_impressions(shown[:1], 8)
        assert again.cells_of("p") == counts.cells_of("p")


def test_impressions_outside_an_experiment_count_for_no_arm(tmp_path: Path) -> None:
    counts, changes = Counts(HOUR_MS), ChangeSet()
    counts.count_impressions([impression(), impression(arm="all"), impression(arm="group", bucket=2)], 0)
    counts.write(changes)
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        with open_view(store) as view:
            assert sorted(view.arms()) == [("groups", "all", 0), ("groups", "group", 2)]


# --- Taking back


LABEL_MS = 1_000


def taken(record: ImpressionRecord, group: int | None = None) -> TakenBack:
    return TakenBack(record, record.group_id if group is None else group, record.shown_at_ms + LABEL_MS)


def shown_at(at_ms: int, *, clicked_ms: int | None = None, arm: str | None = None) -> ImpressionRecord:
    record = impression(arm=arm)
    record.shown_at_ms, record.counted_ms = at_ms, at_ms
    record.clicked, record.clicked_ms = clicked_ms is not None, clicked_ms or 0
    return record


def play(shown: list[ImpressionRecord], restart_ms: int | None, now_ms: int) -> Counts:
    """Count impressions and clicks in their order, with the live counts begun anew once, without evidence."""
    counts = Counts(HOUR_MS)
    steps: list[tuple[int, int, ImpressionRecord | None]] = [(r.counted_ms, 0, r) for r in shown]
    steps += [(r.clicked_ms, 1, r) for r in shown if r.clicked]
    if restart_ms is not None:
        steps.append((restart_ms, 2, None))
    for at_ms, what, record in sorted(steps, key=lambda step: step[:2]):
        if record is None:
            counts.restart_live("p", {}, at_ms, at_ms)
        elif what:
            counts.count_clicks([(record, 0)], at_ms)
        else:
            counts.count_impressions([record], at_ms)
    for cell in counts.cells_of("p").values():
        cell.decay(now_ms, HOUR_MS)
    return counts


times = st.integers(0, 10 * HOUR_MS)


@given(
    st.lists(st.tuples(times, st.booleans()), min_size=1, max_size=8),
    st.integers(0, 7),
    st.one_of(st.none(), times),
)
def test_what_is_taken_back_was_never_there(shown: list[tuple[int, bool]], which: int, restart_ms: int | None) -> None:
    # Clicks come at once, so that no click is live without its impression.
    records = [shown_at(at_ms, clicked_ms=at_ms if clicked else None, arm="all") for at_ms, clicked in shown]
    gone = records[which % len(records)]
    now_ms = 11 * HOUR_MS
    counts = play(records, restart_ms, now_ms)
    expected = play([record for record in records if record is not gone], restart_ms, now_ms)
    if gone.clicked:
        counts.take_back_click(taken(gone), now_ms)
    counts.take_back_impression(taken(gone), now_ms)
    assert totals(counts) == totals(expected)
    for key, cell in expected.cells_of("p").items():
        found = counts.cells_of("p")[key]
        assert found.live_impressions == pytest.approx(cell.live_impressions, abs=1e-9)
        assert found.live_clicks == pytest.approx(cell.live_clicks, abs=1e-9)
    changes, others = ChangeSet(), ChangeSet()
    counts.write(changes)
    expected.write(others)
    empty = encode_record(ArmRecord(0, 0))
    assert [change for change in changes.of(Table.ARMS) if change[1] != empty] == others.of(Table.ARMS)


@pytest.mark.parametrize(
    ("due", "late", "left"),
    [
        # Labelled before the evidence begins, in it, and only after the live counts had begun anew.
        (4_999, False, (0.0, 0.0)),
        (5_000, False, (1.0, 1.0)),
        (7_999, False, (1.0, 1.0)),
        (8_000, False, (0.0, 0.0)),
        # A click after the label is not among the evidence.
        (6_000, True, (1.0, 0.0)),
    ],
)
def test_of_the_evidence_of_a_change_a_part_is_taken_back(due: int, late: bool, left: tuple[float, float]) -> None:
    counts = Counts(HOUR_MS)
    record = shown_at(due - LABEL_MS, clicked_ms=due - LABEL_MS)
    record.clicked_late, record.labelled = late, True
    others = [impression() for _ in range(9)]
    counts.count_impressions(others, 0)
    counts.count_clicks([(others[0], 0)], 0)
    counts.count_impressions([record], record.counted_ms)
    counts.count_clicks([(record, 0)], record.clicked_ms)
    counts.restart_live("p", {(0, "c"): (5, 3)}, 8_000, 5_000)
    counts.take_back_click(taken(record), 8_000)
    counts.take_back_impression(taken(record), 8_000)
    cell = counts.cells_of("p")[0, "c"]
    assert (cell.n_impressions, cell.n_clicks, cell.live_impressions, cell.live_clicks) == (
        9,
        1,
        5 - left[0],
        3 - left[1],
    )


def test_what_is_taken_back_comes_out_of_the_group_that_has_taken_over() -> None:
    counts = Counts(HOUR_MS)
    record = shown_at(0, clicked_ms=0, arm="all")
    counts.count_impressions([record, impression(group=1)], 0)
    counts.count_clicks([(record, 0)], 0)
    counts.hand_over("p", 0, 1, HOUR_MS)
    counts.take_back_click(taken(record, 1), HOUR_MS)
    counts.take_back_impression(taken(record, 1), HOUR_MS)
    assert counts.cells_of("p") == {(1, "c"): Cell(1, 0, 0.5, 0.0, HOUR_MS)}


def test_a_cell_of_which_nothing_is_left_is_no_more(tmp_path: Path) -> None:
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        counts, record = Counts(HOUR_MS), shown_at(0, arm="all")
        counts.count_impressions([record], 0)
        for take_back in (False, True):
            if take_back:
                counts.take_back_impression(taken(record), 0)
            changes = ChangeSet()
            counts.write(changes)
            store.commit(changes)
            with store.read() as txn:
                assert txn.count(Table.CELLS) == (not take_back)
                # An arm that was counted once is: how many there may be is limited.
                assert txn.count(Table.ARMS) == 1
        counts.count_impressions([record], 0)
        assert counts.cells_of("p") == {(0, "c"): Cell(1, 0, 1.0, 0.0, 0)}


def test_when_live_counts_began_anew_is_known_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        counts, record = Counts(HOUR_MS), shown_at(0)
        counts.count_impressions([record, impression()], 0)
        counts.restart_live("p", {(0, "c"): (1, 0)}, 5_000, 4_000)
        changes = ChangeSet()
        counts.write(changes)
        store.commit(changes)
        again = Counts(HOUR_MS)
        with store.read() as txn:
            again.bring_in("p", txn)
    again.take_back_impression(taken(record), 5_000)
    assert again.cells_of("p") == {(0, "c"): Cell(1, 0, 1.0, 0.0, 5_000)}
