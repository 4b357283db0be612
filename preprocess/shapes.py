"""One captioned picture of coloured shapes, a pure function of (seed, index).

    (seed, index) --draw_scene--> Scene --describe--> "a red circle at the top left on a grey background"
                                    |
                                    +--paint--> picture as displayed --encode--> bytes of a JPEG or PNG file

Colours, shapes and places are independent of each other and of the sample's number: without the picture a
caption costs its model about ln 8 + ln 6 nats for each object's colour and shape, and the place on top.
Some files are made the way files in the wild are: an EXIF orientation, or transparency for a background.
The caption always describes the picture as displayed, that is turned upright and over white.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.Image import Transpose

RGB = tuple[int, int, int]
Point = tuple[float, float]

SHORTEST_SIDE, LONGEST_SIDE, WIDEST_ASPECT = 48, 192, 3.0  # pixels, pixels, long side over short side

# At least 90 apart (Euclidean, of 255) between any two names of both tables together.
COLOURS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (245, 125, 15),
    "yellow": (252, 225, 45),
    "green": (35, 145, 55),
    "cyan": (20, 195, 215),
    "blue": (35, 75, 215),
    "purple": (140, 45, 175),
    "black": (25, 25, 28),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (248, 248, 248),
    "grey": (132, 132, 136),
    "pink": (250, 165, 205),
    "mint": (165, 225, 185),
    "brown": (115, 75, 48),
}
COLOUR_JITTER = 10  # per channel, so that a colour is a region and not one value

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the centre", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)

OBJECT_COUNTS = (1, 1, 1, 2, 2, 2, 2, 2, 3, 3)  # one is drawn: captions of 10 to 26 words, 16 on average
SMALLEST_CELL = 32  # pixels a side: every object is at least 20 across, wider than one patch
MAX_TURN = math.radians(12)  # a square stays far from a diamond
SUPERSAMPLE = 4

JPEG_SHARE, TURNED_SHARE_OF_JPEG, TRANSPARENT_SHARE_OF_PNG = 0.8, 0.05, 0.2
# What to do to a displayed picture so that EXIF orientation k turns it back: the inverses of the EXIF table.
STORED_AS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}
EXIF_ORIENTATION = 0x0112


def _ring(radii: tuple[float, ...], corners: int) -> list[Point]:
    """Corners on circles of the given radii in turn, the first one straight up."""
    angles = [2 * math.pi * k / corners for k in range(corners)]
    lengths = [radii[k % len(radii)] for k in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(lengths, angles, strict=True)]


# Outlines inside the unit circle around (0, 0), which lies well inside every one of them.
OUTLINES: dict[str, list[Point]] = {
    "circle": _ring((0.9,), 48),
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": _ring((1.0,), 3),
    "diamond": _ring((1.0, 0.62), 4),
    "star": _ring((1.0, 0.42), 10),
    "cross": [
        *[(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)],
        *[(0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)],
    ],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One object; lengths in pixels of the picture as displayed, pixel i covers [i, i + 1)."""

    shape: str
    colour: str
    place: str
    x: float
    y: float
    radius: float
    turn: float  # radians, clockwise
    rgb: RGB


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture as displayed, before it is painted; items in reading order, none overlaps another."""

    width: int
    height: int
    background: str
    rgb: RGB
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A finished sample: the picture file, its caption and what the caption is true of."""

    extension: str
    picture: bytes
    caption: str
    record: dict[str, Any]


def make_sample(seed: int, index: int) -> Sample:
    """Sample `index` of the data set of `seed`, whatever the number of samples."""
    rng = np.random.default_rng([seed, index])
    jpeg = rng.random() < JPEG_SHARE
    special = rng.random() < (TURNED_SHARE_OF_JPEG if jpeg else TRANSPARENT_SHARE_OF_PNG)
    transparent = special and not jpeg
    scene = draw_scene(rng, background="white" if transparent else _pick(rng, tuple(BACKGROUNDS)))
    canvas = paint(scene, transparent=transparent)
    orientation = int(rng.integers(2, 9)) if special and jpeg else 1
    caption = describe(scene)
    record = {"width": scene.width, "height": scene.height, "caption": caption}
    return Sample(
        extension="jpg" if jpeg else "png",
        picture=encode_jpeg(canvas, orientation) if jpeg else encode_png(canvas, transparent=transparent),
        caption=caption,
        record=record
        | {"background": scene.background, "objects": [_to_record(item) for item in scene.items]},
    )


