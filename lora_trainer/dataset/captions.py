"""Caption files: CSV as people and Excel write them, and JSONL."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.encodings import decode
from lora_trainer.errors import DataError, printable

FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "img")
TEXT_COLUMNS = ("text", "caption", "prompt", "description", "tags")
# More than these is no data set for a LoRA, and takes minutes to read.
MAX_FILE_BYTES = 32 * 1024 * 1024
MAX_LINES, MAX_LINE = 200_000, 1_000_000
MAX_CAPTION = 20_000
WEIGHT_COLUMN = "weight"
MAX_WEIGHT = 100

Complain = Callable[[Path, DataError], object]
"""Is told what is wrong with a file or folder; where it returns, reading goes on with what is left."""


@dataclass(frozen=True)
class Row:
    """A caption and the picture it names, as written; `number` is the line where the row starts, from 1. Several
    captions are lines. `weight` is that of the picture's loss."""

    number: int
    file: str
    caption: str
    weight: float = 1.0


def stop(_: Path, problem: DataError) -> None:
    """The Complain of training, which ends at the first problem."""
    raise problem


def read_metadata(path: Path, complain: Complain = stop) -> tuple[list[Row], list[str]]:
    """The rows of a .jsonl or else CSV file, and what should be said about it. Raises DataError for the file, and
    complains of rows."""
    text, encoding = read_text(path)
    notes = [] if encoding == "UTF-8" else [f"{path.name}: read as {encoding}"]
    return parse_metadata(path, text, notes, complain), notes


def parse_metadata(path: Path, text: str, notes: list[str], complain: Complain = stop) -> list[Row]:
    """The rows in the `text` of the file `path`, as `read_metadata`; what should be said is added to `notes`."""
    _refuse_large(path, text)
    written = _jsonl(path, text) if is_json(path) else _csv(path, text, notes)
    if not written:
        raise DataError(f"{path}: expected rows of a file name and a caption, found none")
    rows, seen = [], {}
    for read in written:
        try:
            row = read()
            _refuse_row(path, row, seen)
        except DataError as problem:
            complain(path, problem)
        else:
            rows.append(row)
    return rows


def is_json(metadata: Path) -> bool:
    """Whether a metadata file has a JSON object a line, and not a table."""
    return metadata.suffix.lower() in (".jsonl", ".json", ".ndjson")


def _refuse_row(path: Path, row: Row, seen: dict[str, int]) -> None:
    if not row.file:
        raise DataError(f"{path}, line {row.number}: expected a file name, found none")
    refuse_long(f"{path}, line {row.number}", row.caption)
    first = seen.setdefault(posix(row.file), row.number)
    if first != row.number:
        raise DataError(f"{path}: expected one row for {row.file}, found lines {first} and {row.number}")


