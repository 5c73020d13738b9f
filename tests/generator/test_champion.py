from __future__ import annotations

from pathlib import Path

import pytest

from generator.champion import Champion, ChampionPointer, ChampionUnreadable, NoFormerChampion


def champion(number: int) -> Champion:
    return Champion(
        mllm=f"mllm/v{number:06}",
        grm=f"grm/v{number:06}",
        grm_accuracy=0.75,
        n_grm_pairs=100,
        promoted_at_ms=number,
        reason="better",
    )


def test_the_last_promoted_is_in_use_and_can_be_rolled_back(tmp_path: Path) -> None:
    pointer = ChampionPointer(tmp_path / "models")
    assert pointer.read() is None
    for number in (1, 2, 3):
        pointer.move(champion(number))
        assert pointer.read() == champion(number)
    assert pointer.roll_back() == champion(2)
    assert pointer.champions() == [champion(1), champion(2)]
    assert [path.name for path in pointer.path.parent.iterdir()] == ["champion.json"]


def test_before_the_first_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    pointer = ChampionPointer(tmp_path)
    with pytest.raises(NoFormerChampion, match="names no champion"):
        pointer.roll_back()
    pointer.move(champion(1))
    with pytest.raises(NoFormerChampion, match="its first champion"):
        pointer.roll_back()
    assert pointer.read() == champion(1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "truncated"),
        ('{"version": 1, "champions": [{"mllm": "m"}]}', "missing required field `grm`"),
        ('{"version": 1, "champions": [], "more": 1}', "unknown field"),
        ('{"version": 2, "champions": []}', "its version is 2, known is 1"),
    ],
)
def test_a_damaged_or_unknown_pointer_is_refused_and_kept(tmp_path: Path, content: str, why: str) -> None:
    pointer = ChampionPointer(tmp_path)
    pointer.path.write_text(content)
    for ask in (pointer.read, pointer.roll_back, lambda: pointer.move(champion(1))):
        with pytest.raises(ChampionUnreadable, match=why):
            ask()
    assert pointer.path.read_text() == content
