"""Where in a caption file each caption stands, so that all other characters can stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.dataset.captions import FILE_COLUMNS, TEXT_COLUMNS, clean, delimiter_of
from lora_trainer.errors import DataError

_BREAK = re.compile(r"\r\n|\r|\n")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Cell:
    """A cell of a table from `start` to `end`, quotes included."""

    start: int
    end: int
    value: str
    quoted: bool


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file by the line where they start, from 1, without the header. `columns` are the names of
    its header, and None where it has none that names a file and a text."""

    delimiter: str
    rows: dict[int, list[Cell]]
    columns: list[str] | None

    def caption(self, line: int) -> tuple[int, int, bool]:
        """(start, end, whether it must be quoted) of the caption in the row that starts at `line`."""
        cells = self.rows[line]
        if self.columns is not None:
            cell = cells[position(self.columns, TEXT_COLUMNS)]
            return cell.start, cell.end, cell.quoted
        # Without a header all that follows the file's name is its caption.
        return cells[1].start, cells[-1].end, cells[1].quoted

    def quote(self, text: str, *, quoted: bool = False) -> str:
        """`text` as a cell."""
        if quoted or self.delimiter in text or '"' in text or text != text.strip():
            return '"' + text.replace('"', '""') + '"'
        return text


def table(path: Path, text: str) -> Table:
    """Raises DataError for what is no CSV. `text` is as it stands in the file, line ends included."""
    delimiter = delimiter_of(text)
    rows = {line: cells for line, cells in _rows(path, text, delimiter) if any(cell.value.strip() for cell in cells)}
    if not rows:
        return Table(delimiter, {}, None)
    first = next(iter(rows))
    names = [cell.value.strip().lower() for cell in rows[first]]
    if not (set(names) & set(FILE_COLUMNS) and set(names) & set(TEXT_COLUMNS)):
        return Table(delimiter, rows, None)
    return Table(delimiter, {line: cells for line, cells in rows.items() if line != first}, names)


def position(columns: list[str], wanted: tuple[str, ...]) -> int:
    """The column that is read for `wanted`."""
    return next(columns.index(name) for name in wanted if name in columns)


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[Cell]]]:
    """As the csv module reads with skipinitialspace and strict, spaces at a line's end left out."""
    at, line = 0, 1
    while at < len(text):
        cells, start = [], at
        while True:
            cell = _cell(path, text, at, delimiter)
            cells.append(cell)
            at = cell.end
            while at < len(text) and text[at] == " ":
                at += 1
            if at >= len(text) or text[at] != delimiter:
                break
            at += 1
        ended = _BREAK.match(text, at)
        if ended is None and at < len(text):
            raise DataError(f"{path}, line {line}: expected {delimiter!r} or the line's end after a closing quote")
        yield line, cells
        at = ended.end() if ended else at
        line += sum(1 for _ in _BREAK.finditer(text, start, at))


def _cell(path: Path, text: str, at: int, delimiter: str) -> Cell:
    while at < len(text) and text[at] == " ":
        at += 1
    if at < len(text) and text[at] == '"':
        end = at + 1
        while True:
            end = text.find('"', end)
            if end < 0:
                raise DataError(f"{path}: expected a closing quote after {text[at : at + 40]!r}")
            if text[end + 1 : end + 2] != '"':
                return Cell(at, end + 1, text[at + 1 : end].replace('""', '"'), True)
            end += 2
    stop = re.compile(rf"[\r\n{re.escape(delimiter)}]").search(text, at)
    end = stop.start() if stop else len(text)
    value = text[at:end]
    if stop is None or stop[0] != delimiter:
        value = value.rstrip(" ")
    return Cell(at, at + len(value), value, False)


def json_values(line: str) -> dict[str, tuple[int, int]]:
    """Where the value of each key of the JSON object in `line` stands. Raises ValueError."""
    decoder = json.JSONDecoder()
    found: dict[str, tuple[int, int]] = {}
    at = _skip(line, line.index("{") + 1)
    while line[at] != "}":
        key, at = decoder.raw_decode(line, at)
        at = _skip(line, at)
        start = _skip(line, at + 1)
        _, end = decoder.raw_decode(line, start)
        # The last one counts, as for the json module.
        found[key] = (start, end)
        at = _skip(line, end)
        if line[at] == ",":
            at = _skip(line, at + 1)
    return found


def _skip(line: str, at: int) -> int:
    space = _SPACE.match(line, at)
    return space.end() if space else at


def tidy(text: str) -> str:
    """A text of several lines as one caption for each, spaces tidied."""
    return "\n".join(line for line in map(clean, _BREAK.split(text)) if line)
