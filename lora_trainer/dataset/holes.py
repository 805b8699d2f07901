"""What an inpainting model is shown of a picture: it with holes, as its training had them.

A quarter of the time everything is a hole (huggingface.co/runwayml/stable-diffusion-inpainting); the rest is thick
strokes or boxes after LaMa's (Suvorov et al. 2022, arXiv:2109.07161), whose sizes are those for 512 px.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

# Of each view of a picture, the first of them the whole.
HOLES = 4
_SIDE = 512
# (fewest, most) of a mask's parts, of the segments of a stroke, and their sizes in pixels at `_SIDE`.
_STROKES, _SEGMENTS, _LENGTH, _WIDTH = (1, 5), (1, 5), (10, 450), (5, 250)
_BOXES, _EDGE = (1, 4), (30, 300)


def holes(name: str, views: int, size: tuple[int, int]) -> Tensor:
    """[views × HOLES, height, width] bool, a view's after the other's: True where there is nothing to be seen. A pure
    function of the picture's `name` and `size` (width, height)."""
    drawn = []
    for view in range(views):
        drawn.append(np.ones(size[::-1], dtype=bool))
        drawn += [_hole(random.Random(f"{name} {view} {number}"), size) for number in range(1, HOLES)]
    return torch.from_numpy(np.stack(drawn))


def _hole(chance: random.Random, size: tuple[int, int]) -> np.ndarray:
    mask = Image.new("1", size)
    draw, scale = ImageDraw.Draw(mask), min(size) / _SIDE
    if chance.random() < 0.5:
        for _ in range(chance.randint(*_STROKES)):
            _stroke(draw, chance, size, scale)
    else:
        for _ in range(chance.randint(*_BOXES)):
            wide, high = (chance.uniform(*_EDGE) * scale for _ in range(2))
            left, top = chance.uniform(0, size[0] - wide), chance.uniform(0, size[1] - high)
            draw.rectangle((left, top, left + wide, top + high), fill=1)
    return np.array(mask)


def _stroke(draw: ImageDraw.ImageDraw, chance: random.Random, size: tuple[int, int], scale: float) -> None:
    x, y = chance.uniform(0, size[0]), chance.uniform(0, size[1])
    for _ in range(chance.randint(*_SEGMENTS)):
        angle, length = chance.uniform(0, 2 * math.pi), chance.uniform(*_LENGTH) * scale
        width = chance.uniform(*_WIDTH) * scale
        ends = (x, y), (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line(ends, fill=1, width=max(1, round(width)))
        for place in ends:
            draw.ellipse((*(c - width / 2 for c in place), *(c + width / 2 for c in place)), fill=1)
        x, y = (min(max(c, 0.0), float(most)) for c, most in zip(ends[1], size, strict=True))
