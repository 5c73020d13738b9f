"""Report words: groups, numbers and times as people say them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from osmf.report_model import Estimate, Shift, Trait

MIN_LIFT = 1.1
"""A trait below this lift says nothing about a group."""

N_TRAITS = 3

_PLAIN = {
    ("gender", "female"): "women",
    ("gender", "f"): "women",
    ("gender", "male"): "men",
    ("gender", "m"): "men",
    ("marriage", "yes"): "married",
    ("marriage", "no"): "unmarried",
    ("is_vip", "yes"): "VIP members",
    ("is_vip", "no"): "no VIP members",
    ("has_car", "yes"): "car owners",
    ("has_car", "no"): "without a car",
    ("has_house", "yes"): "home owners",
    ("has_house", "no"): "without a house",
    ("is_impulse_purchase_user", "yes"): "impulse buyers",
    ("is_impulse_purchase_user", "no"): "no impulse buyers",
}
_TRUE_WORDS = {"1": "yes", "true": "yes", "y": "yes", "0": "no", "false": "no", "n": "no"}
_ATTRIBUTES = {
    "age": "age",
    "os_plant": "phone",
    "child_age": "child aged",
    "color": "likes",
    "resident_city_level": "city tier",
    "promotions_sensitive_level": "promotion sensitivity",
    "per_month_order_num": "orders a month",
    "user_active": "activity",
    "purchase_power": "purchase power",
    "customer_points": "points level",
    "member_level": "member level",
    "education": "education",
    "profession": "",
    "target_group": "",
    "marriage": "",
}
_REASONS = {
    "bad_json": "not JSON",
    "bad_arrow": "not an Arrow batch",
    "unknown_version": "unknown schema version",
    "missing_field": "a field is missing",
    "invalid_field": "a value outside its range",
    "unknown_product": "unknown product",
    "unknown_creative": "unknown creative",
    "unknown_impression": "click without its impression",
    "unreadable_image": "a picture that does not open",
}


@dataclass(frozen=True, slots=True)
class TraitWords:
    """One trait of a group in words, with its lift ("2.1×")."""

    text: str
    lift: str


@dataclass(frozen=True, slots=True)
class GroupWords:
    """Who is in a group: how strongly it holds ("mostly", "more often"), and the traits."""

    opening: str
    traits: tuple[TraitWords, ...]

    def __str__(self) -> str:
        if not self.traits:
            return self.opening
        return f"{self.opening} " + ", ".join(f"{trait.text} ({trait.lift})" for trait in self.traits)


def group_words(profile: Sequence[Trait]) -> GroupWords:
    """Return who is in a group: its up to three most telling traits, one per attribute.

    A trait tells more the more members have it and the rarer it is outside: they are ordered by
    share times log(lift). "mostly" needs the first trait in 60% of the members.
    """
    telling = sorted(
        (trait for trait in profile if trait.lift >= MIN_LIFT and trait.share > 0),
        key=lambda trait: (-trait.share * math.log(trait.lift), trait.attribute, trait.value),
    )
    chosen: list[Trait] = []
    for trait in telling:
        if len(chosen) < N_TRAITS and all(trait.attribute != other.attribute for other in chosen):
            chosen.append(trait)
    if not chosen:
        return GroupWords("close to the product's average user", ())
    opening = "mostly" if chosen[0].share >= 0.6 else "more often"
    return GroupWords(opening, tuple(TraitWords(trait_words(t.attribute, t.value), f"{t.lift:.1f}×") for t in chosen))


def trait_words(attribute: str, value: str) -> str:
    """Return an attribute's value in words: ("gender", "female") is "women"; unknown ones keep their names."""
    spoken = re.sub(r"(?<=\d)\s*-\s*(?=\d)", "–", value.replace("_", " ")).strip()
    key = (attribute, _TRUE_WORDS.get(value.lower(), value.lower()))
    plain = _PLAIN.get(key) or _PLAIN.get((attribute, value.lower()))
    if plain:
        return plain
    name = _ATTRIBUTES.get(attribute, attribute.replace("_", " "))
    # "tier 2" of "city tier" is "city tier 2", not "city tier tier 2".
    last = name.rsplit(" ", 1)[-1]
    if last and spoken.lower().startswith(f"{last} "):
        name = name.removesuffix(last).rstrip()
    return f"{name} {spoken}".strip()


def dead_letter_words(reason: str) -> str:
    """Return why an event was refused, in words."""
    return _REASONS.get(reason, reason.replace("_", " "))


def group_letter(index: int) -> str:
    """Return the letter of a product's n-th group: A to Z, then AA, AB and so on."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def percent(value: float) -> str:
    """Return a rate as a percentage with sensible digits: 12.3%, 3.21%, 0.047%."""
    points = 100 * value
    if points == 0 or abs(points) >= 10:
        return f"{points:.1f}%" if points else "0%"
    return f"{points:.2f}%" if abs(points) >= 0.1 else f"{points:.2g}%"


def percent_tick(value: float) -> str:
    """Return a round rate as a percentage without idle zeros: 4%, 3.5%."""
    return f"{100 * value:.4g}%"


def interval(estimate: Estimate) -> str:
    """Return the interval of a rate: "2.7–3.8%"."""
    low, high = percent(estimate.low), percent(estimate.high)
    return f"{low.removesuffix('%')}–{high}"


def change(ratio: float) -> str:
    """Return a ratio as a change: 1.18 is "+18%", 0.9 is "−10%"."""
    points = round(100 * (ratio - 1))
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points)}%"


def count(value: float) -> str:
    """Return a count with its thousands separated."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """Return a number in few characters: 950, 12.5k, 3.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a duration: 8.4 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def clock(seconds: float) -> str:
    """Return a moment of the run as m:ss, or h:mm:ss past the first hour."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def date_time(at_ms: int) -> str:
    """Return an event time in UTC, to the minute."""
    return f"{datetime.fromtimestamp(at_ms / 1000, tz=UTC):%-d %B %Y, %H:%M} UTC"


def shift_verdict(shift: Shift) -> str:
    """Return whether a shift is one that the simulator made."""
    if shift.is_true is None:
        return "not known"
    return "true" if shift.is_true else "false alarm"
