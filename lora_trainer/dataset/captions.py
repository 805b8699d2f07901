"""Caption files: CSV as people and Excel write them, and JSONL."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.dataset.encodings import decode
from lora_trainer.errors import DataError

FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "img")
TEXT_COLUMNS = ("text", "caption", "prompt", "description", "tags")
MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """A caption and the picture it names; `number` is the line where it starts, from 1."""

    number: int
    file: str
    caption: str


def read_metadata(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a .csv or .jsonl file, and what should be said about it. Raises DataError."""
    text, encoding = decode(path, read_bytes(path))
    notes = [] if encoding == "UTF-8" else [f"{path.name}: read as {encoding}"]
    rows = _jsonl(path, text) if path.suffix.lower() in (".jsonl", ".json", ".ndjson") else _csv(path, text, notes)
    seen: dict[str, int] = {}
    for row in rows:
        if row.file in seen:
            raise DataError(f"{path}: rows {seen[row.file]} and {row.number} both describe {row.file}; expected one")
        seen[row.file] = row.number
    return rows, notes


def read_bytes(path: Path) -> bytes:
    """The bytes of a caption file of a sane size. Raises DataError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: expected captions of at most 64 MiB, found {path.stat().st_size:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected captions") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _csv(path: Path, text: str, notes: list[str]) -> list[Row]:
    csv.field_size_limit(MAX_FILE_BYTES)
    lines = _parse(path, text, _delimiter(text))
    if not lines:
        raise DataError(f"{path}: expected rows of a file name and a caption, found none")
    names = [cell.strip().lower() for cell in lines[0][1]]
    file_at = next((names.index(n) for n in FILE_COLUMNS if n in names), None)
    text_at = next((names.index(n) for n in TEXT_COLUMNS if n in names), None)
    if file_at is None or text_at is None:
        return [_plain_row(path, number, cells) for number, cells in lines]
    others = [n for i, n in enumerate(names) if i not in (file_at, text_at) and n]
    if others:
        notes.append(f"{path.name}: columns not used: {', '.join(others)}")
    return [_headed_row(path, number, cells, file_at, text_at) for number, cells in lines[1:]]


def _parse(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, before = [], 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((before + 1, cells))
            before = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    return rows


def _plain_row(path: Path, number: int, cells: list[str]) -> Row:
    """Without a header: a file name, and all the rest is its caption, commas included."""
    if len(cells) < 2:
        raise DataError(
            f'{path}, line {number}: expected a file name and a caption (img01.jpg,"a cat"), found {cells[0]!r}'
        )
    return Row(number, cells[0].strip(), ", ".join(cell.strip() for cell in cells[1:]).strip(" ,"))


def _headed_row(path: Path, number: int, cells: list[str], file_at: int, text_at: int) -> Row:
    if len(cells) <= max(file_at, text_at):
        raise DataError(f"{path}, line {number}: expected {max(file_at, text_at) + 1} columns, found {len(cells)}")
    return Row(number, cells[file_at].strip(), cells[text_at].strip())


def _delimiter(text: str) -> str:
    """Of comma, semicolon and tab the one that most first lines have; comma where in doubt."""
    lines = [line for line in text.split("\n", 50)[:50] if line.strip()]
    counts = {mark: sum(mark in _outside_quotes(line) for line in lines) for mark in (",", ";", "\t")}
    return max(counts, key=lambda mark: (counts[mark], mark == ","))


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


def _jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            rows.append(_json_row(path, number, line))
    return rows


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {str(error).splitlines()[0]}") from None
    file, caption = _first(entry, FILE_COLUMNS), _first(entry, TEXT_COLUMNS)
    if not isinstance(file, str) or not isinstance(caption, str):
        raise DataError(f'{path}, line {number}: expected {{"file_name": …, "text": …}}, found {line.strip()[:80]}')
    return Row(number, file.strip(), caption.strip())


def _first(entry: object, names: Iterable[str]) -> object:
    return next((entry[name] for name in names if name in entry), None) if isinstance(entry, dict) else None
