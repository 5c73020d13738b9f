"""Scenes out of doors without people: mountains, beach, forest, dunes, meadow."""

from __future__ import annotations

import numpy as np

from generator.palette import Floats
from generator.scene import Backdrop, Stage
from generator.scene_brush import (
    blur,
    floor_map,
    glow,
    gradient,
    line,
    noise,
    over,
    screen,
    shade,
    smoothstep,
    tiled,
)


def _sky(stage: Stage, top: str, low: str, haze: str) -> Floats:
    """Paint a sky down to the horizon on the far canvas, with thin clouds."""
    palette, n = stage.palette, stage.far_px
    y, x = stage.far_grid()
    horizon = stage.horizon
    canvas = gradient(
        n, n, [(0, palette.tint(top)), (horizon * 0.62, palette.tint(low)), (horizon, palette.tint(haze))]
    )
    clouds = noise(stage.rng, n, n, 7, 2.5, 4)
    cover = smoothstep(0.50, 0.78, clouds) * smoothstep(0.0, 0.12, y) * smoothstep(horizon, horizon * 0.55, y)
    over(canvas, palette.at(0.97), cover * np.float32(0.55))
    sun_x = 0.5 + 0.33 * stage.side
    screen(canvas, palette.at(1.0), glow(y, x, horizon - 0.14, sun_x, 0.22, 0.34) * np.float32(0.6))
    return canvas


def _floor_grain(stage: Stage, cells: float, stretch: float = 1.0) -> tuple[int, Floats, Floats]:
    """Return the floor's first row, its grain (rows, W) from 0 to 1, fading with distance, and its forward distance."""
    n = stage.size_px
    first, forward, sideways = floor_map(n, n, stage.horizon)
    tile = noise(stage.rng, 256, 256, 24, 24, 4)
    across = sideways * np.float32(cells / 10) + np.float32(0.5)  # aside: a tile's edge mirrors
    grain = tiled(tile, forward * np.float32(cells * stretch / 10), across)
    fade = np.clip(np.float32(2.2) / forward - np.float32(0.12), 0, 1)
    return first, np.float32(0.5) + (grain - np.float32(0.5)) * fade, forward


def _floor_relief(stage: Stage, cells: float) -> tuple[int, Floats]:
    """Return the floor's first row and the light on its bumps and cracks (rows, W), about 0.5, fading with distance."""
    n = stage.size_px
    first, forward, sideways = floor_map(n, n, stage.horizon)
    tile = noise(stage.rng, 256, 256, 10, 10, 6)
    tile = np.minimum(tile, np.float32(0.54)) - np.exp(-(((tile - 0.5) / 0.018) ** 2)) * np.float32(0.05)
    lit = (np.roll(tile, stage.side, axis=1) - tile) + (np.roll(tile, -1, axis=0) - tile) * np.float32(0.7)
    light = blur(lit, 0.6) * np.float32(9.0) + (tile - np.float32(0.46)) * np.float32(1.4)
    # Half a tile aside, or the floor would be mirrored in the middle of the picture.
    relief = tiled(light, forward * np.float32(cells / 10), sideways * np.float32(cells / 10) + np.float32(0.5))
    fade = np.clip(np.float32(2.6) / forward - np.float32(0.10), 0, 1)
    return first, np.float32(0.5) + relief * fade


