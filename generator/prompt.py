"""Prompts: a caption and five slot words, written as text and read back.

A prompt of ours has one slot word each for scene, palette, light, prop and composition. Its text
reads like one written for Stable Diffusion, so the same text goes to any renderer, and
:meth:`Prompt.parse` is its exact inverse. Text that somebody else wrote (a language model, a person)
is searched for the slot words and their synonyms; what it does not name is chosen by a hash of it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Final

VOCABULARY: Final[dict[str, tuple[str, ...]]] = {
    "scene": (
        "misty mountains",
        "sunlit beach",
        "city street at night",
        "pine forest",
        "modern kitchen",
        "photo studio",
        "sports field",
        "desert dunes",
        "cosy living room",
        "flower meadow",
        "marble podium",
        "bokeh lights",
    ),
    "palette": ("warm", "cool", "pastel", "neon", "monochrome", "earthy", "jewel", "fresh"),
    "light": ("soft daylight", "golden hour", "studio spotlight", "dramatic side light", "dreamy backlight"),
    "prop": ("no props", "green plants", "glossy spheres", "gift boxes", "silk ribbons", "confetti"),
    "composition": ("centred", "left third", "right third", "close-up"),
}
"""The words of every slot. No word holds a comma, which is what makes the text's end unambiguous."""

SYNONYMS: Final[dict[str, dict[str, str]]] = {
    "scene": {
        "mountains": "misty mountains",
        "mountain": "misty mountains",
        "alpine": "misty mountains",
        "beach": "sunlit beach",
        "seaside": "sunlit beach",
        "ocean": "sunlit beach",
        "city": "city street at night",
        "urban": "city street at night",
        "street": "city street at night",
        "forest": "pine forest",
        "woods": "pine forest",
        "kitchen": "modern kitchen",
        "studio background": "photo studio",
        "studio backdrop": "photo studio",
        "seamless backdrop": "photo studio",
        "stadium": "sports field",
        "pitch": "sports field",
        "desert": "desert dunes",
        "dunes": "desert dunes",
        "living room": "cosy living room",
        "cozy living room": "cosy living room",
        "lounge": "cosy living room",
        "meadow": "flower meadow",
        "garden": "flower meadow",
        "wildflowers": "flower meadow",
        "podium": "marble podium",
        "pedestal": "marble podium",
        "marble": "marble podium",
        "bokeh": "bokeh lights",
        "fairy lights": "bokeh lights",
    },
    "palette": {
        "cold": "cool",
        "cyberpunk": "neon",
        "black and white": "monochrome",
        "greyscale": "monochrome",
        "grayscale": "monochrome",
        "earth tones": "earthy",
        "jewel tones": "jewel",
        "emerald": "jewel",
    },
    "light": {
        "daylight": "soft daylight",
        "soft light": "soft daylight",
        "natural light": "soft daylight",
        "sunset": "golden hour",
        "sunrise": "golden hour",
        "spotlight": "studio spotlight",
        "studio lighting": "studio spotlight",
        "side light": "dramatic side light",
        "dramatic lighting": "dramatic side light",
        "chiaroscuro": "dramatic side light",
        "backlight": "dreamy backlight",
        "backlit": "dreamy backlight",
        "dreamy": "dreamy backlight",
    },
    "prop": {
        "without props": "no props",
        "plants": "green plants",
        "leaves": "green plants",
        "foliage": "green plants",
        "spheres": "glossy spheres",
        "balls": "glossy spheres",
        "gifts": "gift boxes",
        "presents": "gift boxes",
        "ribbons": "silk ribbons",
        "ribbon": "silk ribbons",
        "streamers": "confetti",
    },
    "composition": {
        "centered": "centred",
        "symmetrical": "centred",
        "on the left": "left third",
        "on the right": "right third",
        "close up": "close-up",
        "macro": "close-up",
    },
}
"""Other ways to say a slot word, for text that is not ours; the earliest phrase wins, then the longer."""

MAX_CAPTION_CHARS: Final = 160
"""Longest caption, in characters: a Stable Diffusion prompt has 77 tokens, and the slots need about 30 of them."""

UNNAMED_CAPTION: Final = "the product"
"""Caption of a prompt whose product is not named, as of those that a G-MLLM writes: the title is put in afterwards."""

_KEPT_FORMAT_CHARS: Final = frozenset("\u200c\u200d")  # joiners that Persian, Indic scripts and emoji are spelled with
_PLACEHOLDER_MARKS: Final = str.maketrans({"<": "‹", ">": "›"})