def draw_scene(rng: np.random.Generator, *, background: str) -> Scene:
    """Objects in distinct cells of a grid, each inside its own cell: that is why none overlaps another."""
    width, height = _draw_size(rng)
    # A narrow side has fewer cells, so that objects on it are not too small to tell apart.
    columns, rows = (min(3, side // SMALLEST_CELL) for side in (width, height))
    count = min(OBJECT_COUNTS[int(rng.integers(len(OBJECT_COUNTS)))], columns * rows)
    cells = sorted(int(cell) for cell in rng.choice(columns * rows, count, replace=False))
    items = tuple(_draw_item(rng, divmod(cell, columns), (rows, columns), (height, width)) for cell in cells)
    rgb = _jitter(rng, BACKGROUNDS[background])
    return Scene(width=width, height=height, background=background, rgb=rgb, items=items)


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height): the long side uniform, the logarithm of the aspect ratio uniform."""
    long = int(rng.integers(SHORTEST_SIDE, LONGEST_SIDE + 1))
    short = max(SHORTEST_SIDE, math.ceil(long / WIDEST_ASPECT ** rng.random()))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _draw_item(
    rng: np.random.Generator, cell: tuple[int, int], grid: tuple[int, int], sides: tuple[int, int]
) -> Item:
    """An object in `cell` = (row, column) of `grid` cells; `sides` = (height, width) in pixels."""
    spans = [side / count for side, count in zip(sides, grid, strict=True)]
    radius = min(spans) * rng.uniform(0.34, 0.46)
    # 0.15 of a cell off its middle at most: whether a side has 1, 2 or 3 cells, the object's centre then lies
    # in the first, middle or last third of that side, and the place is the pair of thirds.
    slack = [min(span / 2 - radius, 0.15 * span) for span in spans]
    y, x = (
        (position + 0.5) * span + rng.uniform(-room, room)
        for position, span, room in zip(cell, spans, slack, strict=True)
    )
    height, width = sides
    colour = _pick(rng, tuple(COLOURS))
    return Item(
        shape=_pick(rng, tuple(OUTLINES)),
        colour=colour,
        place=PLACES[int(3 * y / height)][int(3 * x / width)],
        x=x,
        y=y,
        radius=radius,
        turn=rng.uniform(-MAX_TURN, MAX_TURN),
        rgb=_jitter(rng, COLOURS[colour]),
    )


def describe(scene: Scene) -> str:
    """What is where, in reading order."""
    phrases = [f"{_article(item.colour)} {item.colour} {item.shape} {item.place}" for item in scene.items]
    listed = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    return f"{listed} on {_article(scene.background)} {scene.background} background"


def paint(scene: Scene, *, transparent: bool) -> Image.Image:
    """The picture as displayed, RGBA; `transparent` leaves the background out (its colour is black then)."""
    background = (0, 0, 0, 0) if transparent else (*scene.rgb, 255)
    canvas = Image.new("RGBA", (scene.width, scene.height), background)
    for item in scene.items:
        left, top = math.floor(item.x - item.radius), math.floor(item.y - item.radius)
        side = math.ceil(2 * item.radius) + 1
        mask = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
        sin, cos = item.radius * math.sin(item.turn), item.radius * math.cos(item.turn)
        corners = [
            (
                (item.x - left + cos * u - sin * v) * SUPERSAMPLE,
                (item.y - top + sin * u + cos * v) * SUPERSAMPLE,
            )
            for u, v in OUTLINES[item.shape]
        ]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        stamp = Image.new("RGBA", (side, side), item.rgb)
        stamp.putalpha(mask.reduce(SUPERSAMPLE))
        canvas.alpha_composite(stamp, (left, top))
    return canvas


def encode_jpeg(canvas: Image.Image, orientation: int) -> bytes:
    """A JPEG displayed as `canvas`; an orientation other than 1 stores it turned, with the EXIF tag."""
    picture, file = canvas.convert("RGB"), io.BytesIO()
    if orientation == 1:
        picture.save(file, "JPEG", quality=90)
    else:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        picture.transpose(STORED_AS[orientation]).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def encode_png(canvas: Image.Image, *, transparent: bool) -> bytes:
    file = io.BytesIO()
    (canvas if transparent else canvas.convert("RGB")).save(file, "PNG")
    return file.getvalue()


def _to_record(item: Item) -> dict[str, Any]:
    fields = asdict(item) | {name: round(getattr(item, name), 1) for name in ("x", "y", "radius")}
    return {name: fields[name] for name in ("shape", "colour", "place", "x", "y", "radius")}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _jitter(rng: np.random.Generator, rgb: RGB) -> RGB:
    off = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    red, green, blue = (
        min(255, max(0, channel + int(delta))) for channel, delta in zip(rgb, off, strict=True)
    )
    return red, green, blue
