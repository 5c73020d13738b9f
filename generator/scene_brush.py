"""Brushes: the few vectorised operations that every scene is painted with.

A canvas is float32 RGB, shape (H, W, 3), 0 to 1, changed in place. Positions and lengths are
shares of the canvas's side unless named ``_px``, so that a scene looks the same at every size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from generator.palette import Floats

_BICUBIC = Image.Resampling.BICUBIC
_BOX = Image.Resampling.BOX


def grid(height: int, width: int) -> tuple[Floats, Floats]:
    """Return y of shape (H, 1) and x of shape (1, W), at pixel centres, from 0 to 1."""
    y: Floats = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height)
    x: Floats = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width)
    return y[:, None], x[None, :]


def smoothstep(low: float, high: float, value: Floats) -> Floats:
    """Return 0 below ``low``, 1 above ``high``, and a smooth step between (``low`` may be above ``high``)."""
    part = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    step: Floats = part * part * (3 - 2 * part)
    return step


def resize(field: Floats, height: int, width: int) -> Floats:
    """Scale a field (H, W) or a canvas (H, W, 3) smoothly (bicubic) to another size."""
    if field.ndim == 2:
        return np.asarray(Image.fromarray(field).resize((width, height), _BICUBIC))
    return np.stack([resize(np.ascontiguousarray(field[..., c]), height, width) for c in range(field.shape[2])], axis=2)


def blur(field: Floats, sigma_px: float) -> Floats:
    """Blur a field (H, W) or a canvas (H, W, 3), about as a Gaussian of ``sigma_px`` does.

    Wide blurs are computed on a shrunk copy: what they would lose there is what they remove.
    """
    if field.ndim == 3:
        return np.stack([blur(np.ascontiguousarray(field[..., c]), sigma_px) for c in range(field.shape[2])], axis=2)
    if sigma_px < 0.3:
        return field
    height, width = field.shape
    factor = max(1, int(sigma_px / 1.6))
    small = (max(4, -(-height // factor)), max(4, -(-width // factor)))
    out: Floats = field
    if factor > 1:
        out = np.asarray(Image.fromarray(field).resize((small[1], small[0]), _BOX))
    left_over = (sigma_px / factor) ** 2 - (0.35 if factor > 1 else 0.0)
    for _ in range(max(1, round(left_over / 0.5))):  # a binomial pass has variance 1/2
        padded: Floats = np.pad(out, 1, mode="edge")
        rows: Floats = (padded[:-2] + padded[2:]) * np.float32(0.25) + padded[1:-1] * np.float32(0.5)
        out = (rows[:, :-2] + rows[:, 2:]) * np.float32(0.25) + rows[:, 1:-1] * np.float32(0.5)
    return resize(out, height, width) if factor > 1 else out


def noise(
    rng: np.random.Generator, height: int, width: int, cells_y: float, cells_x: float, octaves: int = 3
) -> Floats:
    """Return fractal value noise, shape (H, W), about 0 to 1 with mean 0.5; the first octave has the given cells."""
    total = np.zeros((height, width), dtype=np.float32)
    weight, weights = 1.0, 0.0
    for octave in range(octaves):
        rows = min(height, int(cells_y * 2**octave) + 2)
        columns = min(width, int(cells_x * 2**octave) + 2)
        total += resize(rng.random((rows, columns), dtype=np.float32), height, width) * np.float32(weight)
        weights += weight
        weight *= 0.5
    total /= np.float32(weights)
    return total


def line(rng: np.random.Generator, width: int, cells: float, octaves: int = 4, rough: float = 0.5) -> Floats:
    """Return a fractal line, shape (W,), about -1 to 1: the outline of hills, dunes or tree tops."""
    total = np.zeros(width, dtype=np.float32)
    weight = 1.0
    for octave in range(octaves):
        knots = int(cells * 2**octave) + 3
        values = rng.uniform(-1, 1, knots).astype(np.float32)
        place = np.linspace(0, knots - 1.001, width, dtype=np.float32)
        low = place.astype(np.int64)
        part = smoothstep(0, 1, place - low)
        total += (values[low] * (1 - part) + values[low + 1] * part) * np.float32(weight)
        weight *= rough
    return total


def gradient(height: int, width: int, stops: list[tuple[float, Floats]]) -> Floats:
    """Return a canvas (H, W, 3) that runs from top to bottom through colours at given heights."""
    y = (np.arange(height) + 0.5) / height
    places = [place for place, _ in stops]
    columns = [np.interp(y, places, [float(colour[c]) for _, colour in stops]) for c in range(3)]
    column = np.stack(columns, axis=1).astype(np.float32)  # (H, 3)
    return np.ascontiguousarray(np.broadcast_to(column[:, None], (height, width, 3)))


def over(canvas: Floats, colour: Floats, alpha: Floats) -> None:
    """Lay a colour, (3,) or (H, W, 3), over the canvas with an opacity (H, W)."""
    canvas += (colour - canvas) * alpha[..., None]


def screen(canvas: Floats, colour: Floats, amount: Floats) -> None:
    """Add light of a colour (3,) to the canvas by ``amount`` (H, W), without burning out (screen mode)."""
    canvas += (1 - canvas) * (colour * np.clip(amount, 0, 1)[..., None])


def shade(canvas: Floats, amount: Floats) -> None:
    """Darken the canvas by ``amount`` (H, W): 0 leaves it, 1 makes it black."""
    canvas *= (1 - np.clip(amount, 0, 1))[..., None]


def glow(y: Floats, x: Floats, at_y: float, at_x: float, radius_y: float, radius_x: float) -> Floats:
    """Return a round glow, 1 in its middle, as (H, W)."""
    distance = ((y - np.float32(at_y)) / np.float32(radius_y)) ** 2 + (
        (x - np.float32(at_x)) / np.float32(radius_x)
    ) ** 2
    light: Floats = np.exp(-distance)
    return light


def band(y: Floats, x: Floats, top: float, bottom: float, left: float, right: float, soft: float) -> Floats:
    """Return a rectangle with soft edges, 1 inside, as (H, W)."""
    rows = smoothstep(top - soft, top + soft, y) * smoothstep(bottom + soft, bottom - soft, y)
    columns = smoothstep(left - soft, left + soft, x) * smoothstep(right + soft, right - soft, x)
    inside: Floats = rows * columns
    return inside


def discs(canvas: Floats, places: Floats, radii: Floats, colours: Floats, strengths: Floats, rim: float = 0.25) -> None:
    """Add out-of-focus lights: discs with a slightly brighter rim, as a lens draws them.

    ``places`` is (N, 2) as (y, x), ``radii`` (N,), ``colours`` (N, 3), ``strengths`` (N,).
    """
    side = canvas.shape[0]
    for (at_y, at_x), radius, colour, strength in zip(places, radii, colours, strengths, strict=True):
        reach = float(radius) + 2 / side
        top, bottom = max(0, int((at_y - reach) * side)), min(side, int((at_y + reach) * side) + 2)
        left, right = max(0, int((at_x - reach) * side)), min(side, int((at_x + reach) * side) + 2)
        if top >= bottom or left >= right:
            continue
        y = (np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / side - at_y
        x = (np.arange(left, right, dtype=np.float32) + 0.5)[None, :] / side - at_x
        distance = np.sqrt(y * y + x * x) / radius
        edge = np.float32(max(0.06, 1.2 / (radius * side)))
        disc = smoothstep(1.0, float(1 - edge), distance) * (1 - rim + rim * distance**3)
        screen(canvas[top:bottom, left:right], colour, disc * strength)


def polygon(height: int, width: int, points: list[tuple[float, float]], soft_px: float = 0.0) -> Floats:
    """Return the mask (H, W) of a polygon given as (x, y) shares of the canvas, antialiased."""
    zoom = 2
    mask = Image.new("L", (width * zoom, height * zoom))
    ImageDraw.Draw(mask).polygon([(px * width * zoom, py * height * zoom) for px, py in points], fill=255)
    field = np.asarray(mask.reduce(zoom), dtype=np.float32) / np.float32(255)
    return blur(field, soft_px)


def floor_map(height: int, width: int, horizon: float) -> tuple[int, Floats, Floats]:
    """Return the first row below the horizon, and floor coordinates (forward, sideways), each (rows, W).

    A point at the bottom edge is at forward distance 1, one half-way up to the horizon at 2.
    """
    first = min(int(horizon * height) + 1, height - 2)
    y, x = grid(height, width)
    rows = y[first:]
    forward = np.float32(1 - horizon) / np.maximum(rows - np.float32(horizon), np.float32(0.5 / height))
    forward = np.minimum(forward, np.float32(24))
    sideways = (x - np.float32(0.5)) * forward
    return first, np.broadcast_to(forward, (height - first, width)), sideways


def tiled(tile: Floats, v: Floats, u: Floats) -> Floats:
    """Look a square tile of noise (N, N) up at coordinates v, u in tiles; beyond its edges the tile is mirrored."""
    tile = np.concatenate([tile, tile[::-1]])
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    n = tile.shape[0]
    v, u = v * np.float32(0.5), u * np.float32(0.5)
    rows = np.floor(v * n).astype(np.int32) % n
    columns = np.floor(u * n).astype(np.int32) % n
    found: Floats = tile[rows, columns]
    return found