def read_text(path: Path) -> tuple[str, str]:
    """(text, name of its encoding) of a caption file of a sane size. Raises DataError."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file; expected captions")
        if not path.is_file():
            raise DataError(f"{path}: expected a file of captions, found a folder or a device")
        if path.stat().st_size > MAX_FILE_BYTES:
            size = f"{path.stat().st_size:,} bytes"
            raise DataError(f"{path}: expected captions of at most {MAX_FILE_BYTES:,} bytes, found {size}")
        return decode(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def refuse_long(place: str, caption: str) -> None:
    """Raises DataError for what is no caption any more: the tokenizer would take minutes for it."""
    if len(caption) > MAX_CAPTION:
        raise DataError(f"{place}: expected a caption of at most {MAX_CAPTION:,} characters, found {len(caption):,}")


def _refuse_large(path: Path, text: str) -> None:
    count = max(text.count("\n"), text.count("\r"))
    if count > MAX_LINES:
        raise DataError(f"{path}: expected at most {MAX_LINES:,} lines, found {count:,}")
    longest = max(map(len, re.split("[\r\n]", text)))
    if longest > MAX_LINE:
        raise DataError(f"{path}: expected lines of at most {MAX_LINE:,} characters, found one of {longest:,}")


def relative(metadata: Path, number: int, file: str) -> str:
    """The file name of a row, relative to the folder it must stay in. Raises DataError."""
    path = PurePosixPath(posix(file))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", file):
        raise DataError(f"{metadata}, line {number}: expected a name inside the folder, found {file}")
    return path.as_posix()


def posix(file: str) -> str:
    """A file name of a row with one way to write it: forward slashes, no leading or doubled `./`."""
    return PurePosixPath(file.replace("\\", "/")).as_posix()


def _csv(path: Path, text: str, notes: list[str]) -> list[Callable[[], Row]]:
    """A reader for each row."""
    delimiter = delimiter_of(text)
    lines = _parse(path, text, delimiter)
    names = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    file_at = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
    text_at = next((names.index(name) for name in TEXT_COLUMNS if name in names), None)
    if file_at == 0 and text_at is None:
        raise DataError(f"{path}: expected a column {' or '.join(TEXT_COLUMNS)}, found {', '.join(names)}")
    if file_at is None or text_at is None:
        return [partial(_plain_row, path, number, cells, delimiter) for number, cells in lines]
    weight_at = names.index(WEIGHT_COLUMN) if WEIGHT_COLUMN in names else None
    others = [name for at, name in enumerate(names) if at not in (file_at, text_at, weight_at) and name]
    if others:
        notes.append(printable(f"{path.name}: columns not used: {', '.join(others)}"))
    at = (file_at, text_at, weight_at, len(names))
    return [partial(_named_row, path, number, cells, at, delimiter) for number, cells in lines[1:]]


def _named_row(path: Path, number: int, cells: list[str], at: tuple[int, int, int | None, int], delimiter: str) -> Row:
    """Under a header; `at` tells where file name, caption and weight stand, and how many columns there are."""
    file_at, text_at, weight_at, count = at
    if len(cells) <= max(file_at, text_at) or any(cells[count:]):
        wanted = f"expected {count} columns, found {len(cells)}; put captions with a {delimiter!r} in quotes"
        raise DataError(f"{path}, line {number}: {wanted}")
    weight = cells[weight_at].strip() if weight_at is not None and weight_at < len(cells) else ""
    return Row(number, cells[file_at].strip(), clean(cells[text_at]), _weight(path, number, weight or 1))


def _parse(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line where it starts, cells) of each row that is not empty."""
    # Excel for Mac ends lines with CR; spaces after a closing quote are no part of the format, but people leave them.
    lines = "\n".join(line.rstrip(" ") for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    reader = csv.reader(io.StringIO(lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows, before = [], 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((before + 1, cells))
            before = reader.line_num
    except csv.Error as error:
        hint = '; inside quotes a quote is written ""' if '"' in str(error) or "end of data" in str(error) else ""
        raise DataError(f"{path}, line {before + 1}: not valid CSV: {error}{hint}") from None
    return rows


def _plain_row(path: Path, number: int, cells: list[str], delimiter: str) -> Row:
    """Without a header: a file name, and all the rest is its caption, unquoted delimiters included."""
    if len(cells) < 2:
        wanted = 'expected a file name and a caption (img01.jpg,"a cat")'
        raise DataError(f"{path}, line {number}: {wanted}, found {cells[0][:80]!r}")
    caption = f"{delimiter} ".join(cell.strip() for cell in cells[1:])
    return Row(number, cells[0].strip(), clean(caption.rstrip(f"{delimiter} ")))


def delimiter_of(text: str) -> str:
    """What ends the first cell: comma, semicolon or tab."""
    first = text.lstrip().split("\n", 1)[0]
    outside_quotes = "".join(first.split('"')[::2])
    return next((mark for mark in outside_quotes if mark in ",;\t"), ",")


def _jsonl(path: Path, text: str) -> list[Callable[[], Row]]:
    """A reader for each row."""
    # Not splitlines: JSON strings may hold the other line separators of Unicode.
    lines = enumerate(text.split("\n"), start=1)
    return [partial(_json_row, path, number, line) for number, line in lines if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {str(error).splitlines()[0]}") from None
    file, texts = _first(entry, FILE_COLUMNS), _first(entry, TEXT_COLUMNS)
    captions = texts if isinstance(texts, list) else [texts]
    if not all(isinstance(text, str) for text in (file, *captions)):
        wanted = 'expected {"file_name": "…", "text": "…"}, or a list of texts'
        raise DataError(f"{path}, line {number}: {wanted}, found {line.strip()[:80]}")
    try:
        "".join((file, *captions)).encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}, line {number}: expected text, found half of a surrogate pair") from None
    cleaned = "\n".join(text for text in map(clean, captions) if text)
    return Row(number, file.strip(), cleaned, _weight(path, number, entry.get(WEIGHT_COLUMN, 1)))


def _weight(path: Path, number: int, value: object) -> float:
    try:
        weight = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        weight = 0.0
    if not 0 < weight <= MAX_WEIGHT:
        wanted = f"expected a weight of more than 0 and at most {MAX_WEIGHT}"
        raise DataError(f"{path}, line {number}: {wanted}, found {str(value)[:80]!r}")
    return weight


def _first(entry: object, names: Iterable[str]) -> object:
    return next((entry[name] for name in names if name in entry), None) if isinstance(entry, dict) else None


def clean_lines(text: str) -> str:
    """Each line a caption of its own, as `clean` leaves it; empty ones are no captions."""
    return "\n".join(line for line in map(clean, re.split("[\r\n]", text)) if line)


def clean(caption: str) -> str:
    """A caption on one line, with single spaces, as the tokenizer sees it."""
    return " ".join(caption.split())