def misty_mountains(stage: Stage) -> Backdrop:
    """Paint ridges behind ridges with mist between them, seen from a rock ledge."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, _ = stage.far_grid()
    canvas = _sky(stage, "5d8fc4", "a9c9e6", "f2efe6")
    horizon = stage.horizon
    n_ridges = 5
    for i in range(n_ridges):
        near = i / (n_ridges - 1)
        rough = 0.52 - 0.1 * near
        outline = line(rng, n, 2.2 + 1.6 * near, 6, rough)
        crest = horizon - 0.30 + 0.27 * near + outline * np.float32(0.095 - 0.045 * near)  # (W,)
        depth = y - crest[None, :]
        inside = smoothstep(-0.5 / n, 1.0 / n, depth)
        slope = np.gradient(blur_line(outline, 5)).astype(np.float32)[None, :] * np.float32(n / 10)
        gullies = noise(rng, n, n, 9, 14, 4)
        below = np.maximum(depth, 0)
        lit = np.clip(
            0.42 + stage.side * slope * np.exp(-below * 22) + (gullies - 0.5) * 1.5 * np.exp(-below * 9), 0, 1
        )
        rock = palette.tint("2f4a66", 0.6) * np.float32(near) + palette.tint("9db6cf", 0.6) * np.float32(1 - near)
        lighter = rock + (palette.at(0.9) - rock) * np.float32(0.42)
        colour = rock + (lighter - rock) * lit[..., None]
        canvas += (colour - canvas) * inside[..., None]
        drift = noise(rng, n, n, 4, 3, 3)
        mist = smoothstep(0.0, 0.17, depth) * np.exp(-np.maximum(depth - 0.17, 0) * 6) * (0.35 + 0.75 * drift)
        over(canvas, palette.at(0.95), np.clip(mist * (0.85 - 0.25 * near), 0, 1) * inside)
    picture = stage.defocus(canvas, 0.0035)
    first, relief = _floor_relief(stage, 4.2)
    near_y, near_x = stage.near_grid()
    edge = horizon + 0.055 + line(rng, stage.size_px, 5, 4)[None, :] * np.float32(0.010)
    ledge = smoothstep(0.0, 2.0 / stage.size_px, near_y[first:] - edge)
    depth = np.clip((near_y[first:] - edge) / (1 - horizon), 0, 1)
    stone = palette.tint("7d7a76", 0.7) * np.float32(0.95)
    dark = palette.tint("3d4046", 0.7)
    boulders = noise(rng, relief.shape[0], relief.shape[1], 3, 4, 4)
    tone = np.clip(relief + boulders * 0.7 - 0.30, 0, 1)[..., None]
    surface = dark + (stone - dark) * tone
    surface += (palette.at(0.9) - surface) * (np.exp(-depth * 5) * np.float32(0.55))[..., None]
    view = picture[first:]
    view += (surface - view) * ledge[..., None]
    over(picture, palette.at(0.97), glow(near_y, near_x, horizon + 0.05, 0.5, 0.05, 0.8) * np.float32(0.5))
    return Backdrop(picture)


def sunlit_beach(stage: Stage) -> Backdrop:
    """Paint sky, glittering sea, foam and warm sand."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    horizon = stage.horizon - 0.10
    canvas = _sky(stage, "3f93d6", "9fd3ef", "fdf3df")
    shore = stage.horizon + 0.035
    depth = (y - horizon) / (shore - horizon)
    sea = smoothstep(-0.5 / n, 0.8 / n, y - horizon)
    deep, shallow = palette.tint("12668f", 0.75), palette.tint("58c7c4", 0.75)
    part = np.clip(depth, 0, 1)[..., None]
    canvas += (deep + (shallow - deep) * part - canvas) * sea[..., None]
    waves = noise(rng, n, n, 90, 5, 2)
    sparkle = smoothstep(0.62, 0.86, waves) * sea * glow(y, x, horizon + 0.06, 0.5 + 0.33 * stage.side, 0.16, 0.28)
    over(canvas, palette.at(0.99), np.clip(sparkle, 0, 1))
    shade(canvas, smoothstep(0.60, 0.30, waves) * sea * np.float32(0.16))
    picture = stage.defocus(canvas, 0.003)

    m = stage.size_px
    near_y, _ = stage.near_grid()
    first, grain, _ = _floor_grain(stage, 26)
    rows = near_y[first:]
    bend = shore + line(rng, m, 2.2, 3)[None, :] * np.float32(0.014)
    sand = smoothstep(-0.004, 0.004, rows - bend)
    dry, wet = palette.tint("ecd3a4", 0.8), palette.tint("a98b63", 0.8)
    wetness = np.exp(-np.maximum(rows - bend, 0) * np.float32(26))[..., None]
    surface = dry + (wet - dry) * (wetness * np.float32(0.7))
    dunes = noise(rng, m - first, m, 5, 2.5, 3)
    surface = surface * (0.84 + 0.22 * grain + 0.18 * (dunes - 0.5))[..., None]
    view = picture[first:]
    view += (surface - view) * sand[..., None]
    for offset, strength in ((-0.012, 0.75), (0.004, 0.95)):
        lace = noise(rng, m - first, m, 40, 60, 2)
        foam = np.exp(-(((rows - bend - offset) / 0.0065) ** 2)) * smoothstep(0.25, 0.62, lace)
        over(view, palette.at(1.0), np.clip(foam * np.float32(strength), 0, 1))
    return Backdrop(picture, gloss=0.04)


