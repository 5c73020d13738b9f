"""Teachers: who writes the prompts that pre-training imitates (section A.3; the paper's teacher is GPT-4o).

By default a grammar writes them from the group's profile and the product. Any endpoint that speaks OpenAI's protocol
can take its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import httpx
import numpy as np

from generator.prompt import UNNAMED_CAPTION, VOCABULARY, Prompt
from offline.endpoint import ask, chat_url
from offline.settings import TeacherSettings
from state.records import ProfileTrait


@dataclass(frozen=True, slots=True)
class Brief:
    """What a teacher is told: the product, and whom the prompt is for.

    ``typical`` are the group's most common attributes, ``distinctive`` those that set it apart.
    """

    product_id: str
    title: str
    category: str | None
    typical: Mapping[str, str]
    distinctive: Sequence[ProfileTrait] = ()


class TeacherFailed(RuntimeError):
    """The endpoint gave no prompt."""

    def __init__(self, url: str, trouble: str) -> None:
        super().__init__(
            f"the teacher at {url} wrote no prompt: {trouble}. Pre-training did not start; without "
            "offline.pretrain.teacher.url the built-in grammar writes the prompts."
        )


class PromptTeacher(Protocol):
    """Writes prompts for groups."""

    def write(self, brief: Brief, n_prompts: int) -> list[Prompt]:
        """Return prompts for a group, the same ones for the same brief; they do not name the product."""
        ...


_YOUNG: Final = ("under 18", "18-20", "21-24", "25-28")
_MIDDLE: Final = ("29-32", "33-36", "37-40", "41-45")
_OLDER: Final = ("46-50", "51-55", "56-60", "61-70", "over 70")
_WITH_CHILDREN: Final = ("expecting", "under 1", "1-2", "3-4", "5-6", "7-9", "10-12", "13-15", "16-18")

TASTES: Final[tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("gender", ("female",), ("pastel", "silk ribbons", "flower meadow", "dreamy backlight")),
    ("gender", ("male",), ("cool", "dramatic side light", "city street at night", "left third")),
    ("age", _YOUNG, ("neon", "city street at night", "bokeh lights", "confetti", "dramatic side light", "close-up")),
    ("age", _MIDDLE, ("warm", "cosy living room", "modern kitchen", "soft daylight", "right third")),
    ("age", _OLDER, ("earthy", "misty mountains", "pine forest", "golden hour", "green plants", "centred")),
    ("child_age", _WITH_CHILDREN, ("fresh", "sunlit beach", "gift boxes", "soft daylight")),
    ("purchase_power", ("1 (highest)", "2"), ("monochrome", "jewel", "marble podium", "studio spotlight", "no props")),
    ("purchase_power", ("4", "5 (lowest)"), ("warm", "fresh", "gift boxes", "centred")),
    ("promotions_sensitive_level", ("4", "5 (highest)"), ("confetti", "gift boxes", "close-up")),
    ("promotions_sensitive_level", ("1 (lowest)", "2"), ("no props", "photo studio")),
    ("target_group", ("student", "young urbanite"), ("neon", "city street at night", "glossy spheres")),
    ("target_group", ("young parents", "urban family"), ("pastel", "modern kitchen", "sunlit beach", "fresh")),
    ("target_group", ("small-town family", "village family"), ("warm", "earthy", "cosy living room", "green plants")),
    ("target_group", ("senior professional",), ("monochrome", "photo studio", "studio spotlight", "right third")),
    ("target_group", ("pensioner",), ("earthy", "flower meadow", "pine forest", "golden hour")),
    ("resident_city_level", ("tier 1", "tier 2"), ("cool", "city street at night", "glossy spheres")),
    ("resident_city_level", ("tier 4", "tier 5"), ("earthy", "misty mountains", "green plants", "desert dunes")),
    ("education", ("bachelor", "master or doctor"), ("monochrome", "marble podium", "left third")),
    ("is_impulse_purchase_user", ("yes",), ("neon", "jewel", "confetti", "bokeh lights")),
    ("color", ("pink", "purple"), ("pastel", "silk ribbons")),
    ("color", ("gold", "red", "orange"), ("jewel", "golden hour")),
    ("color", ("green", "turquoise"), ("fresh", "green plants")),
    ("color", ("black", "grey", "silver", "white"), ("monochrome", "glossy spheres")),
    ("color", ("brown", "beige", "yellow"), ("earthy", "desert dunes")),
)
"""Attribute, values, and the slot words that a copywriter would try on people with them."""

SETTINGS_OF_PRODUCTS: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (("seating", "lamp", "lamps", "chair", "sofa", "furniture", "couch"), ("cosy living room", "photo studio")),
    (("kitchen", "coffee", "pan", "cup", "cook"), ("modern kitchen", "marble podium")),
    (("electronics", "phone", "laptop", "camera", "headphones"), ("photo studio", "bokeh lights")),
    (("sports", "toys", "ball", "bike", "outdoor", "garden"), ("sports field", "flower meadow")),
    (("fashion", "bag", "boots", "beauty", "jewellery", "watch"), ("marble podium", "sunlit beach")),
)
"""Words of a title or category, and the scenes in which such products are usually shown."""


class GrammarTeacher:
    """Draws slot words by how well they suit the group and the product.

    Parameters
    ----------
    temperature
        Of the draws. The prompts of a group differ, so that the model learns a distribution and not one answer.
    seed
        Seed of the draws.
    """

    def __init__(self, *, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._seed = seed

    def write(self, brief: Brief, n_prompts: int) -> list[Prompt]:
        """Return prompts whose words are drawn by their suitability."""
        suits = suitability(brief)
        rng = np.random.default_rng(list(_digest(brief, self._seed)))
        prompts = []
        for _ in range(n_prompts):
            words = {}
            for slot, allowed in VOCABULARY.items():
                logits = np.array([suits.get(word, 0.0) for word in allowed]) / self._temperature
                chances = np.exp(logits - logits.max())
                words[slot] = allowed[int(rng.choice(len(allowed), p=chances / chances.sum()))]
            prompts.append(Prompt(caption=UNNAMED_CAPTION, **words))
        return prompts


def suitability(brief: Brief) -> dict[str, float]:
    """Return how well each slot word suits a brief; words that nothing speaks for are left out.

    A most common value speaks for its words by 1, one that sets the group apart by its lift besides, up to 3.
    """
    strength = dict.fromkeys(brief.typical.items(), 1.0)
    for trait in brief.distinctive:
        key = trait.attribute, trait.value
        strength[key] = strength.get(key, 0.0) + min(trait.lift, 3.0)
    suits: dict[str, float] = {}
    for name, values, words in TASTES:
        for value in values:
            for word in words:
                suits[word] = suits.get(word, 0.0) + strength.get((name, value), 0.0)
    spoken = set(f"{brief.title} {brief.category or ''}".casefold().split())
    for keys, scenes in SETTINGS_OF_PRODUCTS:
        for scene in scenes if spoken & set(keys) else ():
            suits[scene] = suits.get(scene, 0.0) + 2.0
    return {word: value for word, value in suits.items() if value > 0}


def _digest(brief: Brief, seed: int) -> bytes:
    told = [brief.product_id, brief.title, *sorted(map(":".join, brief.typical.items()))]
    told += [f"{trait.attribute}:{trait.value}" for trait in brief.distinctive]
    return hashlib.sha256("\0".join([str(seed), *told]).encode()).digest()[:16]


class EndpointTeacher:
    """Any chat model behind OpenAI's protocol.

    What it writes is read by `Prompt.parse`, so a slot that it does not name is filled in, and the prompt that is
    learnt is always well formed.

    Parameters
    ----------
    settings
        Where it is, and which model.
    client
        Makes the requests.
    """

    def __init__(self, settings: TeacherSettings, client: httpx.Client) -> None:
        self._settings = settings
        self._client = client

    def write(self, brief: Brief, n_prompts: int) -> list[Prompt]:
        """Ask for the prompts one by one, each with its own seed.

        Raises
        ------
        TeacherFailed
            If the endpoint cannot be reached, refuses, or answers something else.
        """
        return [self._ask(brief, number) for number in range(n_prompts)]

    def _ask(self, brief: Brief, number: int) -> Prompt:
        body = {
            "messages": [{"role": "user", "content": question(brief)}],
            "temperature": self._settings.temperature,
            "max_tokens": 200,
            "seed": number,
        }
        try:
            choice = ask(self._client, self._settings, body)
            written = Prompt.parse(choice["message"]["content"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise TeacherFailed(chat_url(self._settings), f"{type(error).__name__}: {error}") from error
        return written.named(UNNAMED_CAPTION)


def question(brief: Brief) -> str:
    """Return what a chat model is asked."""
    lines = [f"{slot}: {', '.join(words)}" for slot, words in VOCABULARY.items()]
    apart = ", ".join(f"{trait.attribute} {trait.value}" for trait in brief.distinctive) or "nothing in particular"
    typical = ", ".join(f"{name} {value}" for name, value in brief.typical.items())
    example = Prompt(UNNAMED_CAPTION, *(words[0] for words in VOCABULARY.values())).text
    return (
        f"Write one Stable Diffusion prompt for the background of an ad for {brief.title!r} "
        f"(category: {brief.category or 'none'}). It should appeal to shoppers like these: {typical}. "
        f"What sets them apart from other shoppers of the product: {apart}.\n"
        "Choose one word or phrase from each line:\n" + "\n".join(lines) + "\n"
        f"Answer with the prompt alone, in this form: {example}"
    )
