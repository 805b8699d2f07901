"""A curve over a logarithmic axis as a picture, without a plotting library."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
GRID, LINE, MARK, WORDS = "#dddddd", "#2f6fde", "#c25b4e", "#333333"
TICKS = 5

Point = tuple[float, float]


def line_plot(
    points: Sequence[Point], *, title: str, axis: str, most: float = math.inf, mark: float | None = None
) -> Image.Image:
    """`points` (x above 0, y) as a line, x by its logarithm; `mark` is an x that is pointed out. What is not finite is
    left out, and what is above `most` lies on the upper edge. `axis` names x."""
    shown = [(x, min(y, most)) for x, y in points if math.isfinite(y)]
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, 14), title, fill=WORDS)
    draw.text((LEFT, HEIGHT - 22), axis, fill=WORDS)
    if not shown:
        return picture
    across = _scale([math.log10(x) for x, _ in shown], LEFT, WIDTH - RIGHT)
    down = _scale([y for _, y in shown], HEIGHT - BOTTOM, TOP)
    _grid(draw, shown, across, down)
    spots = [(across(math.log10(x)), down(y)) for x, y in shown]
    draw.line(spots, fill=LINE, width=3)
    for x, y in spots:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINE)
    if mark is not None:
        x = across(math.log10(mark))
        draw.line(((x, TOP), (x, HEIGHT - BOTTOM)), fill=MARK, width=2)
        draw.text((x + 6, TOP + 2), f"{mark:g}", fill=MARK)
    return picture


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _grid(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], across: Callable[[float], float], down: Callable[[float], float]
) -> None:
    """A line at each power of ten, and a few for the values."""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1):
        x = across(power)
        draw.line(((x, TOP), (x, HEIGHT - BOTTOM)), fill=GRID)
        draw.text((x - 14, HEIGHT - BOTTOM + 8), f"1e{power}", fill=WORDS)
    least, most = min(y for _, y in points), max(y for _, y in points)
    for number in range(TICKS):
        value = least + (most - least) * number / (TICKS - 1)
        draw.line(((LEFT, down(value)), (WIDTH - RIGHT, down(value))), fill=GRID)
        draw.text((8, down(value) - 6), f"{value:.4g}", fill=WORDS)


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Where a value lies between the pixels `first` (of the least) and `last` (of the largest)."""
    low = min(values)
    span = (max(values) - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)