def _conifers(
    stage: Stage, canvas: Floats, base: float, height: float, count: int, colour: Floats, rim: Floats, p_cover: float
) -> None:
    """Paint a row of conifers with their feet at ``base``; outlines come from a saw tooth that widens downwards."""
    n = canvas.shape[0]
    rng = stage.rng
    order = rng.permutation(count)
    for slot in order:
        at_x = (slot + rng.uniform(0.1, 0.9)) / count * 1.1 - 0.05
        tall = height * rng.uniform(0.65, 1.15)
        half = tall * rng.uniform(0.17, 0.24)
        foot = base + rng.uniform(-0.01, 0.02)
        top = int(max((foot - tall) * n, 0))
        bottom, left, right = int(min(foot * n, n)), int(max((at_x - half) * n, 0)), int(min((at_x + half) * n, n))
        if bottom - top < 3 or right - left < 2:
            continue
        y = (np.arange(top, bottom, dtype=np.float32)[:, None] / n - (foot - tall)) / tall
        x = (np.arange(left, right, dtype=np.float32)[None, :] / n - at_x) / half
        tiers = 9 + int(rng.integers(0, 5))
        saw = (y * tiers + 0.22 * np.sin(9 * x + slot)) % 1.0
        ragged = rng.random((*y.shape[:1], right - left), dtype=np.float32) * np.float32(0.18)
        width = np.clip(y, 0, 1) ** 0.85 * (0.52 + 0.48 * saw) - ragged * y
        alpha = smoothstep(-0.06, 0.08, width - np.abs(x)) * np.float32(p_cover)
        light = np.clip(0.5 + 0.5 * stage.side * x, 0, 1) * (0.35 + 0.65 * (1 - saw)) * np.float32(0.75)
        tree = colour + (rim - colour) * light[..., None]
        patch = canvas[top:bottom, left:right]
        patch += (tree - patch) * alpha[..., None]


