"""Known pictures: the creatives that a product has, read once each, to compare new ones with."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from PIL import Image, UnidentifiedImageError

from generator.likeness import ImageFeatures, LikenessIndex, Vector
from generator.storage import ImageTampered, ImageUnreadable
from state.records import CreativeRecord

log = logging.getLogger(__name__)

BAD_PICTURE: Final = (
    *(ImageUnreadable, ImageTampered, Image.DecompressionBombError, UnidentifiedImageError),
    *(ImportError, ValueError),
)
"""What reading somebody's picture may raise; ImportError and ValueError come from a URL of an unknown scheme."""

Read = Callable[[str], bytes]
"""Reads a creative's file by its URI, also one that is still to be written."""


class KnownPictures:
    """Reads creatives, and keeps the features of those that were compared last.

    Parameters
    ----------
    features
        Tells duplicates.
    n_kept
        Pictures whose features are kept.
    """

    def __init__(self, features: ImageFeatures, n_kept: int) -> None:
        self._features = features
        self._n_kept = n_kept
        self._kept: OrderedDict[tuple[str, str], Vector] = OrderedDict()  # by creative and URI, last used last

    def index(self, creatives: Iterable[CreativeRecord], read: Read) -> LikenessIndex:
        """Return the features of a product's creatives; those whose picture cannot be read are left out."""
        found = {}
        for creative in creatives:
            if creative.image_uri is None:
                continue
            try:
                found[creative.creative_id] = self._features_of(creative.creative_id, creative.image_uri, read)
            except BAD_PICTURE as error:
                log.warning("creative %s is not compared with new ones: %s", creative.creative_id, error)
        return LikenessIndex(self._features.dim, found)

    def _features_of(self, creative_id: str, image_uri: str, read: Read) -> Vector:
        features = self._kept.pop((creative_id, image_uri), None)
        if features is None:
            features = self._features.encode(read(image_uri), creative_id)
        self._kept[creative_id, image_uri] = features
        if len(self._kept) > self._n_kept:
            self._kept.popitem(last=False)
        return features


def open_known(creative: CreativeRecord, read: Read) -> Image.Image | None:
    """Return a creative's picture, RGB; None where it has none, or one that cannot be read."""
    if creative.image_uri is None:
        return None
    try:
        with Image.open(io.BytesIO(read(creative.image_uri))) as opened:
            return opened.convert("RGB")
    except (*BAD_PICTURE, OSError) as error:
        log.warning("creative %s is not compared with new ones: %s", creative.creative_id, error)
        return None
