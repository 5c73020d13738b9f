"""The ledger: entries are found by user and impression, go when their time is over, and nothing else changes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from online.ledger import Index, Ledger
from online.mismatch import LedgerKeyError
from online.settings import LedgerSettings
from state.records import ClickEntry, ImpressionRecord, RetractionEntry, encode_record
from state.store import ChangeSet, Store, Table

HOUR_MS = 3_600_000
SETTINGS = LedgerSettings(retention_s=3_600, max_entries=1_000, hash_key=SecretStr("a key"))


def shown(creative: str = "c", at_ms: int = 0) -> bytes:
    return encode_record(ImpressionRecord("p", creative, b"\1\2", 3, at_ms, 0, None, None, False, False))


class Kept:
    """A ledger over a store, restarted after each commit."""

    def __init__(self, store: Store, settings: LedgerSettings = SETTINGS) -> None:
        self.store = store
        self.settings = settings
        self.ledger = self.restarted()

    def restarted(self) -> Ledger:
        ledger = Ledger(self.settings)
        with self.store.read() as txn:
            ledger.restore(txn)
        return ledger

    def add(
        self,
        impressions: list[tuple[str, str]] | None = None,
        clicks: list[tuple[str, ClickEntry]] | None = None,
        retractions: list[tuple[str, RetractionEntry]] | None = None,
        now_ms: int = 0,
    ) -> None:
        entries = [(user, name, shown(at_ms=now_ms)) for user, name in impressions or []]
        self.ledger.append(entries, clicks or [], retractions or [], {"t": {0: now_ms}}, now_ms)
        self.ledger.expire(now_ms)
        self.commit()

    def commit(self) -> None:
        changes = ChangeSet()
        self.ledger.write(changes)
        self.store.commit(changes)
        restarted = self.restarted()
        assert restarted.numbers == self.ledger.numbers
        self.ledger = restarted

    def of(self, *users: str) -> list[str]:
        with self.store.read() as txn:
            lives = self.ledger.lives(txn, {self.ledger.user_hash(user) for user in users}, ())
        return [life.impression_id for life in lives]

    def impression(self, name: str) -> ImpressionRecord | None:
        with self.store.read() as txn:
            lives = self.ledger.lives(txn, (), {name})
        return lives[-1].record if lives else None

    def erase(self, *users: str) -> None:
        with self.store.read() as txn:
            lives = self.ledger.lives(txn, {self.ledger.user_hash(user) for user in users}, ())
            self.ledger.erase(lives, txn)
        self.commit()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        yield Kept(store)


def test_impressions_are_found_by_user_and_by_id_with_what_became_of_them(kept: Kept) -> None:
    kept.add([("u", "1"), ("v", "2"), ("u", "3")])
    kept.add([("w", "4")], [("1", ClickEntry(7, True)), ("2", ClickEntry(8, False))], now_ms=8)
    kept.add([], [], [("1", RetractionEntry(True))], now_ms=9)
    assert kept.of("u") == ["1", "3"]
    assert kept.of("w", "v") == ["2", "4"]
    assert kept.of("x") == []
    one, two, three = (kept.impression(name) for name in "123")
    assert one is not None
    assert (one.clicked, one.clicked_ms, one.clicked_late, one.retracted, one.retracted_late) == (
        True,
        7,
        True,
        True,
        True,
    )
    assert two is not None
    assert (two.clicked, two.clicked_ms, two.clicked_late, two.retracted) == (True, 8, False, False)
    assert three is not None
    assert not three.clicked
    assert kept.impression("5") is None


def test_an_id_that_is_used_again_is_another_impression(kept: Kept) -> None:
    kept.add([("u", "1")])
    kept.add([], [("1", ClickEntry(1, False))], now_ms=1)
    kept.add([("v", "1")], now_ms=2)
    kept.add([], [("1", ClickEntry(3, True))], now_ms=3)
    with kept.store.read() as txn:
        first, second = kept.ledger.lives(txn, (), {"1"})
        assert [first.record.clicked_ms, second.record.clicked_ms] == [1, 3]
        (of_user,) = kept.ledger.lives(txn, {kept.ledger.user_hash("u")}, ())
    assert of_user.places == first.places
    kept.erase("u")
    assert kept.of("v") == ["1"]
    found = kept.impression("1")
    assert found is not None
    assert found.clicked_ms == 3


def test_erasing_leaves_the_others_and_no_trace(kept: Kept) -> None:
    for start in range(0, 600, 100):  # several blocks
        kept.add([(f"u{number % 7}", f"i{number:03d}") for number in range(start, start + 100)], now_ms=start)
        kept.add([], [(f"i{start:03d}", ClickEntry(start, True))], now_ms=start)
    expected = {f"u{user}": kept.of(f"u{user}") for user in range(7) if user != 3}
    gone = kept.of("u3")
    n_before = kept.ledger.numbers.n_entries
    kept.erase("u3")
    assert {user: kept.of(user) for user in expected} == expected
    assert kept.of("u3") == []
    with kept.store.read() as txn:
        content = b"\n".join(value for table in (Table.LEDGER, Table.LEDGER_INDEX) for _, value in txn.scan(table))
    assert not any(name.encode() in content for name in gone)
    assert kept.ledger.user_hash("u3").to_bytes(8, "little") not in content
    numbers = kept.ledger.numbers
    assert (
        numbers.n_forgotten
        == n_before - numbers.n_entries
        == len(gone) + sum(int(name[1:]) % 100 == 0 for name in gone)
    )


def test_entries_leave_by_blocks_when_they_are_too_old(kept: Kept) -> None:
    kept.add([("u", f"a{number}") for number in range(200)])  # fills a block
    kept.add([("u", f"b{number}") for number in range(200)], now_ms=HOUR_MS)
    assert len(kept.of("u")) == 400
    kept.add(now_ms=HOUR_MS + 1)
    assert kept.of("u") == [f"b{number}" for number in range(200)]
    assert (kept.ledger.numbers.n_entries, kept.ledger.numbers.n_expired, kept.ledger.numbers.n_dropped) == (
        200,
        200,
        0,
    )
    with kept.store.read() as txn:
        assert txn.count(Table.LEDGER) == txn.count(Table.LEDGER_INDEX) == 1
        assert kept.ledger.starts(txn) == {"t": {0: HOUR_MS}}


def test_beyond_the_ceiling_the_oldest_are_dropped_and_counted(kept: Kept) -> None:
    for number in range(12):
        kept.add([("u", f"{number}-{each}") for each in range(125)])
    numbers = kept.ledger.numbers
    assert numbers.n_entries == 1_000
    assert (numbers.n_expired, numbers.n_dropped) == (0, 500)
    assert kept.of("u")[0] == "4-0"


def test_small_commits_share_a_block(kept: Kept) -> None:
    for number in range(30):
        kept.add([("u", str(number))], now_ms=number)
    with kept.store.read() as txn:
        assert txn.count(Table.LEDGER) == 1
        assert kept.ledger.starts(txn) == {"t": {0: 0}}
    assert len(kept.of("u")) == 30


def test_a_ledger_that_is_off_keeps_nothing_and_lets_go_of_what_there_is(kept: Kept) -> None:
    kept.add([("u", "1")])
    kept.settings = SETTINGS.model_copy(update={"retention_s": 0, "hash_key": SecretStr("another")})
    kept.ledger = kept.restarted()
    assert not kept.ledger.is_on
    kept.add([("u", "2")])
    assert kept.of("u") == []
    assert (kept.ledger.numbers.n_entries, kept.ledger.numbers.n_expired) == (0, 1)


def test_another_key_is_refused_while_there_are_entries(kept: Kept) -> None:
    kept.add([("u", "1")])
    kept.settings = SETTINGS.model_copy(update={"hash_key": SecretStr("another")})
    with pytest.raises(LedgerKeyError, match=r"another online\.ledger\.hash_key"):
        kept.restarted()


def test_the_hash_depends_on_the_key() -> None:
    other = Ledger(LedgerSettings(hash_key=SecretStr("another")))
    assert Ledger(SETTINGS).user_hash("u") == Ledger(SETTINGS).user_hash("u") != other.user_hash("u")


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5), st.integers(0, 2**53))
def test_an_index_is_what_was_packed(users: list[int], newest_ms: int) -> None:
    index = Index(newest_ms, np.array(users, np.uint64), np.arange(len(users), dtype=np.uint32))
    again = Index.unpack(index.pack())
    assert (again.newest_ms, again.users.tolist(), again.crcs.tolist()) == (newest_ms, users, list(range(len(users))))
