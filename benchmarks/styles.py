"""Three styles to learn, made of the bundled pictures: the same subjects, each time drawn in another way.

ink      as they are: blue ink on cream paper
chalk    pale strokes on a dark green board
mosaic   tiles of 8 pixels in the colours of a sunset
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lora_trainer.demo import WORLD

TILE = 8
_BOARD, _CHALK = np.array([24, 52, 44]), np.array([240, 236, 214])
# Dark to bright.
_SUNSET = np.array([[45, 18, 75], [148, 35, 92], [232, 88, 60], [250, 176, 64], [255, 240, 200]])


def _chalk(grey: np.ndarray) -> np.ndarray:
    """Paper becomes board, and the darkest ink the palest chalk."""
    return _BOARD + (1 - grey[..., None]) * (_CHALK - _BOARD)


def _mosaic(grey: np.ndarray) -> np.ndarray:
    """Each tile in one colour, with a dark joint to the next."""
    size = len(grey) // TILE
    tiles = grey[: size * TILE, : size * TILE].reshape(size, TILE, size, TILE).mean((1, 3))
    places = np.linspace(0, 1, len(_SUNSET))
    colours = np.stack([np.interp(tiles, places, channel) for channel in _SUNSET.T], axis=-1)
    picture = colours.repeat(TILE, 0).repeat(TILE, 1)
    picture[::TILE] *= 0.6
    picture[:, ::TILE] *= 0.6
    return picture


STYLES: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {"ink": None, "chalk": _chalk, "mosaic": _mosaic}


def write_style(style: str, source: Path, folder: Path) -> Path:
    """The pictures of `source` in another style, with their captions, in `folder`."""
    change = STYLES[style]
    if change is None:
        return source
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.png")):
        grey = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
        # Ink and paper are the ends of the scale.
        grey = ((grey - 60) / (245 - 60)).clip(0, 1)
        Image.fromarray(change(grey).round().clip(0, 255).astype(np.uint8)).save(folder / path.name)
    shutil.copy(source / "metadata.csv", folder / "metadata.csv")
    return folder


def folders(style: str, out: Path) -> tuple[Path, Path]:
    """The pictures to learn and the held-out ones."""
    return (
        write_style(style, WORLD / "twemoji", out / style),
        write_style(style, WORLD / "twemoji-held-out", out / f"{style}-held-out"),
    )