class PromptNotUnderstood(ValueError):
    """A text that holds nothing to read: it is empty, or only spaces and control characters."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"prompt {text!r} holds no readable character; a prompt needs at least one word. Nothing was rendered."
        )
        self.text = text


class UnknownSlotWord(ValueError):
    """A slot word that is not in :data:`VOCABULARY`."""

    def __init__(self, slot: str, word: str) -> None:
        allowed = ", ".join(VOCABULARY[slot])
        super().__init__(f"{slot} {word!r} is not in the vocabulary; allowed: {allowed}. The prompt was not made.")
        self.slot = slot
        self.word = word


def sanitise_caption(caption: str) -> str:
    """Make a product's title safe to stand inside a prompt; applying it twice changes nothing more.

    Control and invisible characters go, white space becomes single spaces, ``<`` and ``>`` become ``‹`` and ``›``
    (a title can then hold no ``<image>`` or ``<group>`` placeholder of a language model), Unicode is
    composed (NFC), and the rest is cut at :data:`MAX_CAPTION_CHARS`, at a space where one is near.
    An empty caption becomes "the product".
    """
    text = " ".join(caption.split())
    text = "".join(c for c in text if c in _KEPT_FORMAT_CHARS or not unicodedata.category(c).startswith("C"))
    text = " ".join(unicodedata.normalize("NFC", text.translate(_PLACEHOLDER_MARKS)).split())
    if len(text) > MAX_CAPTION_CHARS:
        cut = text.rfind(" ", MAX_CAPTION_CHARS - 30, MAX_CAPTION_CHARS + 1)
        text = text[: cut if cut > 0 else MAX_CAPTION_CHARS].rstrip()
    return text or UNNAMED_CAPTION


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to draw behind a product: a caption and one word of :data:`VOCABULARY` for every slot.

    The caption is sanitised when the prompt is made, so ``Prompt.parse(prompt.text) == prompt`` always holds,
    whatever the caption holds: commas, quotes, or a whole prompt of ours.

    Raises
    ------
    UnknownSlotWord
        When a slot's word is not in the vocabulary.
    """

    caption: str
    scene: str
    palette: str
    light: str
    prop: str
    composition: str

    def __post_init__(self) -> None:
        """Sanitise the caption and check the slot words."""
        object.__setattr__(self, "caption", sanitise_caption(self.caption))
        for slot, word in self.slots().items():
            if word not in VOCABULARY[slot]:
                raise UnknownSlotWord(slot, word)

    def slots(self) -> dict[str, str]:
        """Return the slot words by slot, in the vocabulary's order."""
        return {
            "scene": self.scene,
            "palette": self.palette,
            "light": self.light,
            "prop": self.prop,
            "composition": self.composition,
        }

    def named(self, title: str) -> Prompt:
        """Return the prompt for a product of this title."""
        return replace(self, caption=title)

    @property
    def text(self) -> str:
        """The prompt as text, in the style of Stable Diffusion prompts."""
        return (
            f"{self.scene} background for {self.caption}, {self.palette} palette, {self.light}, "
            f"{self.prop}, {self.composition} composition"
        )

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """Read a prompt's text: our own exactly, anybody's as well as it can be read.

        In foreign text the caption is what follows "background for", else the whole text, and a slot
        is the first of its phrases found outside that caption. A slot that the text does not name depends on a
        hash of the text alone, so the same text gives the same prompt on every machine.

        Raises
        ------
        PromptNotUnderstood
            When the text holds no readable character.
        """
        own = _OWN_TEXT.fullmatch(text)
        if own is not None and is_well_formed(text):
            return cls(**own.groupdict())
        readable = sanitise_caption(text)
        if readable == UNNAMED_CAPTION and UNNAMED_CAPTION not in text:
            raise PromptNotUnderstood(text)
        return _parse_foreign(" ".join(text.split()))


def is_well_formed(text: str) -> bool:
    """Return whether a text is a prompt of ours, word for word, and not merely one that can be read as such."""
    own = _OWN_TEXT.fullmatch(text)
    return own is not None and sanitise_caption(own["caption"]) == own["caption"]


def _any_of(slot: str) -> str:
    return f"(?P<{slot}>{'|'.join(re.escape(word) for word in VOCABULARY[slot])})"


# The caption is greedy and the end is anchored, so the last four commas are always ours, never the caption's.
_OWN_TEXT: Final = re.compile(
    rf"{_any_of('scene')} background for (?P<caption>.+), {_any_of('palette')} palette, {_any_of('light')}, "
    rf"{_any_of('prop')}, {_any_of('composition')} composition",
    re.DOTALL,
)
_FOREIGN_CAPTION: Final = re.compile(
    r"\b(?:background|backdrop|advert|ad|photo|image) (?:for|of) ([^,.;]+)", re.IGNORECASE
)


def _phrases(slot: str) -> dict[str, str]:
    return {**SYNONYMS[slot], **{word: word for word in VOCABULARY[slot]}}


# Longest first, so that of two phrases at one place the longer is taken.
_PHRASES: Final[dict[str, dict[str, str]]] = {slot: _phrases(slot) for slot in VOCABULARY}
_PHRASE_PATTERNS: Final[dict[str, re.Pattern[str]]] = {
    slot: re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))})(?!\w)")
    for slot, phrases in _PHRASES.items()
}


def _parse_foreign(text: str) -> Prompt:
    caption_match = _FOREIGN_CAPTION.search(text)
    if caption_match is None:
        caption, searched = text, text
    else:
        caption = caption_match[1]
        searched = f"{text[: caption_match.start(1)]},{text[caption_match.end(1) :]}"
    searched = searched.casefold()
    words: dict[str, str] = {}
    for slot, allowed in VOCABULARY.items():
        found = _PHRASE_PATTERNS[slot].search(searched)
        if found is not None:
            words[slot] = _PHRASES[slot][found[0]]
        else:
            digest = hashlib.sha256(f"{slot}\0{text}".encode(errors="surrogatepass")).digest()
            words[slot] = allowed[int.from_bytes(digest[:8], "big") % len(allowed)]
    return Prompt(
        caption=caption,
        scene=words["scene"],
        palette=words["palette"],
        light=words["light"],
        prop=words["prop"],
        composition=words["composition"],
    )
