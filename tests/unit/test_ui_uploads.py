"""Uploads: flat, bounded, and without trust in names."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from lora_trainer.errors import DataError
from lora_trainer.ui.uploads import Limits, Received, Upload, receive


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Upload:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Upload(path.name, path)


def plain(folder: Path, name: str, data: bytes = b"x", stored_as: str = "sent") -> Upload:
    path = folder / f"{stored_as}-{len(list(folder.iterdir()))}"
    path.write_bytes(data)
    return Upload(name, path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_pictures_and_captions_of_files_and_zips_lie_flat(sent: Path, target: Path):
    archive = packed(sent / "set.ZIP", {"style/a.PNG": b"1", "style/a.txt": b"a cat", "metadata.csv": b"f"})
    found = receive([plain(sent, "b.jpg", b"2"), archive, plain(sent, "c.caption")], target)
    assert names(target) == {"a.PNG", "a.txt", "metadata.csv", "b.jpg", "c.caption"}
    assert (target / "a.PNG").read_bytes() == b"1"
    assert found == Received(target, pictures=2, captions=3)


def test_folders_whose_names_mean_something_stay(sent: Path, target: Path):
    files = {"set/10_cat/1.png": b"1", "set/10_cat/1.txt": b"a cat", "set\\2_dog/1.png": b"2", "set/x.csv": b"x"}
    found = receive([packed(sent / "set.zip", files), plain(sent, "b.jpg")], target)
    kept = {"10_cat", "10_cat/1.png", "10_cat/1.txt", "2_dog", "2_dog/1.png", "x.csv", "b.jpg"}
    assert names(target) == kept
    assert (found.pictures, found.captions) == (3, 2)
    assert (target / "2_dog/1.png").read_bytes() == b"2"


@pytest.mark.parametrize("other", ["dog/2.png", "10_..\\2.png", "0_dog/2.png", "../10_a:b/2.png", "10_x./2.png"])
def test_with_one_other_folder_all_lie_flat(other: str, sent: Path, target: Path):
    receive([packed(sent / "set.zip", {"../../10_cat/1.png": b"1", other: b"2"})], target)
    assert names(target) == {"1.png", "2.png"}


@pytest.mark.parametrize(
    "name",
    ["../../a.png", "/etc/a.png", "..\\..\\a.png", "C:\\windows\\a.png", "x/../../../a.png", "\\\\server\\a.png"],
)
def test_no_path_of_a_zip_is_used(name: str, sent: Path, target: Path):
    receive([packed(sent / "evil.zip", {name: b"1"})], target)
    assert names(target) == {"a.png"}
    assert names(target.parent) == {"sent", "sent/evil.zip", "target", "target/a.png"}


def test_what_is_no_data_set_is_left_out_and_said(sent: Path, target: Path):
    files = {
        "a.png": b"1",
        "run.exe": b"x",
        "more.zip": b"x",
        "page.html": b"x",
        "nul.png": b"x",
        "a:b.png": b"x",
        "new\nline.png": b"x",
        "n" * 300 + ".png": b"x",
        ".png": b"x",
        "__MACOSX/._a.png": b"x",
        ".hidden/b.png": b"x",
    }
    found = receive([packed(sent / "set.zip", files)], target)
    assert names(target) == {"a.png"}
    assert len(found.skipped) == 7
    assert not any("MACOSX" in line or "hidden" in line for line in found.skipped)


def test_a_name_twice_is_refused_rather_than_overwritten(sent: Path, target: Path):
    archive = packed(sent / "set.zip", {"cats/1.png": b"1", "dogs/1.PNG": b"2"})
    with pytest.raises(DataError, match=r"1\.PNG twice \(cats/1\.png and dogs/1\.PNG\)"):
        receive([archive], target)
    assert not target.exists()


def test_a_bomb_ends_at_the_limit_whatever_its_header_says(sent: Path, target: Path):
    upload = packed(sent / "bomb.zip", {"a.png": bytes(5_000_000)})
    assert upload.path.stat().st_size < 10_000
    raw = upload.path.read_bytes()
    upload.path.write_bytes(raw.replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DataError):
        receive([upload], target, limits=Limits(total=1_000_000))
    assert not target.exists()


def test_sizes_and_counts_add_up_over_all_uploads(sent: Path, tmp_path: Path):
    files = [plain(sent, f"{number}.png", bytes(600)) for number in range(3)]
    for limits, words in ((Limits(total=1500), "GiB unpacked"), (Limits(files=2), "at most 2 files")):
        folder = tmp_path / words
        folder.mkdir()
        with pytest.raises(DataError, match=words):
            receive(files, folder, limits=limits)
        assert not folder.exists()
    upload = packed(sent / "many.zip", {f"{number}.exe": b"" for number in range(5)})
    (tmp_path / "many").mkdir()
    with pytest.raises(DataError, match="at most 4 files, found 5"):
        receive([upload], tmp_path / "many", limits=Limits(entries=4))


def test_a_zip_that_cannot_be_read_is_one_line(sent: Path, tmp_path: Path):
    whole = packed(sent / "whole.zip", {"a.png": bytes(range(256)) * 40}, zipfile.ZIP_STORED).path.read_bytes()
    rare = packed(sent / "rare.zip", {"a.png": b"1"}, zipfile.ZIP_BZIP2).path.read_bytes()
    locked = bytearray(whole)
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[whole.index(header) + flags] |= 1
    broken = bytearray(whole)
    broken[100] ^= 0xFF
    cases = {
        "cut": (whole[:-30], "not a whole zip"),
        "text": (b"hello", "not a whole zip"),
        "crc": (bytes(broken), "not a whole zip"),
        "locked": (bytes(locked), "without a password"),
        "rare": (rare, "ordinary zip"),
    }
    for name, (data, words) in cases.items():
        path = sent / f"{name}-case.zip"
        path.write_bytes(data)
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(DataError, match=words) as error:
            receive([Upload("my set.zip", path)], folder)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("my set.zip: ")
        assert not folder.exists()


def test_nothing_to_train_on_is_refused(sent: Path, target: Path):
    with pytest.raises(DataError, match="expected pictures"):
        receive([plain(sent, "a.txt")], target)
    assert not target.exists()
    with pytest.raises(DataError, match="expected pictures"):
        receive([], target)


def test_a_link_in_a_zip_becomes_a_plain_file(sent: Path, target: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("a.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    receive([plain(sent, "set.zip", buffer.getvalue())], target)
    assert not (target / "a.png").is_symlink()
    assert (target / "a.png").read_bytes() == b"/etc/passwd"


def test_a_zip_entry_without_a_name_is_one_line(sent: Path, target: Path):
    upload = packed(sent / "set.zip", {"x": b""})
    raw = upload.path.read_bytes()
    nameless = raw.replace(b"x", b"").replace(b"\1\0\0\0", b"\0\0\0\0")
    for content in (nameless, raw.replace(b"\1\0\0\0", b"\0\0\0\0")):
        upload.path.write_bytes(content)
        target.mkdir(exist_ok=True)
        with pytest.raises(DataError, match="^(set.zip|upload): "):
            receive([upload], target)
        assert not target.exists()


def test_long_names_are_cut_in_what_is_said(sent: Path, target: Path):
    found = receive([packed(sent / "set.zip", {"x" * 60_000: b"", "\x1b[2J.exe": b"", "a.png": b"1"})], target)
    assert len("".join(found.skipped)) < 600
    assert not any("\x1b" in line for line in found.skipped)
