"""Scenes indoors that stand on something: the living room and the marble podium."""

from __future__ import annotations

import numpy as np

from generator.palette import Floats
from generator.scene import Backdrop, Stage
from generator.scene_brush import (
    band,
    blur,
    floor_map,
    glow,
    gradient,
    noise,
    over,
    resize,
    screen,
    shade,
    smoothstep,
    tiled,
)

_LID_FLATNESS = 0.27  # height over width of a round top, as the camera sees it


def cosy_living_room(stage: Stage) -> Backdrop:
    """Paint a living room out of focus, sofa, lamp, pictures and window, with a wooden floor and a rug."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    floor = stage.horizon + 0.03
    canvas = gradient(n, n, [(0, palette.tint("d9c7ad")), (floor, palette.tint("efe0c8")), (1, palette.tint("b98f63"))])
    over(canvas, palette.at(0.95), band(y, x, floor - 0.035, floor, -1, 2, 0.002))
    lamp_x = 0.12 if stage.side < 0 else 0.88
    window_x = 0.62 if stage.side < 0 else 0.06
    window = band(y, x, 0.08, floor - 0.20, window_x, window_x + 0.30, 0.002)
    over(canvas, palette.at(1.0), window)
    outside = noise(rng, n, n, 7, 7, 4)
    over(canvas, palette.tint("8fb59a", 0.7), window * smoothstep(0.40, 0.70, outside) * np.float32(0.6))
    for bar in (window_x + 0.098, window_x + 0.198):
        over(canvas, palette.at(0.93), window * band(y, x, -1, 2, bar, bar + 0.008, 0.002))
    for left in (window_x - 0.065, window_x + 0.275):
        folds = 0.78 + 0.22 * np.sin(x * 210 + np.sin(y * 7))
        curtain = band(y, x, 0.03, floor - 0.01, left, left + 0.09, 0.003)
        canvas += (palette.tint("e4cfb4", 0.6) * folds[..., None] - canvas) * (curtain * np.float32(0.92))[..., None]
    frame_x = 0.30 if stage.side < 0 else 0.46
    for i, (tall, wide) in enumerate(((0.19, 0.12), (0.14, 0.10))):
        left = frame_x + 0.145 * i
        over(canvas, palette.tint("5b4027", 0.8), band(y, x, 0.12, 0.12 + tall, left, left + wide, 0.002))
        over(canvas, palette.at(0.97), band(y, x, 0.13, 0.11 + tall, left + 0.01, left + wide - 0.01, 0.002))
        mark = glow(y, x, 0.12 + tall / 2, left + wide / 2, tall * 0.24, wide * 0.24)
        over(canvas, palette.accents[i], np.clip(mark * 1.6, 0, 1) * np.float32(0.9))
    _sofa(stage, canvas, floor)
    _lamp(stage, canvas, floor, lamp_x)
    shade(canvas, glow(y, x, floor + 0.005, 0.5, 0.02, 0.6) * np.float32(0.35))
    picture = stage.defocus(canvas, 0.0085)

    m = stage.size_px
    near_y, near_x = stage.near_grid()
    first, forward, sideways = floor_map(m, m, stage.horizon - 0.12)
    first_floor = int(floor * m)
    skip = first_floor - first
    forward, sideways = forward[skip:], sideways[skip:]
    plank = np.floor(sideways * 5.0).astype(np.int32)
    along = forward * np.float32(0.9) + (plank * 37 % 11).astype(np.float32) * np.float32(0.31)
    tones = rng.random(64).astype(np.float32)
    board = tones[(plank * 7 + np.floor(along).astype(np.int32) * 13) % 64]
    fibre = tiled(noise(rng, 256, 256, 4, 60, 3), along * np.float32(0.35), sideways * np.float32(1.3))
    joint = smoothstep(0.94, 0.99, np.abs((sideways * 5.0 % 1) * 2 - 1)) * np.clip(2.2 / forward, 0, 1)
    wood, dark = palette.tint("c89a66", 0.85), palette.tint("8d6038", 0.85)
    tone = np.clip(0.25 + 0.35 * board + 0.5 * (fibre - 0.25), 0, 1)[..., None]
    surface = dark + (wood - dark) * tone
    shade(surface, joint * np.float32(0.38))
    rug = smoothstep(
        1.0,
        0.992,
        np.sqrt(((near_x - stage.focus_x) / 0.47) ** 2 + ((near_y[first_floor:] - stage.baseline + 0.03) / 0.145) ** 2),
    )
    weave = tiled(noise(rng, 256, 256, 90, 90, 2), forward * np.float32(1.9), sideways * np.float32(1.9))
    cloth = (palette.at(0.86) * np.float32(0.7) + palette.accents[1] * np.float32(0.3)) * (0.80 + 0.34 * weave)[
        ..., None
    ]
    shade(surface, blur(rug, 5) * (1 - rug) * np.float32(0.45))
    surface += (cloth - surface) * rug[..., None]
    screen(
        surface,
        palette.tint("ffe9c0", 0.8),
        glow(near_y[first_floor:], near_x, floor, window_x + 0.15, 0.20, 0.22) * np.float32(0.35),
    )
    edge = smoothstep(-0.004, 0.004, near_y[first_floor:] - floor)
    view = picture[first_floor:]
    view += (surface - view) * edge[..., None]
    return Backdrop(np.clip(picture, 0, 1), gloss=0.05)


def _sofa(stage: Stage, canvas: Floats, floor: float) -> None:
    """Paint a sofa against the wall, off the middle, so that it frames the product and does not stand behind it."""
    palette = stage.palette
    y, x = stage.far_grid()
    left, right = (0.30, 1.06) if stage.side < 0 else (-0.06, 0.70)
    cloth = palette.accents[2] * np.float32(0.55) + palette.at(0.55) * np.float32(0.45)
    back = band(y, x, floor - 0.205, floor - 0.02, left, right, 0.010)
    height = np.clip((floor - y) / 0.2, 0, 1)
    canvas += (cloth * (0.62 + 0.42 * height)[..., None] - canvas) * back[..., None]
    for i in range(3):
        seat_left = left + 0.05 + i * (right - left - 0.10) / 3
        seat = band(y, x, floor - 0.105, floor - 0.045, seat_left, seat_left + (right - left - 0.12) / 3, 0.008)
        over(canvas, np.clip(cloth * np.float32(1.15), 0, 1), seat)
    for arm in (left - 0.01, right - 0.06):
        over(canvas, cloth * np.float32(0.95), band(y, x, floor - 0.150, floor - 0.01, arm, arm + 0.07, 0.012))
    for i, colour in enumerate((palette.accents[1], palette.at(0.95), palette.accents[0])):
        at = left + 0.13 + 0.20 * i
        pillow = np.exp(-(((np.abs(x - at)) / 0.060) ** 4) - ((np.abs(y - floor + 0.145) / 0.052) ** 4))
        canvas += (colour * np.float32(0.94) - canvas) * np.clip(pillow * 1.2, 0, 1)[..., None]


def _lamp(stage: Stage, canvas: Floats, floor: float, at: float) -> None:
    """Paint a standard lamp and its light on the wall."""
    palette = stage.palette
    y, x = stage.far_grid()
    over(canvas, palette.tint("2c2622"), band(y, x, 0.26, floor + 0.01, at - 0.004, at + 0.004, 0.001))
    half = 0.055 + np.clip((y - 0.17) / 0.11, 0, 1) * np.float32(0.035)
    lampshade = smoothstep(0.004, -0.004, np.abs(x - at) - half) * band(y, x, 0.17, 0.28, -1, 2, 0.003)
    over(canvas, palette.tint("fff0cc", 0.9), lampshade)
    screen(canvas, palette.tint("ffd28a", 0.95), glow(y, x, 0.22, at, 0.24, 0.24) * np.float32(0.75))


def marble_podium(stage: Stage) -> Backdrop:
    """Paint an arched niche with a round marble podium under the product, and lower blocks beside it."""
    palette, rng = stage.palette, stage.rng
    n = stage.size_px
    y, x = stage.near_grid()
    floor = stage.horizon + 0.07
    hue = palette.accents[0] * np.float32(0.22) + palette.at(0.72) * np.float32(0.78)
    wall = gradient(n, n, [(0, hue * np.float32(0.90)), (floor, hue), (1, hue)])
    half_n = stage.far_px
    plaster = resize(noise(rng, half_n, half_n, 5, 5, 5), n, n)
    wall *= (0.95 + 0.10 * plaster)[..., None]
    at = stage.focus_x
    arch_top, arch_half = 0.34, 0.335
    above = np.sqrt((x - at) ** 2 + (y - arch_top) ** 2) - arch_half
    distance = np.where(y < arch_top, above, np.abs(x - at) - arch_half)  # < 0 inside the niche
    niche = smoothstep(0.002, -0.002, distance)
    inner = palette.at(0.93) * np.float32(0.9) + hue * np.float32(0.1)
    deep = np.clip(1 + distance / 0.33, 0, 1)
    slanted = np.clip(0.5 - stage.side * (x - at) * 1.3, 0, 1)
    inside = inner * (0.98 - 0.18 * deep - 0.16 * slanted)[..., None]
    wall += (inside - wall) * niche[..., None]
    # The niche's rim throws a shadow into it, on the light's side.
    shifted = np.roll(niche, (int(0.02 * n), int(-0.045 * stage.side * n)), axis=(0, 1))
    shade(wall, np.clip(niche - blur(shifted, 0.012 * n), 0, 1) * np.float32(0.32))
    screen(wall, palette.at(1.0), np.exp(-((distance / 0.010) ** 2)) * np.float32(0.35))
    ground = smoothstep(-0.001, 0.003, y - floor)
    slab = hue * np.float32(0.62) + palette.at(0.9) * np.float32(0.38)
    part = np.clip((y - floor) / (1 - floor), 0, 1)
    wall += (slab * (0.84 + 0.20 * part)[..., None] - wall) * ground[..., None]
    shade(wall, np.exp(-(((y - floor) / 0.018) ** 2)) * np.float32(0.16))
    veins = noise(rng, half_n, half_n, 4, 3.4, 5)
    fine = noise(rng, half_n, half_n, 9, 7, 4)
    vein = np.exp(-(((veins - 0.5) / 0.014) ** 2)) * np.float32(0.50) + np.exp(
        -(((fine - 0.47) / 0.012) ** 2)
    ) * np.float32(0.22)
    vein = np.clip(resize(vein, n, n), 0, 1)
    half = max(0.30, stage.product.width_px / n / 2 + 0.075)
    _cylinder(
        stage, wall, at - stage.side * (half + 0.10), stage.baseline - 0.055, 0.115, 0.10, palette.accents[0], None
    )
    _cylinder(
        stage, wall, at + stage.side * (half + 0.06), stage.baseline + 0.045, 0.105, 0.2, palette.accents[1], None
    )
    _cylinder(
        stage, wall, at, stage.baseline - 0.6 * _LID_FLATNESS * half, half, 0.3, palette.tint("f3f0ea", 0.6), vein
    )
    return Backdrop(np.clip(wall, 0, 1), gloss=0.10)


def _cylinder(
    stage: Stage,
    canvas: Floats,
    at_x: float,
    top: float,
    radius: float,
    tall: float,
    colour: Floats,
    vein: Floats | None,
) -> None:
    """Paint a standing cylinder whose top is an ellipse around (``top``, ``at_x``), with its shadow on the floor."""
    n = canvas.shape[0]
    flat = radius * _LID_FLATNESS
    rows = slice(max(0, int((top - 2 * flat) * n)), min(n, int((top + tall + 3.5 * flat) * n) + 2))
    columns = slice(max(0, int((at_x - 3.4 * radius) * n)), min(n, int((at_x + 3.4 * radius) * n) + 2))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    whole_y, whole_x = stage.near_grid()
    y, x, canvas = whole_y[rows], whole_x[:, columns], canvas[rows, columns]
    across = (x - at_x) / radius
    rim = flat * np.sqrt(np.clip(1 - across**2, 0, 1))
    shadow = glow(y, x, top + tall + 0.01, at_x - stage.side * radius * 0.5, flat * 1.1, radius * 1.25)
    shade(canvas, shadow * np.float32(0.38))
    inside = smoothstep(1 + 1.2 / (radius * n), 1 - 1.2 / (radius * n), np.abs(across))
    side_mask = inside * smoothstep(-1 / n, 1 / n, y - top) * smoothstep(1 / n, -1 / n, y - top - tall - rim)
    curve = np.clip(0.80 + 0.30 * across * stage.side - 0.34 * across**2, 0.25, 1.15)
    body = np.clip(colour * np.broadcast_to(curve, y.shape[:1] + x.shape[1:])[..., None], 0, 1)
    lid = np.clip(colour * np.float32(1.04) + np.float32(0.05), 0, 1)
    top_mask = smoothstep(1 + 1.5 / (flat * n), 1 - 1.5 / (flat * n), np.sqrt(across**2 + ((y - top) / flat) ** 2))
    canvas += (body - canvas) * side_mask[..., None]
    if vein is not None:
        shade(canvas, vein[rows, columns] * side_mask * np.float32(0.8))
    canvas += (lid - canvas) * top_mask[..., None]
    if vein is not None:
        squeezed = resize(np.ascontiguousarray(vein[: n // 2]), n // 4, n)
        lines = (np.arange(rows.start, rows.stop) + int(top * n)) % squeezed.shape[0]
        shade(canvas, squeezed[lines, columns] * top_mask * np.float32(0.55))
    edge = np.exp(-(((np.sqrt(across**2 + ((y - top) / flat) ** 2) - 1) * flat * n / 1.6) ** 2)) * smoothstep(
        -0.2, 0.5, (y - top) / flat
    )
    screen(canvas, stage.palette.at(1.0), edge * np.float32(0.35))