def pine_forest(stage: Stage) -> Backdrop:
    """Paint rows of conifers that sink into haze, with shafts of light and a mossy floor."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    horizon = stage.horizon
    canvas = gradient(
        n, n, [(0, palette.tint("a9c4a6")), (horizon, palette.tint("eef2d8")), (1, palette.tint("7f9160"))]
    )
    screen(canvas, palette.at(1.0), glow(y, x, 0.24, 0.5 + 0.2 * stage.side, 0.36, 0.34) * np.float32(0.75))
    rows = ((0.36, 15, 0.16, 0.55), (0.50, 11, 0.40, 0.8), (0.68, 8, 0.72, 0.95))
    for height, count, near, p_cover in rows:
        tree = palette.tint("9ab59a", 0.6) * np.float32(1 - near) + palette.tint("16301f", 0.7) * np.float32(near)
        rim = tree + (palette.tint("d9e08f", 0.6) - tree) * np.float32(0.40)
        _conifers(stage, canvas, horizon + 0.02 + 0.03 * near, height, count, tree, rim, p_cover)
        mist = noise(rng, n, n, 4, 4, 3) * glow(y, x, horizon + 0.01, 0.5, 0.14, 2.0)
        over(canvas, palette.at(0.93), np.clip(mist * np.float32(1.1 - 0.5 * near), 0, 1))
    across = (x - 0.5 - 0.25 * stage.side) + stage.side * 0.55 * (y - 0.1)
    beams = resize_line(line(rng, 128, 7, 3), across)
    screen(canvas, palette.at(0.96), smoothstep(0.1, 1.1, beams) * smoothstep(0.75, 0.1, y) * np.float32(0.45))
    picture = stage.defocus(canvas, 0.004)

    first, grain, forward = _floor_grain(stage, 22)
    m = stage.size_px
    near_y, _ = stage.near_grid()
    moss, earth = palette.tint("8a9a4e", 0.8), palette.tint("3a3420", 0.8)
    patches = noise(rng, m - first, m, 4, 5, 4)
    tone = np.clip(grain * 1.5 + (patches - 0.5) * 1.3 - 0.22, 0, 1)[..., None]
    surface = earth + (moss - earth) * tone
    haze = np.clip((forward - 1.4) / 7, 0, 1)[..., None]
    surface = surface + (palette.at(0.86) - surface) * haze
    cover = smoothstep(horizon + 0.005, horizon + 0.06, near_y[first:])
    view = picture[first:]
    view += (surface - view) * cover[..., None]
    sunny = smoothstep(0.50, 0.72, blur(patches[:, ::-1].copy(), 6))
    screen(view, palette.tint("ffe9a8", 0.8), sunny * cover * np.float32(0.34))
    return Backdrop(picture)


def blur_line(values: Floats, half: int) -> Floats:
    """Average a line (N,) over ``2 * half + 1`` neighbours, keeping its length."""
    padded = np.pad(values, half, mode="edge")
    width = 2 * half + 1
    return np.convolve(padded, np.full(width, 1 / width, dtype=np.float32), mode="valid").astype(np.float32)


def resize_line(values: Floats, place: Floats) -> Floats:
    """Read a line (N,) at places from -1 to 1 (any array), with linear interpolation."""
    at = np.clip((place + 1) * 0.5, 0, 0.999) * (len(values) - 1)
    low = at.astype(np.int32)
    part = at - low
    read: Floats = (values[low] * (1 - part) + values[np.minimum(low + 1, len(values) - 1)] * part).astype(np.float32)
    return read


def desert_dunes(stage: Stage) -> Backdrop:
    """Paint dunes with a lit and a shaded flank each, and rippled sand in front."""
    palette, rng = stage.palette, stage.rng
    n = stage.size_px
    y, x = stage.near_grid()
    horizon = stage.horizon - 0.06
    sky = _sky(stage, "5c9bc9", "bcd7dc", "fbe6c4")
    picture = stage.defocus(sky, 0.004)
    across = x[0]
    n_dunes = 4
    for i in range(n_dunes):
        near = i / (n_dunes - 1)
        peak = rng.uniform(0.15, 0.85) if i < n_dunes - 1 else 0.5 + 0.32 * stage.side
        width = 0.30 + 0.45 * near
        hump = np.exp(-(((across - peak) / width) ** 2)) + 0.22 * np.exp(-(((across - 1 + peak) / 0.3) ** 2))
        crest = horizon + 0.01 + 0.085 * near + 0.03 - hump * np.float32(0.16 - 0.07 * near)
        crest += line(rng, n, 1.5, 2) * np.float32(0.008)
        depth = y - crest[None, :].astype(np.float32)
        inside = smoothstep(-0.7 / n, 0.9 / n, depth)
        # The ridge runs from the peak towards the viewer in an S; sand on the light's side of it is bright.
        ridge = peak + stage.side * 0.10 * np.sin(np.clip(depth, 0, 1) * 16) + stage.side * depth * np.float32(-0.9)
        flank = smoothstep(-0.012, 0.012 + 0.10 * near, (x - ridge) * stage.side)
        sun, dark = palette.tint("f0bf7d", 0.85), palette.tint("8a4f2c", 0.85)
        fade = np.float32(0.48 * (1 - near))
        sun, dark = sun + (palette.at(0.9) - sun) * fade, dark + (palette.at(0.72) - dark) * fade
        colour = dark + (sun - dark) * (0.16 + 0.84 * flank * np.exp(-np.clip(depth, 0, 1) * 1.4))[..., None]
        picture += (colour - picture) * inside[..., None]
    first, forward, sideways = floor_map(n, n, stage.horizon)
    wobble = tiled(noise(rng, 256, 256, 6, 6, 2), forward * np.float32(0.12), sideways * np.float32(0.16))
    ripples = np.sin(forward * np.float32(46) + sideways * np.float32(9 * stage.side) + wobble * np.float32(26))
    fade = np.clip(np.float32(1.9) / forward - np.float32(0.45), 0, 1)
    view = picture[first:]
    view *= (1 + ripples * fade * np.float32(0.085))[..., None]
    view += (palette.tint("f3c78a", 0.85) - view) * (fade * np.float32(0.25))[..., None]
    return Backdrop(np.clip(picture, 0, 1))


def flower_meadow(stage: Stage) -> Backdrop:
    """Paint a meadow in flower under a soft sky: far bokeh, near blossoms and blades of grass."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, _ = stage.far_grid()
    horizon = stage.horizon - 0.12
    canvas = _sky(stage, "8cc0e8", "d2e8f3", "fff6df")
    tree_line = horizon - 0.035 + line(rng, n, 7, 4)[None, :] * np.float32(0.022)
    trees = smoothstep(-0.006, 0.006, y - tree_line)
    leafy = noise(rng, n, n, 50, 50, 3)[..., None]
    far_green, dark_green = palette.tint("8fb27c", 0.7), palette.tint("4c7a4c", 0.7)
    canvas += (dark_green + (far_green - dark_green) * leafy - canvas) * trees[..., None]
    ground = smoothstep(horizon - 0.006, horizon + 0.012, y)
    first, forward, _ = floor_map(n, n, horizon)
    lush, pale = palette.tint("5d9440", 0.75), palette.tint("cfd98c", 0.75)
    part = np.clip((forward - 1) / 6, 0, 1)[..., None]
    grass = (lush + (pale - lush) * part) * (0.72 + 0.5 * noise(rng, n - first, n, 10, 12, 4))[..., None]
    view = canvas[first:]
    view += (grass - view) * ground[first:][..., None]
    _blossoms(stage, canvas, horizon, 260, 0.06, 0.66)
    picture = stage.defocus(canvas, 0.008)

    m = stage.size_px
    blades = noise(rng, m, m, 22, 170, 2)
    near_y, _ = stage.near_grid()
    sharp = smoothstep(horizon + 0.06, 0.95, near_y)
    picture *= (1 + (blades - 0.5) * np.float32(0.7) * sharp)[..., None]
    _blossoms(stage, picture, horizon, 70, 0.50, 1.02)
    return Backdrop(np.clip(picture, 0, 1))


