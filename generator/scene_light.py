"""Light: the shadow and the mirror image under the product, the light field, and the final grade."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

from generator.composition import Bytes, Placement
from generator.palette import LUMINANCE, Floats
from generator.scene import Stage
from generator.scene_brush import blur, discs, glow, grid, line, resize, screen, shade, smoothstep

_FIELD_PX: Final = 96  # a light field has little detail: it is computed small


def ground_product(stage: Stage, canvas: Floats, placement: Placement, gloss: float) -> None:
    """Put the product on the floor: its mirror image, its cast shadow, and the dark line where it touches."""
    alpha = placement.pixels[..., 3].astype(np.float32) / np.float32(255)
    if gloss > 0:
        _mirror(stage, canvas, placement, alpha, gloss)
    _cast_shadow(stage, canvas, alpha)
    _contact(stage, canvas, alpha)


def _mirror(stage: Stage, canvas: Floats, placement: Placement, alpha: Floats, gloss: float) -> None:
    box = placement.box
    rows = min(int(box.height_px * 0.45), stage.size_px - box.bottom)
    if rows < 2:
        return
    colour = placement.pixels[::-1][:rows, :, :3].astype(np.float32) / np.float32(255)
    fade = np.linspace(1, 0, rows, dtype=np.float32)[:, None] ** 1.6
    strength = blur(np.ascontiguousarray(alpha[::-1][:rows]), 1.4) * fade * np.float32(gloss)
    patch = canvas[box.bottom : box.bottom + rows, box.left : box.right]
    patch += (blur(colour, 1.6) - patch) * strength[..., None]


def _cast_shadow(stage: Stage, canvas: Floats, alpha: Floats) -> None:
    """Lay the silhouette down on the floor, sheared away from the light."""
    n, light, box = stage.size_px, stage.light, stage.product
    tall = max(3, int(box.height_px * abs(light.shadow_length)))
    throw = int(box.height_px * light.shadow_slant * 0.5) * -stage.side
    half = n // 2
    flat = Image.fromarray(np.rint(alpha * 255).astype(np.uint8)).resize((box.width_px, tall), Image.Resampling.BOX)
    width = box.width_px + abs(throw)
    # Output pixel (x, y) reads the silhouette at x - throw * (share of the way to the shadow's far end).
    lean = throw / tall
    offset = float(-throw) + (0.0 if throw > 0 else float(throw))
    sheared = flat.transform(
        (width, tall), Image.Transform.AFFINE, (1, lean, offset, 0, 1, 0), Image.Resampling.BILINEAR
    )
    silhouette = np.asarray(sheared, dtype=np.float32) / np.float32(255)
    layer = np.zeros((n, n), dtype=np.float32)
    left = box.left + min(throw, 0)
    if light.shadow_length < 0:  # lit from behind: the shadow comes towards the viewer
        silhouette = silhouette[::-1]
        top = box.bottom - max(2, int(0.05 * box.height_px))
    else:
        top = box.bottom - tall
    y0, y1, x0, x1 = max(top, 0), min(top + tall, n), max(left, 0), min(left + width, n)
    layer[y0:y1, x0:x1] = silhouette[y0 - top : y1 - top, x0 - left : x1 - left]
    small = np.asarray(Image.fromarray(layer).resize((half, half), Image.Resampling.BOX))
    soft = np.clip(resize(blur(small, light.shadow_blur * half), n, n), 0, 1)
    shade(canvas, soft * np.float32(light.p_shadow))


def _contact(stage: Stage, canvas: Floats, alpha: Floats) -> None:
    """Darken the floor right under the lowest points of the product: the feet of a chair, the edge of a box."""
    n, box = stage.size_px, stage.product
    solid = alpha > 0.5
    has = solid.any(axis=0)
    if not has.any():
        return
    lowest = box.height_px - 1 - np.argmax(solid[::-1], axis=0)  # (width,)
    columns = np.flatnonzero(has & (lowest > box.height_px * 0.62))
    layer = np.zeros((n, n), dtype=np.float32)
    rows = np.minimum(box.top + lowest[columns] + 1, n - 1)
    layer[rows, box.left + columns] = 1.0
    tight = blur(layer, 0.0035 * n) * np.float32(4.2)
    wide = blur(layer, 0.014 * n) * np.float32(9.0)
    shade(canvas, np.clip(tight, 0, 0.62) + np.clip(wide, 0, 0.34))


def light_scene(stage: Stage, canvas: Floats) -> None:
    """Apply the light's field to the finished scene: what it brightens, darkens and lets bloom."""
    y, x = grid(_FIELD_PX, _FIELD_PX)
    light, side, focus = stage.light, stage.side, stage.focus_x
    n = stage.size_px
    field: Floats = np.ones((_FIELD_PX, _FIELD_PX), dtype=np.float32)
    bloom: Floats = np.zeros_like(field)
    match light.falloff:
        case "even":
            field = 1.04 - 0.10 * y + 0.05 * side * (x - 0.5)
            bloom = glow(y, x, 0.10, 0.5 + 0.4 * side, 0.45, 0.6) * np.float32(0.16)
        case "sun":
            at_x, at_y = 0.5 + 0.42 * side, stage.horizon - 0.22
            field = 0.72 + 0.46 * glow(y, x, at_y, at_x, 0.6, 0.80)
            bloom = glow(y, x, at_y, at_x, 0.30, 0.36) * np.float32(0.66) + glow(
                y, x, at_y, at_x, 0.09, 0.09
            ) * np.float32(0.6)
        case "spot":
            pool = glow(y, x, stage.baseline - 0.22, focus, 0.40, 0.34)
            floor = glow(y, x, stage.baseline + 0.01, focus, 0.10, 0.40) * np.float32(0.22)
            cone = smoothstep(0.10, 0.0, np.abs(x - focus) - 0.07 - 0.26 * y) * smoothstep(1.0, 0.1, y)
            field = 0.24 + 0.94 * pool + 0.20 * cone + floor
            bloom = cone * np.float32(0.17) + pool * np.float32(0.10)
        case "side":
            across: Floats = (x - 0.5) * side + (0.5 - y) * np.float32(0.10)
            slats = (x - y * np.float32(0.2 * side)) * np.float32(3.1)
            slab = smoothstep(-0.02, 0.10, np.abs(slats % 1 - np.float32(0.5)) - np.float32(0.10))
            lit = smoothstep(-0.55, 0.50, across) * (slab * np.float32(0.36) + np.float32(0.64))
            field = lit * np.float32(0.98) + np.float32(0.30)
        case "back":
            bloom = glow(y, x, 0.36, focus, 0.42, 0.46) * np.float32(0.50) + _rays(stage, y, x)
            field = 0.86 + 0.18 * bloom
        case other:
            raise ValueError(f"light falloff {other!r} is unknown; the scene cannot be lit.")
    colour = np.asarray(light.colour, dtype=np.float32)
    canvas *= resize(np.ascontiguousarray(field, dtype=np.float32), n, n)[..., None] * colour
    np.clip(canvas, 0, 1, out=canvas)
    if bloom.any():
        warmth = np.clip(stage.palette.at(0.97) * np.float32(0.5) + colour * np.float32(0.5), 0, 1)
        screen(canvas, warmth, resize(np.ascontiguousarray(bloom, dtype=np.float32), n, n))
    if light.falloff in {"back", "sun"}:
        _flare(stage, canvas)
    if light.falloff == "back":
        _dust(stage, canvas)


