"""Drawn products: cut-outs that the simulator paints itself, where no real catalogue can be had.

Two kinds of product in each of the six categories, each in four colours. Drawn at four times the size and
scaled down, so edges are smooth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWN_SIDE_PX: Final = 384
"""Side of a drawn cut-out, in pixels."""

_OVERSAMPLING: Final = 4
_CANVAS_PX: Final = 100  # the painters' own units: percent of the side

Colour = tuple[int, int, int]


def _darker(colour: Colour, share: float) -> Colour:
    return int(colour[0] * share), int(colour[1] * share), int(colour[2] * share)


class _Pen:
    """Draws shapes in percent of the side; every shape gets a highlight on its left and a shade on its right."""

    def __init__(self) -> None:
        side = DRAWN_SIDE_PX * _OVERSAMPLING
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._scale = side / _CANVAS_PX

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self._scale, y * self._scale) for x, y in points]

    def _lay(self, mask: Image.Image, colour: Colour) -> None:
        box = mask.getbbox()
        if box is None:
            return
        light = tuple(min(255, int(c + (255 - c) * 0.38)) for c in colour)
        dark = tuple(int(c * 0.55) for c in colour)
        ramp = Image.linear_gradient("L").rotate(-90).resize((box[2] - box[0], box[3] - box[1]))
        shaded = Image.composite(Image.new("RGB", ramp.size, light), Image.new("RGB", ramp.size, dark), ramp)
        self.image.paste(shaded, box[:2], mask.crop(box))

    def _mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        mask = Image.new("L", self.image.size, 0)
        return mask, ImageDraw.Draw(mask)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0) -> None:
        mask, draw = self._mask()
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        draw.rounded_rectangle((left, top, right, bottom), radius * self._scale, fill=255)
        self._lay(mask, colour)

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        mask, draw = self._mask()
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        draw.ellipse((left, top, right, bottom), fill=255)
        self._lay(mask, colour)

    def shape(self, points: list[tuple[float, float]], colour: Colour, soft: float = 0) -> None:
        mask, draw = self._mask()
        draw.polygon(self._points(points), fill=255)
        if soft:
            blurred = mask.filter(ImageFilter.GaussianBlur(soft * self._scale))
            mask = blurred.point([0] * 112 + [min(255, (v - 112) * 8) for v in range(112, 256)])
        self._lay(mask, colour)

    def arc(
        self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, colour: Colour, width: float
    ) -> None:
        mask, draw = self._mask()
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        draw.arc((left, top, right, bottom), start, end, fill=255, width=round(width * self._scale))
        self._lay(mask, colour)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        mask, draw = self._mask()
        draw.line(self._points(points), fill=255, width=round(width * self._scale), joint="curve")
        self._lay(mask, colour)


_WOOD: Final[Colour] = (164, 116, 73)
_STEEL: Final[Colour] = (190, 194, 200)
_BLACK: Final[Colour] = (38, 40, 46)
_WHITE: Final[Colour] = (240, 240, 236)


def _chair(pen: _Pen, colour: Colour) -> None:
    for x in (30, 66):
        pen.line([(x, 55), (x - 2, 95)], _WOOD, 4)
    for x in (40, 74):
        pen.line([(x, 50), (x + 2, 88)], _WOOD, 3)
    for x in (38, 60):
        pen.box(x, 40, x + 4, 52, _WOOD)
    pen.box(30, 6, 72, 44, colour, 10)
    pen.shape([(26, 56), (34, 48), (74, 48), (72, 60), (27, 62)], colour, 1.2)


def _sofa(pen: _Pen, colour: Colour) -> None:
    for x in (14, 82):
        pen.box(x, 74, x + 4, 82, _WOOD, 1)
    pen.box(12, 28, 88, 62, colour, 9)
    pen.box(14, 52, 50, 66, colour, 4)
    pen.box(50, 52, 86, 66, colour, 4)
    pen.box(10, 62, 90, 76, colour, 4)
    pen.box(5, 42, 18, 77, colour, 6)
    pen.box(82, 42, 95, 77, colour, 6)


def _table_lamp(pen: _Pen, colour: Colour) -> None:
    pen.oval(32, 86, 68, 95, colour)
    pen.oval(40, 56, 60, 91, colour)
    pen.box(48, 44, 52, 60, _STEEL, 1)
    pen.shape([(34, 8), (66, 8), (80, 46), (20, 46)], (250, 232, 190), 0.8)


def _arc_lamp(pen: _Pen, colour: Colour) -> None:
    pen.oval(54, 88, 86, 96, _BLACK)
    pen.arc(24, 8, 72, 176, 214, 360, _STEEL, 2.2)
    pen.box(69.8, 88, 72, 92, _STEEL)
    pen.shape([(21, 43), (35, 43), (42, 62), (14, 62)], colour, 1.0)
    pen.oval(22, 59, 34, 66, (255, 246, 205))


def _mug(pen: _Pen, colour: Colour) -> None:
    pen.arc(58, 32, 92, 70, -120, 120, colour, 6)
    pen.box(18, 16, 72, 88, colour, 8)
    pen.oval(18, 10, 72, 24, _WHITE)
    pen.oval(22, 12, 68, 22, (84, 54, 36))


def _kettle(pen: _Pen, colour: Colour) -> None:
    pen.arc(22, 6, 74, 66, 190, 350, _BLACK, 5)
    pen.shape([(66, 44), (92, 28), (95, 33), (72, 66)], colour, 0.8)
    pen.shape([(28, 34), (68, 34), (80, 88), (16, 88)], colour, 3)
    pen.box(30, 29, 66, 36, _STEEL, 3)
    pen.oval(44, 22, 52, 30, _BLACK)


def _phone(pen: _Pen, colour: Colour) -> None:
    pen.box(28, 4, 72, 96, _BLACK, 7)
    pen.box(30, 6, 70, 94, colour, 5)
    pen.box(44, 8, 56, 10.5, _BLACK, 1.2)
    for row in range(4):
        for column in range(3):
            x, y = 35 + 11 * column, 46 + 11 * row
            pen.box(x, y, x + 8, y + 8, _WHITE if (row + column) % 2 else _STEEL, 2)


def _headphones(pen: _Pen, colour: Colour) -> None:
    pen.arc(16, 10, 84, 96, 180, 360, _BLACK, 6)
    for x in (10, 74):
        pen.box(x, 48, x + 16, 84, colour, 7)
    for x in (22, 70):
        pen.box(x, 50, x + 8, 82, _BLACK, 4)


def _ball(pen: _Pen, colour: Colour) -> None:
    pen.oval(8, 8, 92, 92, colour)
    pen.arc(8, 8, 92, 92, 0, 360, _BLACK, 1.6)
    pen.line([(50, 8), (50, 92)], _BLACK, 1.6)
    pen.line([(8, 50), (92, 50)], _BLACK, 1.6)
    pen.arc(-40, 8, 36, 92, -47, 47, _BLACK, 1.6)
    pen.arc(64, 8, 140, 92, 133, 227, _BLACK, 1.6)


def _toy_blocks(pen: _Pen, colour: Colour) -> None:
    second, third = (colour[1], colour[2], colour[0]), (colour[2], colour[0], colour[1])
    for x, y, c in ((8, 54, colour), (50, 54, second), (29, 14, third)):
        pen.box(x, y, x + 40, y + 40, c, 4)
        pen.oval(x + 11, y + 11, x + 29, y + 29, _WHITE)


def _handbag(pen: _Pen, colour: Colour) -> None:
    pen.arc(28, 6, 72, 70, 180, 360, _WOOD, 4)
    pen.shape([(16, 40), (84, 40), (92, 90), (8, 90)], colour, 2)
    pen.shape([(15, 40), (85, 40), (72, 64), (28, 64)], _darker(colour, 0.8), 1)
    pen.box(46, 60, 54, 69, (214, 178, 84), 1.5)


def _sneaker(pen: _Pen, colour: Colour) -> None:
    pen.shape([(8, 34), (30, 32), (46, 50), (84, 60), (95, 72), (94, 80), (8, 80)], colour, 2)
    pen.box(6, 76, 96, 86, _WHITE, 4)
    for step in range(4):
        x, y = 34 + 7 * step, 43 + 4 * step
        pen.line([(x, y), (x + 9, y - 4)], _WHITE, 2)
    pen.shape([(8, 34), (20, 33), (18, 58), (9, 60)], _darker(colour, 0.7), 1)


_KINDS: Final[tuple[tuple[str, str, Callable[[_Pen, Colour], None]], ...]] = (
    ("seating", "dining chair", _chair),
    ("lamps", "table lamp", _table_lamp),
    ("kitchen", "coffee mug", _mug),
    ("electronics", "smartphone", _phone),
    ("sports and toys", "ball", _ball),
    ("fashion", "handbag", _handbag),
    ("seating", "two-seat sofa", _sofa),
    ("lamps", "arc lamp", _arc_lamp),
    ("kitchen", "kettle", _kettle),
    ("electronics", "headphones", _headphones),
    ("sports and toys", "building blocks", _toy_blocks),
    ("fashion", "sneaker", _sneaker),
)
_COLOURS: Final[tuple[tuple[str, Colour], ...]] = (
    ("Red", (198, 58, 52)),
    ("Blue", (52, 98, 176)),
    ("Green", (70, 140, 92)),
    ("Yellow", (226, 176, 60)),
)


@dataclass(frozen=True)
class DrawnProduct:
    """A product that can be drawn: its key, title and category, and how."""

    key: str
    title: str
    category: str
    colour: Colour
    paint: Callable[[_Pen, Colour], None]

    def draw(self) -> Image.Image:
        """Draw the cut-out: RGBA, cropped to what is painted, longest side :data:`DRAWN_SIDE_PX` pixels."""
        pen = _Pen()
        self.paint(pen, self.colour)
        cutout = pen.image.crop(pen.image.getbbox())
        scale = DRAWN_SIDE_PX / max(cutout.size)
        return cutout.resize(
            (max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale))), Image.Resampling.LANCZOS
        )


def drawn_products() -> list[DrawnProduct]:
    """Return the 48 products that can be drawn; any first n of them are spread evenly over the categories."""
    return [
        DrawnProduct(f"{name}-{kind}".lower().replace(" ", "-"), f"{name} {kind}", category, colour, paint)
        for name, colour in _COLOURS
        for category, kind, paint in _KINDS
    ]
