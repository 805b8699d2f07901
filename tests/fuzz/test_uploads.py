"""Uploaded files and zips: whatever they are called and whatever they say of themselves."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lora_trainer.dataset.concepts import numbered
from lora_trainer.errors import UserError
from lora_trainer.ui.uploads import Limits, Upload, receive
from tests.fuzz.harness import fuzz, readable, works_or_refuses
from tests.fuzz.inputs import TEXT, file, mutated
from tests.fuzz.watch import ARENA

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")
LIMITS = Limits(files=20, total=200_000, entries=30)
PLACES = ["../", "../../outside/", "/", "C:\\", "\\\\nas\\", "..\\", "a/../", "pictures/", "__MACOSX/", ".hidden/"]
PLACES += ["10_cat/", "10_cat/", "2_dog\\", "../10_cat/", "10_../", "10_:/", "1_\n/", "1_" + "a" * 300 + "/"]
ENDS = [".png", ".txt", ".csv", ".PNG", ".png ", ".png.", "\0.png", ".zip", ".exe", ":x.png", "", "/"]
STEMS = TEXT | st.sampled_from(["a", "nul", "a" * 300, "é", "A"])
NAMES = st.tuples(st.sampled_from(["", *PLACES]), STEMS, st.sampled_from(ENDS)).map("".join)
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
CONTENT = st.binary(max_size=50) | st.sampled_from([bytes(150_000), bytes(300_000), b"/etc/passwd"])
MODES = st.sampled_from([0o100644, 0o120777, 0o020666, 0o040755])


@st.composite
def archive(draw: st.DrawFn) -> bytes:
    """A zip of evil names, links and devices, with a size that may be a lie."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as packed:
            for name in draw(st.lists(NAMES, max_size=6)):
                entry = zipfile.ZipInfo(name.encode("utf-8", "replace").decode()[:60_000] or "a.png")
                entry.external_attr = draw(MODES) << 16
                entry.compress_type = draw(METHODS)
                packed.writestr(entry, draw(CONTENT))
        return buffer.getvalue()


def nameless() -> bytes:
    """With a file that is called nothing."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as packed:
            packed.writestr(zipfile.ZipInfo("\0"), b"x")
        return buffer.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Changed in its table of contents, which is at its end."""
    data = draw(archive())
    table = data.rfind(b"PK\1\2")
    if table < 0 or draw(st.booleans()):
        return draw(mutated([data]))
    return data[:table] + draw(mutated([data[table:]]))


FILES = st.lists(st.tuples(NAMES, CONTENT), max_size=4)


def arrive(uploads: list[Upload]) -> None:
    folder = ARENA.inside / "received"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with works_or_refuses():
        try:
            received = receive(uploads, folder, limits=LIMITS)
        except UserError:
            assert not folder.exists()
            raise
        found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        assert received.pictures + received.captions == len(found) <= LIMITS.files
        assert all(path.is_file() and not path.is_symlink() for path in found)
        for path in found:
            *places, name = path.relative_to(folder).parts
            assert not places or (len(places) == 1 and numbered(places[0]))
            assert all(part.isprintable() and not part.startswith(".") for part in (*places, name))
        assert sum(path.stat().st_size for path in found) <= LIMITS.total
        for line in received.skipped:
            readable(line)


@fuzz("uploads", 90, files=FILES)
def test_files_of_any_name(files):
    sent = [Upload(name, file(f"sent-{at}", content)) for at, (name, content) in enumerate(files)]
    arrive([*sent, Upload("fine.png", file("sent-fine", b"x"))])


@fuzz("uploads", 90, content=archive(), name=st.sampled_from(["set.zip", "x" * 5000 + ".ZIP", "\x1b[2J.zip"]))
def test_zips_of_any_names(content, name):
    arrive([Upload(name, file("sent.zip", content)), Upload("fine.png", file("sent-fine", b"x"))])


@fuzz("uploads", 120, [{"content": nameless()}], content=damaged())
def test_damaged_zips(content):
    arrive([Upload("set.zip", file("sent.zip", content))])


def test_a_missing_upload_is_a_refusal():
    with ARENA.watched():
        arrive([Upload("a.png", Path(ARENA.inside / "no-such-file"))])
