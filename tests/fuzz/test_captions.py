"""Caption files beside pictures, in any encoding and of any size."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.dataset import captions
from lora_trainer.dataset.captions import read_metadata
from lora_trainer.dataset.items import scan
from lora_trainer.errors import DataError
from tests.fuzz.harness import fuzz, readable, works_or_refuses
from tests.fuzz.inputs import TEXT, VALUES, dumps, file, mutated, pieces
from tests.fuzz.watch import ARENA

CSV = [
    "a.png",
    "file_name",
    "text",
    "caption",
    ",",
    ";",
    "\t",
    '"',
    '""',
    "\n",
    "\r\n",
    "\r",
    " ",
    "./",
    "\\",
    "猫",
    "é",
]
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "gb18030", "cp932", "latin-1"])
ENCODED = st.tuples(pieces(CSV), ENCODINGS).map(lambda drawn: drawn[0].encode(drawn[1], "replace"))
TABLE = 'file_name,text\na.png,"a cat, ""red"""\nb.png,a dog\n'
LINE = '{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": "a dog"}\n'
SEEDS = [text.encode(encoding) for text in (TABLE, LINE) for encoding in ("utf-8-sig", "utf-16", "gb18030", "utf-8")]
SUFFIX = st.sampled_from([".csv", ".jsonl", ".txt", ".JSON"])


def read(name: str, content: bytes) -> None:
    with works_or_refuses():
        rows, notes = read_metadata(file(name, content))
        assert rows
        for row in rows:
            assert row.file
            assert "\n" not in row.caption
            assert len(row.caption) <= captions.MAX_CAPTION
            f"{row.file}{row.caption}".encode()
        for note in notes:
            readable(note)


@fuzz("captions", 120, content=ENCODED | st.binary(max_size=200) | mutated(SEEDS), suffix=SUFFIX)
def test_any_bytes(content, suffix):
    read(f"metadata{suffix}", content)


ENTRY = st.dictionaries(st.sampled_from(["file_name", "text", "image", "caption", "x"]) | TEXT, VALUES, max_size=4)
LINES = st.lists(ENTRY.map(dumps) | VALUES.map(dumps) | pieces(['{"', '":', ",", "[", "}"], 6), max_size=5)


@fuzz("captions", 100, lines=LINES)
def test_any_json_lines(lines):
    read("metadata.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"))


NAMES = st.sampled_from(["metadata.csv", "metadata.jsonl", "a.txt", "a.png.txt", "a.caption", "10_cats/metadata.csv"])
FILES = st.dictionaries(NAMES, ENCODED | st.sampled_from(SEEDS) | st.binary(max_size=60), max_size=3)
ELSEWHERE = ["../outside/pictures/a.png", "/etc/passwd", "..\\outside\\secret.txt", "C:a.png", "//nas/a.png", "a.png"]
ROWS = st.sampled_from(ELSEWHERE).map(lambda name: {"metadata.jsonl": json.dumps({"file": name, "text": "x"}).encode()})


@fuzz("captions", 60, files=FILES | ROWS, words=TEXT)
def test_a_folder_with_any_captions(files, words):
    folder = ARENA.inside / "set"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "10_cats").mkdir(parents=True)
    for name in ("a.png", "b.png", "10_cats/c.png"):
        (folder / name).write_bytes(b"")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with works_or_refuses():
        found = scan(folder, trigger_words=words)
        assert all(item.path.resolve().is_relative_to(folder) for item in found.items)
        assert all("\n" not in item.caption or "\n" in words for item in found.items)
        for line in (*found.notes, *found.skipped):
            readable(line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a.png,x\n" * 300_000, "200,000 lines"),
        (b"\r" * 300_000, "200,000 lines"),
        (b"a," * 1_000_000, "1,000,000 characters"),
        (b'a.png,"' + b"x " * 15_000 + b'"', "20,000 characters"),
    ],
)
def test_too_much_is_said_in_a_moment(tmp_path, content, words):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_metadata(tmp_path / "metadata.csv")


def test_a_text_file_that_is_no_caption(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x " * 15_000)
    with pytest.raises(DataError, match=r"a\.txt: expected a caption of at most 20,000 characters"):
        scan(tmp_path)
