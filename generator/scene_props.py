"""Props: what stands, hangs or flies beside the product. None ever covers it: the product is pasted last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from generator.palette import Floats
from generator.scene import Stage
from generator.scene_brush import blur, glow, noise, polygon, resize, screen, shade, smoothstep


def green_plants(stage: Stage, canvas: Floats) -> None:
    """Hang long leaves into the corners: sharp ones beside the product, blurred ones close to the lens."""
    rng, palette = stage.rng, stage.palette
    lush, pale = palette.tint("2f6b3c", 0.8), palette.tint("8cbf6a", 0.8)
    sides = (-1, 1) if abs(stage.focus_x - 0.5) < 0.1 else ((1,) if stage.focus_x < 0.5 else (-1,))
    for sign in sides:
        root_x = 0.5 + sign * 0.53
        root_y = stage.baseline + 0.015
        n_stems = 8 if len(sides) == 1 else 6
        for i in range(n_stems):
            rise = np.deg2rad(22 + 112 * (i + rng.uniform(0, 0.8)) / n_stems)
            length = rng.uniform(0.24, 0.42) * (1.2 if len(sides) == 1 else 1.0)
            _frond(stage, canvas, (root_x, root_y), -sign * float(np.cos(rise)), -float(np.sin(rise)), length)
    corner = -stage.side
    dark = np.zeros((stage.far_px, stage.far_px, 4), dtype=np.float32)
    for i in range(6):
        angle = np.deg2rad(10 + 15 * i + rng.uniform(-5, 5))
        start = (0.5 + corner * 0.58, -0.05)
        end = (start[0] - corner * np.cos(angle) * 0.40, start[1] + np.sin(angle) * 0.34)
        _leaf_mask(stage, dark, start, end, 0.045, lush * np.float32(0.65), pale * np.float32(0.75))
    veil = np.clip(resize(blur(dark, 0.010 * stage.far_px), stage.size_px, stage.size_px), 0, 1)
    alpha = veil[..., 3:]
    canvas += veil[..., :3] - canvas * alpha  # premultiplied


def _frond(stage: Stage, canvas: Floats, root: tuple[float, float], right: float, down: float, length: float) -> None:
    """Paint a stem that bends under its weight, with a leaf at its tip and pairs of them along it, back ones first."""
    rng, palette = stage.rng, stage.palette
    lush, pale = palette.tint("24562f", 0.8), palette.tint("8cbf6a", 0.8)
    n_pairs = 6
    sag = rng.uniform(0.10, 0.22)

    def at(part: float) -> tuple[float, float]:
        return root[0] + right * length * part, root[1] + down * length * part * 1.1 + sag * length * part**2

    depth = np.float32(rng.uniform(0.62, 1.0))  # stems further back get less light
    lush, pale = lush * depth, pale * depth
    _leaf(stage, canvas, root, at(0.98), 0.0035, lush, lush)
    for k in range(1, n_pairs + 1):
        place, ahead = at(k / (n_pairs + 0.6)), at(k / (n_pairs + 0.6) + 0.05)
        heading = float(np.arctan2(ahead[1] - place[1], ahead[0] - place[0]))
        size = length * (0.40 - 0.035 * k) * rng.uniform(0.85, 1.15)
        for turn in (-0.85, 0.85):
            angle = heading + turn * rng.uniform(0.85, 1.15)
            tip = (place[0] + size * float(np.cos(angle)), place[1] + size * float(np.sin(angle)))
            shine = np.float32(rng.uniform(0.82, 1.15))
            _leaf(stage, canvas, place, tip, size * rng.uniform(0.15, 0.20), lush * shine, np.clip(pale * shine, 0, 1))
    _leaf(stage, canvas, at(0.9), at(1.18), length * 0.045, lush, pale)


def _leaf_field(
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    root: tuple[float, float],
    tip: tuple[float, float],
    half: float,
) -> tuple[Floats, Floats, Floats]:
    """Return along (0 root, 1 tip), across (-1, 1 at the edges) and the mask of a bent leaf inside a pixel box."""
    top, bottom, left, right = box
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / height
    x = (np.arange(left, right, dtype=np.float32) + 0.5)[None, :] / width
    dx, dy = tip[0] - root[0], tip[1] - root[1]
    length = float(np.hypot(dx, dy))
    along = ((x - root[0]) * dx + (y - root[1]) * dy) / np.float32(length**2)
    away = (-(x - root[0]) * dy + (y - root[1]) * dx) / np.float32(length)
    bend = np.float32(0.16 * length * np.sign(dx)) * along * along
    inside = np.clip(along, 0, 1)
    breadth = np.float32(half) * np.maximum(np.sin(np.pi * inside**0.8), 0) ** 0.85 + np.float32(1e-4)
    across = (away - bend) / breadth
    soft = np.clip(1.2 / (breadth * width), 0.02, 1)
    mask = np.clip((1 - np.abs(across)) / soft, 0, 1) * (along > 0) * (along < 1)
    return along.astype(np.float32), across.astype(np.float32), mask.astype(np.float32)


def _leaf_box(
    n: int, root: tuple[float, float], tip: tuple[float, float], half: float
) -> tuple[int, int, int, int] | None:
    reach = half + 0.2 * float(np.hypot(tip[0] - root[0], tip[1] - root[1]))
    top, bottom = max(0, int((min(root[1], tip[1]) - reach) * n)), min(n, int((max(root[1], tip[1]) + reach) * n))
    left, right = max(0, int((min(root[0], tip[0]) - reach) * n)), min(n, int((max(root[0], tip[0]) + reach) * n))
    return (top, bottom, left, right) if top < bottom and left < right else None


def _leaf_colour(stage: Stage, along: Floats, across: Floats, lush: Floats, pale: Floats) -> Floats:
    veins = 0.5 + 0.5 * np.cos((along * 16 - np.abs(across) * 2.4) * 2 * np.pi)
    lit = np.clip(0.30 + 0.25 * across * stage.side + 0.28 * along + 0.14 * veins, 0, 1)
    lit += np.float32(0.35) * np.exp(-((across / 0.06) ** 2))
    colour: Floats = (lush + (pale - lush) * np.clip(lit, 0, 1.1)[..., None]).astype(np.float32)
    return colour


def _leaf(
    stage: Stage,
    canvas: Floats,
    root: tuple[float, float],
    tip: tuple[float, float],
    half: float,
    lush: Floats,
    pale: Floats,
) -> None:
    n = canvas.shape[0]
    box = _leaf_box(n, root, tip, half)
    if box is None:
        return
    along, across, mask = _leaf_field(n, n, box, root, tip, half)
    patch = canvas[box[0] : box[1], box[2] : box[3]]
    patch += (_leaf_colour(stage, along, across, lush, pale) - patch) * mask[..., None]


def _leaf_mask(
    stage: Stage,
    layer: Floats,
    root: tuple[float, float],
    tip: tuple[float, float],
    half: float,
    lush: Floats,
    pale: Floats,
) -> None:
    """Paint a leaf on a premultiplied RGBA layer (it will be blurred)."""
    n = layer.shape[0]
    box = _leaf_box(n, root, tip, half)
    if box is None:
        return
    along, across, mask = _leaf_field(n, n, box, root, tip, half)
    colour = _leaf_colour(stage, along, across, lush, pale)
    patch = layer[box[0] : box[1], box[2] : box[3]]
    patch *= (1 - mask)[..., None]
    patch += np.concatenate([colour, np.ones_like(colour[..., :1])], axis=2) * mask[..., None]


def _beside(stage: Stage, count: int, reach: float) -> list[tuple[float, float]]:
    """Return (x, floor y) of places beside the product, alternating sides and starting opposite the light."""
    n = stage.size_px
    left, right = stage.product.left / n, stage.product.right / n
    places = []
    for i in range(count):
        sign = -stage.side if i % 2 == 0 else stage.side
        room = left if sign < 0 else 1 - right
        if room < 0.10:
            sign, room = -sign, (1 - right if sign < 0 else left)
        step = (i // 2) * reach + reach * 0.55 + stage.rng.uniform(-0.01, 0.02)
        edge = left if sign < 0 else right
        at_x = min(max(edge + sign * step, 0.02), 0.98)
        places.append((at_x, stage.baseline + stage.rng.uniform(-0.055, 0.035)))
    return sorted(places, key=lambda place: place[1])


def glossy_spheres(stage: Stage, canvas: Floats) -> None:
    """Set polished spheres on the floor beside the product, shaded by the key light, mirroring the sky."""
    rng = stage.rng
    hues = (*stage.palette.accents, stage.palette.at(0.85))
    for i, (at_x, foot) in enumerate(_beside(stage, 5, 0.155)):
        radius = rng.uniform(0.048, 0.092)
        _sphere(stage, canvas, at_x, foot, radius, hues[(i + int(rng.integers(0, 2))) % len(hues)])


def _sphere(stage: Stage, canvas: Floats, at_x: float, foot: float, radius: float, hue: Floats) -> None:
    n = canvas.shape[0]
    centre_y = foot - radius
    reach = radius * 2.4
    top, bottom = max(0, int((centre_y - reach) * n)), min(n, int((centre_y + reach) * n))
    left, right = max(0, int((at_x - reach) * n)), min(n, int((at_x + reach) * n))
    if top >= bottom or left >= right:
        return
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / n - centre_y) / radius
    x = ((np.arange(left, right, dtype=np.float32) + 0.5)[None, :] / n - at_x) / radius
    patch = canvas[top:bottom, left:right]
    if foot > stage.horizon + 0.05:
        shade(patch, glow(y, x, 1.0, -0.45 * stage.side, 0.20, 1.05) * np.float32(0.60))
    square = x * x + y * y
    depth = np.sqrt(np.clip(1 - square, 0, 1))
    mask = smoothstep(1 + 1.2 / (radius * n), 1 - 1.2 / (radius * n), np.sqrt(square))
    diffuse = np.clip(0.55 * stage.side * x - 0.62 * y + 0.56 * depth, 0, 1)
    bounce = np.clip(y, 0, 1) * np.float32(0.22)
    colour = hue * (0.24 + 0.86 * diffuse + bounce)[..., None]
    sky = smoothstep(-0.15, -0.75, y) * depth * np.float32(0.30)
    spot = np.exp(-(((x - 0.36 * stage.side) / 0.17) ** 2) - (((y + 0.46) / 0.13) ** 2))
    colour += (1 - colour) * np.clip(sky + spot + np.float32(0.35) * (1 - depth) ** 3, 0, 1)[..., None]
    patch += (np.clip(colour, 0, 1) - patch) * mask[..., None]


def gift_boxes(stage: Stage, canvas: Floats) -> None:
    """Stack wrapped boxes with a ribbon beside the product."""
    rng = stage.rng
    accents = stage.palette.accents
    light = stage.palette.at(0.95)
    pairs = ((accents[0], light), (light, accents[0]), (accents[1], light), (accents[2], accents[1]))
    for i, (at_x, foot) in enumerate(_beside(stage, 4, 0.175)):
        side = rng.uniform(0.095, 0.150)
        paper, ribbon = pairs[(i + int(rng.integers(0, 2))) % len(pairs)]
        _gift(stage, canvas, at_x, foot, side, side * rng.uniform(0.7, 1.1), paper, ribbon)
        if rng.random() < 0.45:
            small = side * 0.62
            _gift(stage, canvas, at_x + rng.uniform(-0.01, 0.01), foot - side * 0.86, small, small * 0.7, ribbon, paper)


def _gift(
    stage: Stage, canvas: Floats, at_x: float, foot: float, wide: float, tall: float, paper: Floats, ribbon: Floats
) -> None:
    """Paint one box in three-quarter view: two sides, a lid, a ribbon around it and a bow."""
    n = canvas.shape[0]
    span = wide * 1.5
    top, bottom = int((foot - tall - span) * n), int((foot + span * 0.45) * n)
    left, right = int((at_x - span) * n), int((at_x + span) * n)
    height, width = bottom - top, right - left

    def face(points: list[tuple[float, float]]) -> Floats:
        return polygon(height, width, [((px * n - left) / width, (py * n - top) / height) for px, py in points])

    turn, drop = wide * 0.56, wide * 0.17
    a, b, c = (at_x - turn, foot - drop), (at_x, foot), (at_x + turn, foot - drop)  # lower edge, left to right
    d = (at_x, foot - 2 * drop)

    def up(point: tuple[float, float], by: float = tall) -> tuple[float, float]:
        return point[0], point[1] - by

    def mid(p: tuple[float, float], q: tuple[float, float], part: float) -> tuple[float, float]:
        return p[0] + (q[0] - p[0]) * part, p[1] + (q[1] - p[1]) * part

    lit_left = stage.side < 0
    tones = (0.98, 0.66) if lit_left else (0.66, 0.98)
    layers: list[tuple[list[tuple[float, float]], Floats]] = []
    for colour, (low, high) in ((paper, (0.0, 1.0)), (ribbon, (0.42, 0.58))):
        layers.append(
            ([mid(a, b, low), mid(a, b, high), up(mid(a, b, high)), up(mid(a, b, low))], colour * np.float32(tones[0]))
        )
        layers.append(
            ([mid(b, c, low), mid(b, c, high), up(mid(b, c, high)), up(mid(b, c, low))], colour * np.float32(tones[1]))
        )
        lid = np.clip(colour * np.float32(1.06) + np.float32(0.04), 0, 1)
        layers.append(([up(mid(a, b, low)), up(mid(a, b, high)), up(mid(d, c, high)), up(mid(d, c, low))], lid))
        if colour is ribbon:
            layers.append(([up(mid(b, c, low)), up(mid(b, c, high)), up(mid(a, d, high)), up(mid(a, d, low))], lid))
    y0, y1, x0, x1 = max(top, 0), min(bottom, n), max(left, 0), min(right, n)
    if y0 >= y1 or x0 >= x1:
        return
    patch = canvas[y0:y1, x0:x1]
    crop = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    shadow_x = -stage.side * wide * 0.35
    ground = face(
        [
            (a[0] + shadow_x, a[1]),
            (b[0] + shadow_x * 0.3, b[1] + 0.004),
            (c[0] + shadow_x, c[1]),
            (d[0] + shadow_x, d[1]),
        ]
    )
    shade(patch, blur(ground, 0.012 * n)[crop] * np.float32(0.62))
    for points, colour in layers:
        mask = face(points)[crop]
        fall = np.linspace(1.05, 0.86, height, dtype=np.float32)[crop[0], None, None]
        patch += (np.clip(colour * fall, 0, 1) - patch) * mask[..., None]
    knot_x, knot_y = at_x, foot - tall - drop
    for sign in (-1, 1):
        tip = (knot_x + sign * wide * 0.30, knot_y - wide * 0.20)
        _leaf(
            stage,
            canvas,
            (knot_x, knot_y),
            tip,
            wide * 0.10,
            ribbon * np.float32(0.6),
            np.clip(ribbon * np.float32(1.15), 0, 1),
        )


def silk_ribbons(stage: Stage, canvas: Floats) -> None:
    """Let wide bands of silk flow across the picture behind the product, shaded along their folds."""
    rng, n = stage.rng, stage.size_px
    y, x = stage.near_grid()
    across = x[0]
    for i, hue in enumerate((stage.palette.accents[1], stage.palette.accents[0], stage.palette.at(0.9))):
        phase, pitch = rng.uniform(0, 6.3), rng.uniform(4.5, 7.5)
        height = stage.baseline - 0.40 + 0.155 * i + rng.uniform(-0.03, 0.03)
        middle = height + 0.085 * np.sin(across * pitch + phase) + 0.05 * stage.side * (across - 0.5) * 4
        twist = np.sin(across * pitch * 0.83 + phase * 1.7 + i)
        half = 0.010 + 0.042 * np.abs(twist) ** 0.8
        first = max(0, int((float((middle - half).min()) - 0.03) * n))
        last = min(n, int((float((middle + half).max()) + 0.05) * n))
        if first >= last:
            continue
        rows = y[first:last]
        patch = canvas[first:last]
        offset = (rows - middle[None, :].astype(np.float32)) / half[None, :].astype(np.float32)
        mask = smoothstep(1.06, 0.94, np.abs(offset))
        fold = np.float32(0.5) + np.float32(0.5) * np.sin(
            offset * 2.6 + (twist * 2.2)[None, :].astype(np.float32) + x * 9
        )
        sheen = np.exp(-(((offset - 0.35 * np.sign(twist)[None, :]) / 0.26) ** 2)).astype(np.float32)
        tone = 0.46 + 0.50 * fold * (0.55 + 0.45 * np.abs(twist))[None, :].astype(np.float32)
        colour = hue * tone[..., None]
        colour += (1 - colour) * (sheen * np.float32(0.34))[..., None]
        shadow = np.roll(mask, (int(0.018 * n), int(-0.012 * stage.side * n)), axis=(0, 1))
        shade(patch, blur(np.ascontiguousarray(shadow), 0.010 * n) * np.float32(0.30))
        patch += (np.clip(colour, 0, 1) - patch) * mask[..., None]


def confetti(stage: Stage, canvas: Floats) -> None:
    """Let paper confetti fall: some pieces in focus, some near the lens and blurred, some on the floor."""
    rng, n = stage.rng, stage.size_px
    hues = (*stage.palette.accents, stage.palette.at(0.95), stage.palette.at(0.7))
    for i in range(150):
        near = (i / 150) ** 2.2
        size = 0.007 + 0.018 * near
        at_x, at_y = rng.random(), rng.random() ** 1.25 * 0.97
        tilt, squash = rng.uniform(0, np.pi), rng.uniform(0.25, 1.0)
        if at_y > stage.horizon + 0.14:
            squash, size = 0.35, size * 0.8
        soft = np.float32(0.10 + 0.9 * max(near - 0.45, 0))
        reach = size * (1.3 + float(soft))
        top, bottom = max(0, int((at_y - reach) * n)), min(n, int((at_y + reach) * n) + 2)
        left, right = max(0, int((at_x - reach) * n)), min(n, int((at_x + reach) * n) + 2)
        y = ((np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / n - at_y) / size
        x = ((np.arange(left, right, dtype=np.float32) + 0.5)[None, :] / n - at_x) / size
        u = np.abs(x * np.cos(tilt) + y * np.sin(tilt))
        v = np.abs(-x * np.sin(tilt) + y * np.cos(tilt)) / squash
        edge = float(soft) + 1.0 / (size * n)
        mask = smoothstep(1 + edge / 2, 1 - edge / 2, np.maximum(u, v * 0.9)) * np.float32(1 - 0.45 * near)
        colour = np.clip(hues[int(rng.integers(0, len(hues)))] * np.float32(rng.uniform(0.72, 1.12)), 0, 1)
        patch = canvas[top:bottom, left:right]
        patch += (colour - patch) * mask[..., None]


def no_props(stage: Stage, canvas: Floats) -> None:
    """Leave the scene as it is, with a breath of haze where the product meets the ground."""
    y, x = stage.near_grid()
    drift = noise(stage.rng, 64, 64, 3, 3, 2)
    veil = resize(drift, stage.size_px, stage.size_px) * glow(y, x, stage.horizon + 0.02, stage.focus_x, 0.10, 0.6)
    screen(canvas, stage.palette.at(0.95), veil * np.float32(0.16))


Dresser = Callable[[Stage, Floats], None]
"""Paints one kind of prop on the finished scene."""

DRESSERS: Final[dict[str, Dresser]] = {
    "no props": no_props,
    "green plants": green_plants,
    "glossy spheres": glossy_spheres,
    "gift boxes": gift_boxes,
    "silk ribbons": silk_ribbons,
    "confetti": confetti,
}
"""Prop painter by slot word."""
