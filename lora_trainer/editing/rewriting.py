"""The bytes of a caption file after an edit. What the edit does not name stays byte for byte, and the result is read
back as training reads it before anything is written."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_trainer.dataset.captions import (
    FILE_COLUMNS,
    TEXT_COLUMNS,
    Complain,
    Row,
    clean,
    is_json,
    parse_metadata,
    refuse_long,
)
from lora_trainer.dataset.encodings import decode
from lora_trainer.editing.spans import Table, json_values, position, table, tidy
from lora_trainer.errors import DataError

# All but the line end.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CODECS = {"UTF-8": "utf-8", "GBK": "gb18030", "Shift-JIS": "cp932"}
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Rows:
    """An edit of a metadata file: captions by the line where their row starts, and rows to add (file, caption)."""

    changed: Mapping[int, str]
    added: Sequence[tuple[str, str]] = field(default=())


def usable(place: str, caption: str) -> str:
    """`caption` as it is kept: a line for each caption, spaces tidied, no comma at its ends. Raises DataError."""
    tidied = "\n".join(line for part in tidy(caption).split("\n") if (line := part.strip(" ,")))
    if _CONTROL.search(tidied):
        raise DataError(f"{place}: expected words, found a character that is none in {tidied[:80]!r}")
    refuse_long(place, tidied)
    return tidied


def sidecar(path: Path, before: bytes | None, caption: str) -> bytes:
    """The text file `path` with `caption`; `before` are its bytes, None where it is new. Raises DataError."""
    text = decode(path, before)[0] if before else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    end = newline if text[-1:] in ("\n", "\r") or not before else ""
    after = caption.replace("\n", newline) + end if caption else ""
    return _encoded(path, before or b"", text, after)


def metadata(path: Path, before: bytes, rows: Rows) -> bytes:
    """The .csv or .jsonl file `path` with `rows`; `before` are its bytes. Raises DataError."""
    text = decode(path, before)[0]
    newline = next((end for end in ("\r\n", "\n", "\r") if end in text), "\n")
    if not _read(path, text):
        raise DataError(f"{path}: expected a row that can be read; mend it first")
    edit = _edited_lines if is_json(path) else _edited_table
    after, new = edit(path, text, rows)
    if new:
        gap = newline if after and after[-1] not in "\r\n" else ""
        after += gap + newline.join(new) + newline
    _check(path, text, after, rows)
    return _encoded(path, before, text, after)


def _edited_table(path: Path, text: str, rows: Rows) -> tuple[str, list[str]]:
    """(text with the changed captions, lines to add)."""
    found = table(path, text)
    parts, at = [], 0
    for line in sorted(rows.changed):
        start, end, quoted = found.caption(line)
        parts += [text[at:start], found.quote(clean(rows.changed[line]), quoted=quoted)]
        at = end
    return "".join([*parts, text[at:]]), [_table_row(found, *row) for row in rows.added]


def _table_row(found: Table, file: str, caption: str) -> str:
    if found.columns is None:
        return f"{found.quote(file)}{found.delimiter}{found.quote(clean(caption))}"
    cells = [""] * len(found.columns)
    cells[position(found.columns, FILE_COLUMNS)] = found.quote(file)
    cells[position(found.columns, TEXT_COLUMNS)] = found.quote(clean(caption))
    return found.delimiter.join(cells)


def _edited_lines(path: Path, text: str, rows: Rows) -> tuple[str, list[str]]:
    lines = text.split("\n")
    for number, caption in rows.changed.items():
        line = lines[number - 1]
        values = json_values(line)
        start, end = next(values[name] for name in TEXT_COLUMNS if name in values)
        new = caption.split("\n") if line[start] == "[" else clean(caption)
        lines[number - 1] = line[:start] + json.dumps(new, ensure_ascii="\\u" in line) + line[end:]
    return "\n".join(lines), _new_lines(path, text, rows.added) if rows.added else []


def _new_lines(path: Path, text: str, added: Sequence[tuple[str, str]]) -> list[str]:
    """With the keys of the first row that training reads."""
    known = json_values(text.split("\n")[_read(path, text)[0].number - 1])
    keys = [next(name for name in names if name in known) for names in (FILE_COLUMNS, TEXT_COLUMNS)]
    new = [dict(zip(keys, (file, clean(caption)), strict=True)) for file, caption in added]
    return [json.dumps(row, ensure_ascii="\\u" in text) for row in new]


def _check(path: Path, before: str, after: str, rows: Rows) -> None:
    """Raises DataError unless exactly `rows` are other than before, as training reads them."""
    was, now = (_read(path, text) for text in (before, after))
    wanted = [(row.file, clean(rows.changed.get(row.number, row.caption))) for row in was]
    wanted += [(file, clean(caption)) for file, caption in rows.added]
    if wanted != [(row.file, clean(row.caption)) for row in now]:
        raise DataError(f"{path}: these words cannot be written into it without changing other rows; edit it elsewhere")


def _read(path: Path, text: str) -> list[Row]:
    # Rows that training refuses stay as they are.
    ignore: Complain = lambda *_: None  # noqa: E731
    return parse_metadata(path, text, [], ignore)


def _encoded(path: Path, before: bytes, old: str, new: str) -> bytes:
    """`new` in the encoding of `before`, whose text is `old`, so that it will be read as it is meant."""
    bom, codec = next(((bom, codec) for bom, codec in _BOMS if before.startswith(bom)), (b"", ""))
    codec = codec or _CODECS[decode(path, before)[1]]
    if bom + old.encode(codec, "replace") != before:
        raise DataError(f"{path}: cannot be written back as it was; save it as UTF-8, then edit it here")
    # Short texts may look like another encoding.
    for mark in (bom, codecs.BOM_UTF8) if codec == "utf-8" else (bom,):
        try:
            after = mark + new.encode(codec)
            if decode(path, after)[0] == new:
                return after
        except (UnicodeEncodeError, DataError):
            continue
    raise DataError(f"{path}: its encoding has not all of these characters; save it as UTF-8, then edit it here")