def _rays(stage: Stage, y: Floats, x: Floats) -> Floats:
    """Return shafts of light that fan out from behind the product, (H, W)."""
    middle = (stage.product.top + stage.product.bottom) / 2 / stage.size_px
    down, across = y - np.float32(min(middle, 0.55)), x - np.float32(stage.focus_x)
    turn = np.arctan2(down, across) * np.float32(1 / np.pi)  # -1 to 1
    n_knots = 256
    shafts = line(stage.rng, n_knots, 19, 3)
    shafts[-16:] += (shafts[0] - shafts[-16:]) * np.linspace(0, 1, 16, dtype=np.float32)  # the circle closes
    at = (turn + 1) * np.float32(0.5 * (n_knots - 1))
    low = at.astype(np.int32)
    part = at - low
    shaft = shafts[low] * (1 - part) + shafts[np.minimum(low + 1, n_knots - 1)] * part
    distance = np.sqrt(down * down + across * across)
    upwards = smoothstep(0.10, -0.12, down) * np.float32(0.75) + np.float32(0.25)
    reach = smoothstep(0.90, 0.20, distance) * smoothstep(0.04, 0.24, distance)
    rays: Floats = smoothstep(-0.25, 0.95, shaft) * reach * upwards * np.float32(0.46)
    return rays


