"""All pictures of a folder in one: those with findings first, framed and labelled."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lora_trainer.dataset.images import ImageError, load_image
from lora_trainer.dataset.items import sidecars
from lora_trainer.doctor.findings import LEVELS, Finding, Report
from lora_trainer.errors import ConfigError
from lora_trainer.files import publish
from lora_trainer.sheet import cut

MOST = 200
_COLUMNS, _CELL, _GAP, _LINE, _FRAME = 8, 128, 8, 12, 4
_LABELS = 3
_COLORS = {"error": "#d01c1c", "warning": "#d98200", "advice": "#2f6fd0"}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def check_name(path: Path) -> None:
    """Raises ConfigError for a name that no sheet can be written under."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError([f"sheet: expected a name that ends in .png or .jpg, found {path.name}"])


def write(sheet: Image.Image, path: Path) -> None:
    """A sheet under `path`. Raises ConfigError for its name, OutputError."""
    check_name(path)
    buffer = io.BytesIO()
    sheet.save(buffer, format=_FORMATS[path.suffix.lower()])
    publish(buffer.getvalue(), path)


def draw(report: Report) -> Image.Image:
    """At most MOST pictures, the worst first."""
    findings = _by_picture(report)
    shown = sorted(report.pictures, key=lambda file: LEVELS.index(findings[file][0].level) if file in findings else 9)
    rows = -(-min(len(shown), MOST) // _COLUMNS)
    width, height = _CELL + _GAP, _CELL + _GAP + _LABELS * _LINE
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, max(1, rows) * height + _GAP), "white")
    for index, file in enumerate(shown[:MOST]):
        row, column = divmod(index, _COLUMNS)
        place = (_GAP + column * width, _GAP + row * height)
        _cell(sheet, file, findings.get(file, ()), place)
    return sheet


def _by_picture(report: Report) -> dict[Path, list[Finding]]:
    """Of each picture its findings, the worst first; those of its own text file too."""
    owners = {place: picture for picture in report.pictures for place in (picture, *sidecars(picture))}
    found = defaultdict(list)
    for finding in report.findings:
        for file in finding.files:
            if file in owners:
                found[owners[file]].append(finding)
    return dict(found)


def _cell(sheet: Image.Image, file: Path, findings: Sequence[Finding], place: tuple[int, int]) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), place
    box = (left, top, left + _CELL - 1, top + _CELL - 1)
    thumb = _thumbnail(file)
    if thumb is None:
        draw.rectangle(box, fill="#dddddd")
        draw.line(box, fill="#888888", width=2)
        draw.line((box[0], box[3], box[2], box[1]), fill="#888888", width=2)
    else:
        inside = (left + (_CELL - thumb.width) // 2, top + (_CELL - thumb.height) // 2)
        sheet.paste(thumb, inside)
    if findings:
        draw.rectangle(box, outline=_COLORS[findings[0].level], width=_FRAME)
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    more = [", ".join(kinds[1:])] if kinds[1:] else []
    for number, text in enumerate([file.name, *kinds[:1], *more]):
        color = _COLORS[findings[0].level] if number else "black"
        draw.text((left, top + _CELL + 1 + number * _LINE), cut(draw, text, _CELL), fill=color)


def _thumbnail(file: Path) -> Image.Image | None:
    try:
        image = load_image(file)
    except ImageError:
        return None
    image.thumbnail((_CELL - 2 * _FRAME, _CELL - 2 * _FRAME))
    return image
