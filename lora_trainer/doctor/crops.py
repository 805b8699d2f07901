"""What training will see of each picture: a sheet with the parts that are kept, and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from lora_trainer.dataset.buckets import Placement
from lora_trainer.dataset.crops import Sizes, View, views
from lora_trainer.dataset.images import ImageError, load_image
from lora_trainer.sheet import cut

MOST = 200
_COLUMNS, _CELL, _GAP, _LINE = 6, 176, 10, 12
_LABELS = 3
# Of the main size, which is labelled first, and of the others.
_COLORS = ("#18a558", "#d98200", "#2f6fd0", "#a63fbf", "#d01c1c")


def draw(files: Sequence[Path], sizes: Sequence[Sizes]) -> Image.Image:
    """The first MOST of `files`: what is left out is dark, and what is kept at each of `sizes` is framed."""
    shown = files[:MOST]
    width, height = _CELL + _GAP, _CELL + _GAP + _LABELS * _LINE
    rows = -(-len(shown) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, max(1, rows) * height + _GAP), "white")
    for index, file in enumerate(shown):
        row, column = divmod(index, _COLUMNS)
        _cell(sheet, file, sizes, (_GAP + column * width, _GAP + row * height))
    return sheet


def described(found: Sequence[View]) -> str:
    """The size, how much of the picture is cut off, and between how many views each visit chooses."""
    placement = found[0].placement
    bucket, (width, height) = placement.bucket, placement.resized
    lost = 1 - bucket.area / (width * height)
    parts = len({view.placement for view in found})
    words = [f"{bucket.width}x{bucket.height}", f"-{lost:.0%}" if lost >= 0.005 else ""]
    words += [f"{parts} parts" if parts > 1 else "", "mirrored" if found[-1].flipped else ""]
    return " ".join(filter(None, words))


def _cell(sheet: Image.Image, file: Path, sizes: Sequence[Sizes], place: tuple[int, int]) -> None:
    canvas, (left, top) = ImageDraw.Draw(sheet), place
    labels = [(file.name, "black")]
    try:
        image = load_image(file)
        by_bucket = {(found := views(image, size))[0].placement.bucket: found for size in reversed(sizes)}
    except (ImageError, ValueError) as error:
        canvas.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill="#dddddd")
        labels += [(getattr(error, "why", str(error)), "#d01c1c")]
    else:
        kept = list(reversed(by_bucket.values()))
        thumb = _framed(image, kept)
        sheet.paste(thumb, (left + (_CELL - thumb.width) // 2, top + (_CELL - thumb.height) // 2))
        labels += [(described(found), _COLORS[at % len(_COLORS)]) for at, found in enumerate(kept)]
    for number, (text, color) in enumerate(labels[:_LABELS]):
        canvas.text((left, top + _CELL + 1 + number * _LINE), cut(canvas, text, _CELL), fill=color)


def _framed(image: Image.Image, kept: Sequence[Sequence[View]]) -> Image.Image:
    """A small copy, bright where some view sees it."""
    thumb = image.copy()
    thumb.thumbnail((_CELL, _CELL))
    framed = ImageEnhance.Brightness(thumb).enhance(0.35)
    boxes = [(_box(view.placement, thumb.size), at) for at, found in enumerate(kept) for view in found]
    for (left, top, right, bottom), _ in boxes:
        framed.paste(thumb.crop((left, top, right, bottom)), (left, top))
    canvas = ImageDraw.Draw(framed)
    for (left, top, right, bottom), at in reversed(boxes):
        thin = len(kept[at]) > 2
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=_COLORS[at % len(_COLORS)], width=2 - thin)
    return framed


def _box(placement: Placement, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The crop in a copy of another size."""
    across, down = size[0] / placement.resized[0], size[1] / placement.resized[1]
    left, top, right, bottom = placement.crop
    return round(left * across), round(top * down), round(right * across), round(bottom * down)
