"""The instruction pool of the four pre-training tasks (section A.3): the wordings of Table 5, in our own words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from generator.prompt import sanitise_caption
from streams.attributes import TABLE_4

USERS_SLOT: Final = "<users>"
"""Where an instruction speaks of the group. The group token itself stands first in the sequence (Eq. 7)."""

IMAGE_SLOT: Final = "<image>"
"""Marks an instruction that comes with the product's picture, which stands before the text."""

TITLE_SLOT: Final = "{title}"

ATTRIBUTE_LIST: Final = ", ".join(TABLE_4)


class Task(StrEnum):
    """What an instruction asks for."""

    GROUP_ANALYSIS = "group analysis"
    BEHAVIOURAL_PREDICTION = "behavioural prediction"
    PRODUCT_COMPREHENSION = "product comprehension"
    PROMPT_GENERATION = "prompt generation"


class TitleMissing(ValueError):
    """An instruction that speaks of a product by its title was filled without one."""

    def __init__(self, text: str) -> None:
        super().__init__(f"the instruction {text!r} has a slot {TITLE_SLOT}, and no title was given. It was not made.")


@dataclass(frozen=True, slots=True)
class Template:
    """One wording of a task, with its slots."""

    task: Task
    text: str

    @property
    def has_users(self) -> bool:
        """Whether the instruction speaks of a group, so that a group token belongs in front of it."""
        return USERS_SLOT in self.text

    @property
    def has_title(self) -> bool:
        """Whether the instruction speaks of a product by its title."""
        return TITLE_SLOT in self.text

    @property
    def has_image(self) -> bool:
        """Whether the instruction comes with a picture."""
        return IMAGE_SLOT in self.text

    def fill(self, *, title: str | None = None, group: bool = True) -> str:
        """Return the instruction's words.

        Parameters
        ----------
        title
            The product's title; it is sanitised, so that it can hold no placeholder.
        group
            Whether a group token stands in front; without one the instruction speaks of all shoppers.

        Raises
        ------
        TitleMissing
            If the wording has a slot for the title and there is none.
        """
        if self.has_title and title is None:
            raise TitleMissing(self.text)
        words = self.text.replace(IMAGE_SLOT, "").strip()
        words = words.replace(USERS_SLOT, "this group of shoppers" if group else "all shoppers")
        return words.replace(TITLE_SLOT, sanitise_caption(title)) if title is not None else words


def _pool(task: Task, *texts: str) -> tuple[Template, ...]:
    return tuple(Template(task, text) for text in texts)


INSTRUCTIONS: Final[dict[Task, tuple[Template, ...]]] = {
    Task.GROUP_ANALYSIS: _pool(
        Task.GROUP_ANALYSIS,
        "Say who most of <users> are, as an online shop would describe them.",
        f"Name the value that is most frequent among <users> for each of these attributes: {ATTRIBUTE_LIST}.",
        "Picture a typical member of <users>. What is that person like? "
        f"Go through the following attributes: {ATTRIBUTE_LIST}.",
        "You study the customers of online shops. Write a portrait of <users> that a shop can work with.",
    ),
    Task.BEHAVIOURAL_PREDICTION: _pool(
        Task.BEHAVIOURAL_PREDICTION,
        "So far <users> have clicked the item called {title}. What is the next shopper who clicks it like? "
        f"Answer with these attributes only: {ATTRIBUTE_LIST}.",
        "Who, after <users>, will be drawn to the item called {title}? Describe that shopper.",
        "Several of <users> have clicked one and the same item, {title}. Foretell who else it will interest.",
        "Here is who clicked {title} before: <users>. "
        "From these past clicks, work out the traits of one more shopper who likes it.",
    ),
    Task.PRODUCT_COMPREHENSION: _pool(
        Task.PRODUCT_COMPREHENSION,
        "<image> Which words describe the product in this picture best?",
        "<image> Put the gist of the pictured product into one caption.",
        "<image> Write a caption of the product shown here that is short and still says what it is.",
        "<image> Give the product picture a caption that sums up what the product is like.",
    ),
    Task.PROMPT_GENERATION: _pool(
        Task.PROMPT_GENERATION,
        "<image> Write a brief Stable Diffusion prompt for an attractive advertising background, inspired by the "
        "product's picture and its caption {title}. It has to appeal to <users>.",
        "<image> Starting from the caption {title} and from what the product looks like, make a short Stable Diffusion "
        "prompt for an advertising background that brings out its appeal. Keep in mind what <users> are like.",
        "<image> Let the caption {title} and the picture of the product guide you to a compact Stable Diffusion prompt "
        "for the background of an ad. The audience is <users>.",
        "<image> Condense what the caption {title} and the picture say into one text-to-image prompt for an ad "
        "background that sets off the product. Choose what suits <users> best.",
    ),
}
"""Four wordings of each task."""