def _dust(stage: Stage, canvas: Floats) -> None:
    """Add specks that float in the light behind the product."""
    rng, count = stage.rng, 34
    places = np.stack([rng.uniform(0.04, 0.80, count), rng.uniform(0, 1, count)], axis=1).astype(np.float32)
    radii = (0.0025 + 0.011 * rng.random(count) ** 2.5).astype(np.float32)
    hues = np.stack([stage.palette.at(1.0), stage.palette.at(0.92)])[rng.integers(0, 2, count)]
    discs(canvas, places, radii, hues, rng.uniform(0.18, 0.7, count).astype(np.float32), rim=0.1)


def _flare(stage: Stage, canvas: Floats) -> None:
    """Add the faint ghosts that a lens draws on the line from the light through the middle."""
    start = np.array([stage.horizon - 0.28, 0.5 + 0.44 * stage.side], dtype=np.float32)
    steps = np.array([0.35, 0.6, 1.35, 1.7], dtype=np.float32)[:, None]
    places = start + (np.array([0.5, 0.5], dtype=np.float32) - start) * steps
    radii = np.array([0.030, 0.016, 0.042, 0.070], dtype=np.float32)
    colours = np.stack([stage.palette.at(0.9), stage.palette.accents[1], stage.palette.at(0.95), stage.palette.at(0.8)])
    discs(canvas, places, radii, colours, np.array([0.16, 0.20, 0.10, 0.08], dtype=np.float32), rim=0.5)


def grade(stage: Stage, canvas: Floats) -> Bytes:
    """Finish the picture: draw it to the palette, set exposure and contrast, darken the corners, add fine grain.

    The grain is one level of 255: enough that smooth gradients don't band, too little to cost file size.
    """
    n, palette, light = stage.size_px, stage.palette, stage.light
    tone = canvas @ LUMINANCE  # (H, W)
    index = np.rint(tone * 255).astype(np.uint8)
    canvas += (palette.table()[index] - canvas) * np.float32(palette.hold)
    if palette.hold < 1:  # mixing tones greys them a little: give the colour back
        grey = (canvas @ LUMINANCE)[..., None]
        canvas += (canvas - grey) * np.float32(0.22)
    # Contrast as a smooth S around the middle grey; exposure and the palette's key scale the light before it.
    canvas *= np.float32(light.exposure * palette.key)
    canvas += (canvas - np.float32(0.48)) * np.float32(light.contrast - 1)
    np.clip(canvas, 0, 1, out=canvas)
    canvas *= np.float32(0.82) + canvas * (np.float32(0.46) - np.float32(0.28) * canvas)
    y, x = grid(_FIELD_PX, _FIELD_PX)
    corners = 1 - np.float32(0.19) * np.clip(((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2, 0, 1) ** 1.3
    canvas *= resize(corners.astype(np.float32), n, n)[..., None]
    grain = stage.rng.integers(-256, 257, (n, n), dtype=np.int16).astype(np.float32) * np.float32(1.0 / 256)
    np.multiply(canvas, 255, out=canvas)
    canvas += grain[..., None]
    np.clip(np.rint(canvas, out=canvas), 0, 255, out=canvas)
    return canvas.astype(np.uint8)