def _blossoms(stage: Stage, canvas: Floats, horizon: float, count: int, near: float, far: float) -> None:
    """Scatter flowers over the ground between two depths (0 horizon, 1 bottom edge), larger in front."""
    rng, palette = stage.rng, stage.palette
    depth = near + (far - near) * rng.random(count) ** 0.8
    depth.sort()
    colours = np.stack([palette.accents[0], palette.accents[2], palette.at(0.98), palette.accents[1]])
    side = canvas.shape[0]
    for d in depth:
        at_y, at_x = horizon + (1 - horizon) * d, rng.uniform(-0.02, 1.02)
        radius = 0.0055 + 0.027 * d * d * rng.uniform(0.7, 1.3)
        colour = colours[rng.integers(0, 4)] * np.float32(rng.uniform(0.85, 1.0))
        reach = radius * 1.5
        top, bottom = max(0, int((at_y - reach) * side)), min(side, int((at_y + reach) * side) + 2)
        left, right = max(0, int((at_x - reach) * side)), min(side, int((at_x + reach) * side) + 2)
        if bottom - top < 1 or right - left < 1:
            continue
        y = ((np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / side - at_y) / radius / np.float32(0.72)
        x = ((np.arange(left, right, dtype=np.float32) + 0.5)[None, :] / side - at_x) / radius
        distance = np.sqrt(x * x + y * y)
        petals = 0.74 + 0.26 * np.cos(np.arctan2(y, x) * rng.integers(5, 8) + rng.uniform(0, 6))
        soft = max(0.12, 1.3 / (radius * side))
        alpha = smoothstep(1.0, 1.0 - soft, distance / petals)
        patch = canvas[top:bottom, left:right]
        tone = (0.72 + 0.42 * np.clip(distance, 0, 1) - 0.12 * y)[..., None]
        patch += (np.clip(colour * tone, 0, 1) - patch) * (alpha * np.float32(0.94))[..., None]
        heart = smoothstep(0.34, 0.18, distance) * np.float32(0.9)
        patch += (palette.tint("f2c230", 0.9) - patch) * heart[..., None]
