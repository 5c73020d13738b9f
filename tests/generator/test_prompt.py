"""The prompt's law: reading its own text gives it back, whatever the caption."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from generator.prompt import (
    MAX_CAPTION_CHARS,
    SYNONYMS,
    VOCABULARY,
    Prompt,
    PromptNotUnderstood,
    UnknownSlotWord,
    sanitise_caption,
)

SLOTS = st.fixed_dictionaries({slot: st.sampled_from(words) for slot, words in VOCABULARY.items()})
OWN = Prompt("oak chair", "pine forest", "warm", "golden hour", "no props", "centred")


@given(caption=st.text(max_size=400), slots=SLOTS)
@example(caption=OWN.text, slots=OWN.slots())
@example(caption=", neon palette, golden hour, confetti, close-up composition", slots=OWN.slots())
@example(caption='12" "quoted", comma\nnewline\x00 <image><group>', slots=OWN.slots())
@example(caption="e\u200b\u0301 \u202egnp.exe \ud800", slots=OWN.slots())
def test_parse_is_the_inverse_of_text(caption: str, slots: dict[str, str]) -> None:
    prompt = Prompt(caption=caption, **slots)
    assert Prompt.parse(prompt.text) == prompt


@given(st.text(max_size=500))
def test_sanitising_twice_changes_nothing(caption: str) -> None:
    once = sanitise_caption(caption)
    assert sanitise_caption(once) == once
    assert 1 <= len(once) <= MAX_CAPTION_CHARS
    assert not set("<>\n\r\t\x00") & set(once)


@given(st.text(min_size=1, max_size=300))
def test_any_text_is_read_the_same_way_twice_or_refused(text: str) -> None:
    try:
        prompt = Prompt.parse(text)
    except PromptNotUnderstood:
        return
    assert Prompt.parse(text) == prompt
    assert Prompt.parse(prompt.text) == prompt


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\x00\x01", "\u200b"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(PromptNotUnderstood, match="no readable character"):
        Prompt.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A SUNLIT BEACH in neon tones", {"scene": "sunlit beach", "palette": "neon"}),
        ("background for a beach towel, in a forest, backlit", {"scene": "pine forest", "light": "dreamy backlight"}),
        (
            "product on a marble podium with silk ribbons, close up",
            {"scene": "marble podium", "prop": "silk ribbons", "composition": "close-up"},
        ),
        ("city street at night, black and white", {"scene": "city street at night", "palette": "monochrome"}),
        ("warmth and coolness", {}),
    ],
)
def test_foreign_text_names_slots_by_phrase(text: str, expected: dict[str, str]) -> None:
    slots = Prompt.parse(text).slots()
    assert {slot: slots[slot] for slot in expected} == expected


def test_slots_that_foreign_text_does_not_name_differ_between_texts() -> None:
    scenes = {Prompt.parse(f"something nice, number {i}").scene for i in range(200)}
    assert scenes == set(VOCABULARY["scene"])


@pytest.mark.parametrize("slot", VOCABULARY)
def test_unknown_words_are_refused_by_slot(slot: str) -> None:
    with pytest.raises(UnknownSlotWord, match=slot):
        Prompt(**{"caption": "chair", **OWN.slots(), slot: "rainbow"})


def test_words_and_synonyms_fit_the_grammar() -> None:
    for slot, words in VOCABULARY.items():
        assert len(set(words)) == len(words)
        assert all(word == word.casefold() and "," not in word for word in words)
        assert set(SYNONYMS[slot].values()) <= set(words)
        assert not set(SYNONYMS[slot]) & set(words)
