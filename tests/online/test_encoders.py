"""The encoders' inputs: pictures of any kind, damaged ones too, and features that tell things apart."""

from __future__ import annotations

import random
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from online.encoders import (
    HASHED_DIM,
    IMAGE_PX,
    IMAGE_TOKENS,
    TAPPED_BLOCKS,
    TITLE_TOKENS,
    EfficientNetEncoder,
    HashedImageEncoder,
    HashedTextEncoder,
    MiniLmEncoder,
    UnreadableImageError,
    feature_dims,
    likeness_encoder,
    load_encoders,
    read_pixels,
)
from online.settings import EncoderSettings, GroupSettings, ModelSettings, OnlineSettings


def picture(file_format: str, mode: str, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 30, 3)).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(noise).convert(mode).save(out, file_format)
    return out.getvalue()


FORMATS = [
    ("PNG", "RGB"),
    ("PNG", "P"),
    ("PNG", "LA"),
    ("PNG", "1"),
    ("JPEG", "RGB"),
    ("JPEG", "CMYK"),
    ("GIF", "P"),
    ("WEBP", "RGBA"),
    ("BMP", "RGB"),
]


@pytest.mark.parametrize(("file_format", "mode"), FORMATS)
def test_pictures_of_every_kind_are_read(file_format: str, mode: str) -> None:
    pixels = read_pixels(picture(file_format, mode), "c")
    assert pixels.shape == (IMAGE_PX, IMAGE_PX, 3)
    assert pixels.dtype == np.float32
    assert 0 <= pixels.min() < pixels.max() <= 255


def short_chunk(png: bytes) -> bytes:
    """Say that the picture's data is 16 bytes long: what follows is then read as a chunk of its own."""
    at = png.index(b"IDAT") - 4
    return png[:at] + b"\x00\x00\x00\x10" + png[at + 4 :]


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\n",
        picture("PNG", "RGB")[:200],
        pytest.param(short_chunk(picture("PNG", "RGB")), id="Pillow raises SyntaxError"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(image: bytes) -> None:
    with pytest.raises(UnreadableImageError, match="image 'c7' could not be read"):
        read_pixels(image, "c7")


@pytest.mark.filterwarnings("ignore")  # Pillow also warns of what is odd in damaged pictures
def test_damaged_pictures_are_read_or_refused() -> None:
    rng = random.Random(0)
    good = [picture(*kind) for kind in FORMATS]
    outcomes = {"read": 0, "refused": 0}
    for n in range(1_800):
        damaged = bytearray(good[n % len(good)])
        if n % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(60 if n % 3 == 1 else len(damaged))] = rng.randrange(256)
        try:
            read_pixels(bytes(damaged), "c")
            outcomes["read"] += 1
        except UnreadableImageError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 300, outcomes


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_hashed_titles_with_words_in_common_are_near_each_other() -> None:
    encode = HashedTextEncoder().encode
    chair, other_chair, lamp = encode("Red oak chair"), encode("blue oak chair"), encode("steel lamp")
    assert np.linalg.norm(chair) == pytest.approx(1, abs=1e-5)
    assert cosine(chair, other_chair) > 0.5 > 0.3 > abs(cosine(chair, lamp))
    assert (encode("red  OAK chair") == chair).all()
    assert np.isfinite(encode("   ")).all()


def test_hashed_images_are_told_apart_by_their_bytes_or_by_their_id() -> None:
    encode = HashedImageEncoder().encode
    assert (encode(b"a", "x") == encode(b"a", "y")).all()
    assert not np.allclose(encode(b"a", "x"), encode(b"b", "x"))
    assert (encode(None, "x") == encode(None, "x")).all()
    assert not np.allclose(encode(None, "x"), encode(None, "y"))


def test_the_widths_are_known_before_an_encoder_is_loaded() -> None:
    assert feature_dims(OnlineSettings()) == (384, 1024)
    hashed = OnlineSettings(encoders=EncoderSettings(text="hashed", image="hashed"))
    text, image = load_encoders(hashed)
    assert (text.dim, image.dim) == feature_dims(hashed) == (HASHED_DIM, HASHED_DIM)
    assert text.encode("a").shape == image.encode(None, "a").shape == (HASHED_DIM,)


def test_all_tokens_are_kept_for_the_model_that_attends_to_them() -> None:
    paper = OnlineSettings(
        encoders=EncoderSettings(text="hashed", image="hashed"),
        model=ModelSettings(form="paper"),
        groups=GroupSettings(space="embedding"),
    )
    text, image = load_encoders(paper)
    assert (text.dim, image.dim) == feature_dims(paper) == (TITLE_TOKENS * HASHED_DIM, IMAGE_TOKENS * HASHED_DIM)
    title = text.encode("oak chair").reshape(TITLE_TOKENS, HASHED_DIM)
    assert (title[:2] != 0).all()
    assert (title[2:] == 0).all()
    assert len(text.encode(" ".join(["word"] * 99))) == text.dim
    patches = image.encode(None, "c").reshape(IMAGE_TOKENS, HASHED_DIM)
    assert len(np.unique(patches.round(6), axis=0)) == IMAGE_TOKENS


def test_the_mean_of_a_titles_tokens_is_what_the_pooled_encoder_gives() -> None:
    short, tokens = MiniLmEncoder(), MiniLmEncoder(tokens=True)
    states = tokens.encode("red shoes").reshape(TITLE_TOKENS, -1)
    mean = states[(states != 0).any(axis=1)].mean(axis=0)
    assert mean / np.linalg.norm(mean) == pytest.approx(short.encode("red shoes"), abs=1e-5)


def test_style_is_what_early_blocks_see_in_the_upper_and_in_the_lower_half() -> None:
    style, grid = EfficientNetEncoder(), EfficientNetEncoder(tokens=True)
    seen: list[torch.Tensor] = []
    for block in TAPPED_BLOCKS:
        grid._model._blocks[block].register_forward_hook(lambda *call: seen.append(call[2][0]))
    shown = photograph()
    grid.encode(shown, "c")
    expected = []
    for channels in seen:  # (C, H, W)
        height = channels.shape[1] // 2
        for half in (channels[:, :height], channels[:, height:]):
            expected += [half.mean(dim=(1, 2)), half.std(dim=(1, 2))]
    assert style.encode(shown, "c") == pytest.approx(torch.cat(expected).numpy(), rel=1e-4, abs=1e-4)


def photograph() -> bytes:
    """Return a picture whose halves differ, as a PNG file."""
    rng = np.random.default_rng(0)
    pixels = np.concatenate([rng.integers(0, 256, (112, 224, 3)), np.full((112, 224, 3), 90)]).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_picture_and_its_mirror_image_have_about_one_style_and_another_light_has_another() -> None:
    encoder = EfficientNetEncoder()
    with Image.open(BytesIO(photograph())) as opened:
        styles = {
            name: encoder.encode(as_png(changed), name)
            for name, changed in {
                "as it is": opened,
                "mirrored": opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                "darker": opened.point(lambda level: level // 2),
                "upside down": opened.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
            }.items()
        }
    distance = {name: float(np.linalg.norm(style - styles["as it is"])) for name, style in styles.items()}
    assert distance["mirrored"] < distance["darker"] / 3
    assert distance["mirrored"] < distance["upside down"] / 3


def as_png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_likeness_is_told_by_places_where_there_are_pictures() -> None:
    assert likeness_encoder(OnlineSettings()).dim == IMAGE_TOKENS * 1280
    hashed = OnlineSettings(encoders={"image": "hashed"})
    assert likeness_encoder(hashed).dim == HASHED_DIM
