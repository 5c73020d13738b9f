"""Scenes that people built: street, kitchen, studio, sports field, living room, podium, and plain lights."""

from __future__ import annotations

import numpy as np

from generator.palette import Floats
from generator.scene import Backdrop, Stage
from generator.scene_brush import (
    band,
    blur,
    discs,
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


def city_street_at_night(stage: Stage) -> Backdrop:
    """Paint a street at night: lit windows, lamps out of focus, and the wet road that mirrors them."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    horizon = stage.horizon
    canvas = gradient(
        n, n, [(0, palette.tint("0a1024")), (horizon, palette.tint("3a3a66")), (1, palette.tint("11131f"))]
    )
    screen(canvas, palette.accents[2], glow(y, x, 0.2, 0.5, 0.5, 0.6) * np.float32(0.22))
    screen(canvas, palette.tint("ff9e5c", 0.7), glow(y, x, horizon - 0.02, 0.5, 0.20, 0.40) * np.float32(0.75))
    for layer in range(3):
        near = layer / 2
        edge = -0.05
        while edge < 1.05:
            width = rng.uniform(0.07, 0.13) * (1 + 0.9 * near)
            open_sky = abs(edge + width / 2 - 0.5) * 2
            roof = horizon - (0.16 + 0.50 * open_sky * (0.4 + 0.6 * near) + rng.uniform(-0.05, 0.10))
            if near == 0 or open_sky > 0.42 * near + 0.15:
                wall = band(y, x, roof, horizon + 0.02, edge, edge + width, 0.6 / n)
                colour = palette.tint("1a2038", 0.6) * np.float32(0.95 - 0.4 * near)
                colour = colour + palette.at(0.5) * np.float32(0.20 - 0.12 * near)
                over(canvas, colour, wall)
                _windows(stage, canvas, roof, horizon - 0.05, edge, edge + width, 0.010 + 0.006 * near)
            edge += width + rng.uniform(0.0, 0.02)
        # Street level glows in two colours, as shop fronts and signs do.
    for hue, at in ((palette.accents[0], 0.5 - 0.34 * stage.side), (palette.accents[1], 0.5 + 0.34 * stage.side)):
        screen(canvas, hue, glow(y, x, horizon - 0.05, at, 0.17, 0.22) * np.float32(0.55))
    far = blur(canvas, 0.007 * n * stage.layout.depth_blur)
    count = 54
    depth = np.sort(rng.random(count).astype(np.float32))
    lane = np.where(rng.random(count) < 0.5, -1, 1).astype(np.float32)
    at_x = 0.5 + lane * (0.06 + 0.50 * depth) + rng.normal(0, 0.02, count).astype(np.float32)
    at_y = horizon - 0.025 - depth * rng.uniform(-0.03, 0.42, count).astype(np.float32)
    hues = np.stack([palette.accents[0], palette.accents[1], palette.at(0.92), palette.tint("ffb45c", 0.9)])
    colours = hues[rng.integers(0, 4, count)]
    radii = (0.010 + 0.034 * depth * rng.uniform(0.5, 1.2, count)).astype(np.float32)
    discs(far, np.stack([at_y, at_x], axis=1), radii, colours, rng.uniform(0.5, 1.0, count).astype(np.float32))
    cars = rng.integers(3, 6)
    for _ in range(int(cars)):
        car_x, size = 0.5 + rng.uniform(-0.25, 0.25), rng.uniform(0.006, 0.014)
        colour = palette.at(1.0) if car_x < 0.5 else palette.tint("ff3b30", 0.95)
        pair = np.array([[horizon + 0.012, car_x - 0.022], [horizon + 0.012, car_x + 0.022]], dtype=np.float32)
        two = np.ones(2, dtype=np.float32)
        discs(far, pair, two * np.float32(size), np.stack([colour, colour]), two * np.float32(0.95))
    picture = np.clip(resize(far, stage.size_px, stage.size_px), 0, 1)

    m = stage.size_px
    first, forward, sideways = floor_map(m, m, horizon)
    rows = m - first
    source = np.clip(first - 1 - (np.arange(rows) * 0.95).astype(np.int64), 0, m - 1)
    streaks = blur(resize(np.ascontiguousarray(picture[source]), max(8, rows // 8), m), 1.2)
    mirrored = np.clip(resize(streaks, rows, m), 0, 1)
    ripple = tiled(noise(rng, 256, 256, 30, 12, 3), forward * np.float32(2.2), sideways * np.float32(1.1))
    wet = smoothstep(0.30, 0.66, noise(rng, rows, m, 4, 4, 3)) * np.float32(0.55) + np.float32(0.35)
    road = palette.tint("14161f", 0.6) * np.float32(0.55) * (0.8 + 0.5 * ripple)[..., None]
    picture[first:] = road + mirrored * (wet * (0.72 + 0.56 * ripple))[..., None] * (1 - road)
    return Backdrop(np.clip(picture, 0, 1), gloss=0.30)


def _windows(stage: Stage, canvas: Floats, top: float, bottom: float, left: float, right: float, pitch: float) -> None:
    """Light some windows of a house front, in a grid of the given pitch."""
    n = canvas.shape[0]
    rng = stage.rng
    hues = (stage.palette.tint("ffc873", 0.85), stage.palette.at(0.85), stage.palette.accents[1])
    rows = np.arange(top + pitch, bottom - pitch, pitch * 1.9)
    columns = np.arange(left + pitch, right - pitch * 0.7, pitch * 1.5)
    lit = rng.random((len(rows), len(columns))) < 0.46
    for i, j in np.argwhere(lit):
        y0, x0 = int(rows[i] * n), int(columns[j] * n)
        if y0 < 0 or x0 < 0 or x0 >= n:
            continue
        tall, wide = max(1, int(pitch * n)), max(1, int(pitch * n * 0.7))
        canvas[y0 : y0 + tall, x0 : x0 + wide] = hues[int(rng.integers(0, 3))] * np.float32(rng.uniform(0.6, 1.1))


def modern_kitchen(stage: Stage) -> Backdrop:
    """Paint a kitchen out of focus, tiles, shelf, window and lamps, behind a stone worktop."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    counter = stage.horizon + 0.07
    canvas = gradient(n, n, [(0, palette.tint("cbc2b2")), (1, palette.tint("b5aa98"))])
    rows = (y * 22).astype(np.int32)
    brick_x = x * 11 + 0.5 * (rows % 2)
    joint: Floats = np.maximum(
        smoothstep(0.86, 0.99, np.abs((y * 22 % 1) * 2 - 1)), smoothstep(0.93, 0.99, np.abs((brick_x % 1) * 2 - 1))
    )
    tone: Floats = rng.random((32, 16), dtype=np.float32)[np.broadcast_to(rows, (n, n)), brick_x.astype(np.int32)]
    tiles = band(y, x, 0.20, counter, -1, 2, 0.002)
    over(canvas, palette.tint("d8d1c4"), tiles)
    shade(canvas, tiles * (tone * np.float32(0.14) + joint * np.float32(0.26)))
    over(canvas, palette.tint("3f5a60", 0.7), band(y, x, -0.1, 0.19, -1, 2, 0.002))  # wall cupboards
    for edge in np.arange(0.02, 1.0, 0.245):
        shade(canvas, band(y, x, -0.1, 0.19, edge, edge + 0.004, 0.002) * np.float32(0.5))
        over(canvas, palette.tint("d8b36a", 0.9), band(y, x, 0.135, 0.165, edge + 0.02, edge + 0.026, 0.002))
    shade(canvas, np.exp(-np.maximum(y - 0.19, 0) * 16) * band(y, x, 0.19, 1, -1, 2, 0.002) * np.float32(0.42))
    window_x = 0.13 if stage.side < 0 else 0.62
    window = band(y, x, 0.235, counter - 0.085, window_x, window_x + 0.26, 0.002)
    over(canvas, palette.at(0.99), window)
    garden = noise(rng, n, n, 9, 9, 3)
    over(canvas, palette.tint("9cc487", 0.8), window * smoothstep(0.40, 0.60, garden) * np.float32(0.85))
    frame = window * (1 - band(y, x, 0.235, counter - 0.085, window_x + 0.125, window_x + 0.135, 0.002))
    over(canvas, palette.tint("f6f4ee"), (window - frame) * np.float32(0.9))
    screen(canvas, palette.at(1.0), glow(y, x, 0.38, window_x + 0.13, 0.24, 0.26) * np.float32(0.34))
    shelf_x = 0.52 if stage.side < 0 else 0.06
    over(canvas, palette.tint("a9743f", 0.85), band(y, x, 0.415, 0.432, shelf_x, shelf_x + 0.40, 0.001))
    shade(canvas, band(y, x, 0.432, 0.46, shelf_x, shelf_x + 0.40, 0.006) * np.float32(0.25))
    _jars(stage, canvas, 0.415, shelf_x + 0.02, shelf_x + 0.38, 0.10)
    _jars(stage, canvas, counter, 0.60 if stage.side < 0 else 0.03, 0.97 if stage.side < 0 else 0.36, 0.15)
    for lamp in (0.30, 0.70):
        over(canvas, palette.tint("1d1d1f"), band(y, x, -1, 0.10, lamp - 0.002, lamp + 0.002, 0.001))
        over(canvas, palette.accents[1], glow(y, x, 0.125, lamp, 0.035, 0.05) ** 2)
        screen(canvas, palette.tint("ffe2a8", 0.9), glow(y, x, 0.17, lamp, 0.10, 0.13) * np.float32(0.6))
    picture = stage.defocus(canvas, 0.0072)

    m = stage.size_px
    near_y, _ = stage.near_grid()
    first = int(counter * m)
    veins = noise(rng, m - first, m, 2, 3, 6)
    broken = smoothstep(0.42, 0.66, noise(rng, m - first, m, 4, 7, 2))
    vein = np.exp(-np.abs(veins - 0.5) / 0.012) * np.float32(0.34) * broken + (veins - 0.35).clip(0, 1) * np.float32(
        0.16
    )
    stone, far_stone = palette.tint("dcd7ce", 0.6), palette.tint("bdb6a9", 0.6)
    part = np.clip((near_y[first:] - counter) / 0.22, 0, 1)[..., None]
    top = np.broadcast_to(far_stone + (stone - far_stone) * part, (m - first, m, 3)).copy()
    shade(top, vein)
    mirrored = (
        blur(np.ascontiguousarray(picture[first - 1 : 2 * first - m - 1 : -1]), 9) if 2 * first - m - 1 >= 0 else top
    )
    fade = np.exp(-np.maximum(near_y[first:] - counter, 0) * 7)[..., None] * np.float32(0.55)
    top += (mirrored[: m - first] - top) * fade
    edge = smoothstep(0, 1.5 / m, near_y[first:] - counter)
    view = picture[first:]
    view += (top - view) * edge[..., None]
    return Backdrop(np.clip(picture, 0, 1), gloss=0.16)


def _jars(stage: Stage, canvas: Floats, base: float, left: float, right: float, tall: float) -> None:
    """Set jars, bottles and bowls side by side, with their feet at ``base``."""
    y, x = stage.far_grid()
    rng, palette = stage.rng, stage.palette
    hues = (*palette.accents, palette.at(0.25), palette.at(0.9), palette.tint("b9854f", 0.8))
    at = left
    while at < right - 0.03:
        width = rng.uniform(0.030, 0.065)
        height = tall * rng.uniform(0.45, 1.0)
        colour = hues[int(rng.integers(0, len(hues)))]
        body = band(y, x, base - height, base, at, at + width, 0.004)
        round_shade = 1 - np.float32(0.55) * ((x - at - width / 2) / (width / 2) + 0.4 * stage.side * -1) ** 2
        canvas += (colour * np.clip(round_shade, 0.35, 1)[..., None] - canvas) * body[..., None]
        if rng.random() < 0.5:
            neck = band(y, x, base - height * 1.35, base - height, at + width * 0.34, at + width * 0.66, 0.003)
            over(canvas, colour * np.float32(0.8), neck)
        at += width + rng.uniform(0.008, 0.03)


def photo_studio(stage: Stage) -> Backdrop:
    """Paint a seamless backdrop with a pool of light, and the shadow of a window or of leaves on it."""
    palette, rng = stage.palette, stage.rng
    n = stage.size_px
    y, x = stage.near_grid()
    horizon = stage.horizon + 0.04
    hue = palette.accents[int(rng.integers(0, 3))]
    wall = palette.at(0.62) * np.float32(0.55) + hue * np.float32(0.45)
    light = wall + (palette.at(1.0) - wall) * np.float32(0.55)
    canvas = gradient(n, n, [(0, wall * np.float32(0.86)), (horizon, wall), (horizon + 0.10, light), (1, wall)])
    screen(canvas, palette.at(0.98), glow(y, x, 0.40, stage.focus_x, 0.36, 0.40) * np.float32(0.55))
    small = stage.far_px
    far_y, far_x = stage.far_grid()
    gobo = np.zeros((small, small), dtype=np.float32)
    lean = np.float32(0.35 * stage.side)
    if rng.random() < 0.5:
        u = far_x + lean * (far_y - 0.4)
        start = 0.08 if stage.side < 0 else 0.48
        for i in range(3):
            for j in range(3):
                top, left = 0.06 + 0.185 * i, start + 0.150 * j
                gobo += band(far_y, u, top, top + 0.165, left, left + 0.130, 0.004)
    else:
        for i in range(9):
            slat = 0.05 + 0.062 * i
            gobo += band(far_y + lean * far_x * np.float32(0.5), far_x, slat, slat + 0.036, -1, 2, 0.006)
    gobo = np.clip(gobo, 0, 1) * smoothstep(horizon + 0.06, horizon - 0.20, far_y)
    lit = resize(blur(gobo, 0.010 * small), n, n)
    screen(canvas, palette.at(1.0), np.clip(lit, 0, 1) * np.float32(0.38))
    if rng.random() < 0.5:
        over(canvas, hue, _disc(y, x, 0.45, stage.focus_x, 0.30) * np.float32(0.55))
    return Backdrop(np.clip(canvas, 0, 1), gloss=0.12)


def _disc(y: Floats, x: Floats, at_y: float, at_x: float, radius: float) -> Floats:
    distance = np.sqrt((y - np.float32(at_y)) ** 2 + (x - np.float32(at_x)) ** 2)
    return smoothstep(radius + 0.002, radius - 0.002, distance)


def sports_field(stage: Stage) -> Backdrop:
    """Paint a stadium: stands with a crowd, floodlights, mown stripes and chalk lines."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    horizon = stage.horizon - 0.06
    canvas = gradient(
        n, n, [(0, palette.tint("16345e")), (horizon * 0.7, palette.tint("6f9fc8")), (1, palette.tint("d6e4ea"))]
    )
    curve = ((x - 0.5) ** 2) * np.float32(0.30)
    stand = smoothstep(-0.004, 0.004, y - (horizon - 0.27 - curve))
    crowd = rng.random((n // 2, n // 2), dtype=np.float32)
    crowd = resize(crowd, n, n)[..., None]
    people = palette.tint("2a3550", 0.6) + (palette.at(0.85) - palette.tint("2a3550", 0.6)) * crowd**3
    bright = rng.random((n // 2, n // 2))
    colour = (bright > 0.90)[..., None] * palette.accents[0] + (bright < 0.08)[..., None] * palette.accents[1]
    people = people + resize(colour.astype(np.float32), n, n) * np.float32(0.7)
    tiers = 0.75 + 0.25 * smoothstep(0.1, 0.3, ((y + curve) * 26) % 1)
    canvas += (people * (tiers * (0.45 + 0.5 * smoothstep(horizon - 0.3, horizon, y)))[..., None] - canvas) * stand[
        ..., None
    ]
    roof = band(y + curve, x, horizon - 0.305, horizon - 0.262, -1, 2, 0.003)
    over(canvas, palette.at(0.92), roof)
    boards = band(y, x, horizon - 0.040, horizon, -1, 2, 0.002)
    boards_hue = np.stack([palette.accents[0], palette.at(0.97), palette.accents[1], palette.at(0.2)])
    segment = (np.broadcast_to(x, (n, n)) * 6 + rng.uniform(0, 4)).astype(np.int32) % 4
    canvas += (boards_hue[segment] - canvas) * boards[..., None]
    lamps = np.array([[0.09 + 0.02 * (i % 2), 0.10 + 0.035 * i] for i in range(4)], dtype=np.float32)
    lamps = np.concatenate([lamps, lamps * np.array([1, -1], dtype=np.float32) + np.array([0, 1], dtype=np.float32)])
    discs(
        canvas, lamps, np.full(8, 0.017, np.float32), np.ones((8, 3), np.float32), np.full(8, 0.95, np.float32), rim=0
    )
    for side in (0.15, 0.85):
        screen(canvas, palette.at(1.0), glow(y, x, 0.10, side, 0.22, 0.22) * np.float32(0.6))
    picture = stage.defocus(canvas, 0.008)

    m = stage.size_px
    first, forward, sideways = floor_map(m, m, horizon)
    tile = noise(rng, 256, 256, 60, 60, 3)
    grain = tiled(tile, forward * np.float32(1.7), sideways * np.float32(1.7))
    stripes = smoothstep(-0.10, 0.10, np.sin(sideways * np.float32(3.6) + np.float32(0.8)))
    green, dark = palette.tint("6fae45", 0.85), palette.tint("3f7d2f", 0.85)
    turf = dark + (green - dark) * stripes[..., None]
    near = np.clip(np.float32(2.2) / forward, 0, 1)
    turf = turf * (1 + (grain - 0.5) * near * np.float32(0.9))[..., None]
    for place, wide in ((0.0, 0.030), (1.35 * stage.side, 0.030)):
        chalk = smoothstep(
            wide + 0.012, wide, np.abs(sideways - np.float32(place) - forward * np.float32(0.22 * stage.side))
        )
        over(turf, palette.at(1.0), chalk * np.clip(0.55 + 0.8 * (grain - 0.35), 0, 1) * np.float32(0.85))
    distance = np.clip((forward - 1) / 10, 0, 1)[..., None]
    turf += (palette.at(0.75) - turf) * distance * np.float32(0.5)
    picture[first:] = turf
    return Backdrop(np.clip(picture, 0, 1))


def bokeh_lights(stage: Stage) -> Backdrop:
    """Paint lights far out of focus over a dark, polished table that mirrors them."""
    palette, rng, n = stage.palette, stage.rng, stage.far_px
    y, x = stage.far_grid()
    table = stage.horizon + 0.06
    canvas = gradient(n, n, [(0, palette.at(0.08)), (table, palette.at(0.30)), (1, palette.at(0.10))])
    screen(canvas, palette.accents[0], glow(y, x, 0.30, 0.5 + 0.3 * stage.side, 0.35, 0.40) * np.float32(0.45))
    screen(canvas, palette.accents[2], glow(y, x, 0.45, 0.5 - 0.3 * stage.side, 0.30, 0.35) * np.float32(0.40))
    hues = np.stack([palette.at(0.95), palette.at(0.75), palette.accents[0], palette.accents[1], palette.accents[1]])
    for count, small, large, strong in ((26, 0.045, 0.105, 0.26), (44, 0.018, 0.050, 0.50), (50, 0.005, 0.014, 0.85)):
        places = np.stack([table - 0.02 - rng.random(count) ** 0.8 * table, rng.random(count)], axis=1)
        radii = rng.uniform(small, large, count) * (0.8 + 0.2 * stage.layout.depth_blur)
        strengths = strong * rng.uniform(0.35, 1.0, count)
        discs(
            canvas,
            places.astype(np.float32),
            radii.astype(np.float32),
            hues[rng.integers(0, len(hues), count)],
            strengths.astype(np.float32),
        )
    picture = np.clip(resize(blur(canvas, 0.6), stage.size_px, stage.size_px), 0, 1)
    m = stage.size_px
    near_y, _ = stage.near_grid()
    first = int(table * m)
    rows = m - first
    source = np.clip(first - 1 - np.arange(rows) * 2, 0, m - 1)
    mirrored = blur(np.ascontiguousarray(picture[source]), 5)
    grain = noise(rng, rows, m, 50, 6, 2)
    base = palette.at(0.06)
    fade = np.clip(0.75 - (near_y[first:] - table) * 0.9, 0.25, 1) * (0.85 + 0.3 * grain)
    picture[first:] = base + mirrored * (fade * np.float32(0.75))[..., None]
    screen(picture, palette.at(0.9), np.exp(-(((near_y - table) / 0.004) ** 2)) * np.float32(0.25))
    return Backdrop(np.clip(picture, 0, 1), gloss=0.34)
