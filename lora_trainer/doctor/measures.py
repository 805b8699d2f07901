"""Numbers about one picture. All from small grey copies, so that a large picture is not kept."""

from __future__ import annotations

import numpy as np
from PIL import Image

HASH_SIDE, THUMB_SIDE, SHORT_SIDE = 16, 32, 128
CORNER_WIDTH, CORNER_HEIGHT = 64, 32
# Longer pictures have no corners that compare with others, and would be large at this scale.
MAX_CORNER_ASPECT = 8
_TILES = 8
# Tiles of a smaller spread, in grey levels, are empty background: nothing there can be sharp.
_EMPTY = 2.0
_BOX = Image.Resampling.BOX


def at_most(grey: Image.Image, area: int) -> Image.Image:
    """`grey` as training would see it: reduced to `area` pixels, never enlarged."""
    scale = min(1.0, (area / (grey.width * grey.height)) ** 0.5)
    size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
    return grey if size == grey.size else grey.resize(size, _BOX)


def difference_hash(grey: Image.Image) -> np.ndarray:
    """512 bits, True where a cell is brighter than its left or upper neighbour: dHash of both directions.

    Neal Krawetz, "Kind of Like That", hackerfactor.com, 2013.
    """
    across = np.asarray(grey.resize((HASH_SIDE + 1, HASH_SIDE), _BOX), np.int16)
    down = np.asarray(grey.resize((HASH_SIDE, HASH_SIDE + 1), _BOX), np.int16)
    return np.concatenate([(np.diff(across) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])


def thumbnail(grey: Image.Image) -> np.ndarray:
    """32 × 32 grey values."""
    return np.asarray(grey.resize((THUMB_SIDE, THUMB_SIDE), _BOX))


def sharpness(grey: Image.Image) -> float | None:
    """The variance of the Laplacian in the sharper tenth of the picture's tiles, since a portrait before a blurred
    background is sharp. None where there is nothing to judge by.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    values = np.asarray(grey, np.float32)
    if min(values.shape) < 4 * _TILES:
        return None
    middle = values[1:-1, 1:-1]
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * middle
    spread, detail = _tiles(middle).std(axis=1), _tiles(laplacian).var(axis=1)
    filled = detail[spread > _EMPTY]
    return float(np.percentile(filled, 90)) if filled.size else None


def _tiles(values: np.ndarray) -> np.ndarray:
    """A row for each tile of a grid."""
    height, width = (side // _TILES for side in values.shape)
    cut = values[: height * _TILES, : width * _TILES]
    return cut.reshape(_TILES, height, _TILES, width).swapaxes(1, 2).reshape(_TILES**2, -1)


def bars(grey: Image.Image) -> float:
    """Which share of the picture two bars of one color take, above and below or left and right; 0 without bars."""
    values = np.asarray(at_most(grey, SHORT_SIDE**2), np.float32)
    return max(_bars(values), _bars(values.T))


# Rows of a bar differ by what JPEG adds; where it ends, this share of the row changes by this much at once, the row's
# own ends too. The empty paper around a drawing ends nowhere along a straight line from edge to edge.
_BAR_NOISE, _BAR_STEP, _BAR_WIDTH, _BAR_HEIGHT, _ENDS = 3.0, 12.0, 0.8, 0.03, 4


def _bars(values: np.ndarray) -> float:
    ends = [_bar(values), _bar(values[::-1])]
    return sum(ends) / len(values) if min(ends) >= max(2, _BAR_HEIGHT * len(values)) else 0.0


def _bar(values: np.ndarray) -> int:
    """How many rows from the top are a bar."""
    flat = values.std(axis=1) < _BAR_NOISE
    height = int(np.argmin(flat)) if not flat.all() else 0
    if height == 0 or np.ptp(values[:height].mean(axis=1)) > _BAR_NOISE:
        return 0
    # Between the bar and the picture there may be one row of both.
    beyond = values[min(height + 1, len(values) - 1)]
    changed = np.abs(beyond - values[:height].mean()) > _BAR_STEP
    ends = changed[:_ENDS].any() and changed[-_ENDS:].any()
    return height if ends and changed.mean() >= _BAR_WIDTH else 0


def corners(grey: Image.Image) -> np.ndarray | None:
    """The four corners, at the scale where the shorter side has 128 pixels: [4, 32, 64]. None for long pictures."""
    if max(grey.size) > MAX_CORNER_ASPECT * min(grey.size):
        return None
    scale = SHORT_SIDE / min(grey.size)
    size = (max(SHORT_SIDE, round(grey.width * scale)), max(SHORT_SIDE, round(grey.height * scale)))
    values = np.asarray(grey.resize(size, _BOX))
    top, bottom = values[:CORNER_HEIGHT], values[-CORNER_HEIGHT:]
    return np.stack([part for row in (top, bottom) for part in (row[:, :CORNER_WIDTH], row[:, -CORNER_WIDTH:])])
