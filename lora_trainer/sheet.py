"""Contact sheets: rows of pictures with a label each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

_GAP = 6
_LABEL = 90
_HEAD = 18


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str]) -> Image.Image:
    """One picture with a labelled row for each of `rows` and a caption over each column; all cells of one size."""
    width, height = rows[0][1][0].size
    sheet = Image.new(
        "RGB",
        (_LABEL + len(heads) * (width + _GAP) + _GAP, _HEAD + len(rows) * (height + _GAP) + _GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((_LABEL + column * (width + _GAP), 3), cut(draw, head, width), fill="black")
    for row, (label, pictures) in enumerate(rows):
        top = _HEAD + row * (height + _GAP)
        draw.multiline_text((4, top + height // 2 - 8), label, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((width, height)), (_LABEL + column * (width + _GAP), top))
    return sheet


def cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The beginning of `text` that is at most `width` pixels wide. What the small built-in font cannot draw is a ?."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text
