"""Forms of the preference model, by their name in the settings."""

from __future__ import annotations

from collections.abc import Sequence

from online.gated import GatedModel
from online.model import PreferenceModel
from online.paper import PaperModel
from online.settings import ModelSettings


def preference_model(
    cardinalities: Sequence[int], title_dim: int, image_dim: int, settings: ModelSettings
) -> PreferenceModel:
    """Return a new model of the form that the settings name; see `PreferenceModel` for its parameters."""
    form = PaperModel if settings.form == "paper" else GatedModel
    return form(cardinalities, title_dim, image_dim, settings)
