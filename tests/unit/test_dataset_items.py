"""A folder becomes items with captions, or one clear line says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.dataset.items import read_folder, scan, with_trigger
from lora_trainer.errors import DataError


def folder(tmp_path: Path, **files: str) -> Path:
    """A folder of empty files (looking at what is there decodes nothing) and texts."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def captions(found) -> dict[str, str]:
    return {item.path.name: item.caption for item in found.items}


def problem(where: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        scan(where, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_captions_from_metadata(tmp_path):
    where = folder(tmp_path, **{"b.png": "", "a.JPG": "", "metadata.csv": 'a.JPG,"a cat"\n./b.png,a dog\n'})
    found = scan(where)
    assert [(item.path, item.caption, item.source) for item in found.items] == [
        (where / "a.JPG", "a cat", "metadata.csv"),
        (where / "b.png", "a dog", "metadata.csv"),
    ]
    assert found.notes == found.skipped == ()


def test_captions_from_jsonl_and_from_a_file_elsewhere(tmp_path):
    where = folder(tmp_path / "d", **{"a.png": "", "metadata.jsonl": '{"file_name": "a.png", "text": "one"}'})
    assert captions(scan(where)) == {"a.png": "one"}
    other = folder(tmp_path, **{"other.csv": "a.png,two\n"}) / "other.csv"
    assert captions(scan(where, metadata=other)) == {"a.png": "two"}
    assert "missing.csv" in problem(where, metadata=tmp_path / "missing.csv")


def test_sub_folders_one_level_deep_in_a_stable_order(tmp_path):
    names = ["z.png", "B.png", "a.png", "sub/x.webp", "sub/deep/y.png", ".hidden/h.png", ".h.png", "é.png"]
    where = folder(tmp_path, **dict.fromkeys(names, ""))
    found = [item.path.relative_to(where).as_posix() for item in scan(where).items]
    assert found == ["B.png", "a.png", "sub/x.webp", "z.png", "é.png"]


@pytest.mark.parametrize("name", ["sub/a.png", "sub\\a.png", "./sub/a.png", ".\\sub\\a.png"])
def test_paths_in_rows(tmp_path, name):
    where = folder(tmp_path, **{"sub/a.png": "", "metadata.csv": f"{name},a cat\n"})
    assert captions(scan(where)) == {"a.png": "a cat"}


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "sub/../../a.png", "C:\\a.png", "\\\\host\\a.png"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    where = folder(tmp_path / "d", **{"a.png": "", "metadata.csv": f"a.png,x\n{name},a cat\n"})
    assert "metadata.csv, line 2: expected a name inside the folder" in problem(where)


def test_names_that_macos_decomposed(tmp_path):
    where = folder(tmp_path, **{"が.png": "", "metadata.csv": "か\u3099.png,a cat\n"})
    assert [item.caption for item in scan(where).items] == ["a cat"]


def test_rows_of_missing_pictures_are_named_and_counted(tmp_path):
    rows = "a.png,x\n" + "".join(f"gone{n}.png,y\n" for n in range(5))
    message = problem(folder(tmp_path, **{"a.png": "", "metadata.csv": rows}))
    assert "5 of 6 rows" in message
    assert "(line 2: gone0.png, line 3: gone1.png, line 4: gone2.png, …)" in message


def test_sidecars(tmp_path):
    where = folder(tmp_path, **{"a.png": "", "a.txt": " a\n cat ", "b.png": "", "b.caption": "a dog"})
    folder(where, **{"c.png": "", "c.png.txt": "a fox", "d.png": "", "d.txt": "", "d.caption": "a hen"})
    found = scan(where)
    assert captions(found) == {"a.png": "a cat", "b.png": "a dog", "c.png": "a fox", "d.png": "a hen"}
    assert [item.source for item in found.items] == [".txt", ".caption", ".txt", ".caption"]


def test_metadata_goes_before_sidecars_which_fill_its_gaps(tmp_path):
    texts = {"metadata.csv": "a.png,from csv\nc.png,\n", "a.txt": "no", "b.txt": "from txt", "c.txt": "also txt"}
    where = folder(tmp_path, **texts, **dict.fromkeys(("a.png", "b.png", "c.png"), ""))
    assert captions(scan(where)) == {"a.png": "from csv", "b.png": "from txt", "c.png": "also txt"}


def test_the_encoding_of_captions_is_said(tmp_path):
    where = folder(tmp_path, **{"a.png": ""})
    (where / "a.txt").write_bytes("一只可爱的猫".encode("gbk"))
    found = scan(where)
    assert (captions(found), found.notes) == ({"a.png": "一只可爱的猫"}, ("a.txt: read as GBK",))
    (where / "metadata.csv").write_bytes("a.png,赤いりんご".encode("cp932"))
    found = scan(where)
    assert (captions(found), found.notes) == ({"a.png": "赤いりんご"}, ("metadata.csv: read as Shift-JIS",))


def test_some_captions_and_some_gaps_are_an_error(tmp_path):
    where = folder(tmp_path, **{f"{n}.png": "" for n in range(6)}, **{"3.txt": "a cat"})
    message = problem(where)
    assert "5 of 6 pictures have no caption (0.png, 1.png, 2.png, …)" in message
    assert "add a row or a .txt file" in message


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_apple-01", "red apple"),
        ("red apple (2)", "red apple"),
        ("001-ticket", "ticket"),
        ("blue.car", "blue.car"),
        ("IMG_0001", "my style"),
        ("DSC1234", "my style"),
        ("DSCN0042 (1)", "my style"),
        ("0001", "my style"),
        ("20240101_120000", "my style"),
    ],
)
def test_without_any_caption_names_are_used_and_that_is_said(tmp_path, name, caption):
    where = folder(tmp_path / "10_my_style", **{f"{name}.png": ""})
    found = scan(where)
    assert [(item.caption, item.source) for item in found.items] == [(caption, "file name")]
    assert len(found.notes) == 1
    assert f'{name}.png is "{caption}"' in found.notes[0]


def test_folders_that_cannot_be_trained_on(tmp_path):
    assert "no such folder" in problem(tmp_path / "missing")
    file = folder(tmp_path, **{"a.txt": "x"}) / "a.txt"
    assert "found a file" in problem(file)
    assert "found none among 1 files" in problem(tmp_path)
    (tmp_path / "x.png").mkdir()
    assert "found none" in problem(tmp_path)


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path):
    where = folder(tmp_path, **{"a.png": "", "b.HEIC": "", "notes.md": ""})
    assert scan(where).skipped == (f"{where / 'b.HEIC'}: .HEIC pictures are not read; save it as PNG or JPEG",)


@pytest.mark.parametrize(
    ("caption", "words", "expected"),
    [
        ("a cat", "sks style", "sks style, a cat"),
        ("a cat", " sks style, ", "sks style, a cat"),
        ("a cat, SKS Style", "sks style", "a cat, SKS Style"),
        ("asks style", "sks style", "sks style, asks style"),
        ("sks styles", "sks style", "sks style, sks styles"),
        ("a (cat", "(cat", "a (cat"),
        ("a cat", "", "a cat"),
        ("a cat", "  ", "a cat"),
    ],
)
def test_trigger_words_lead_captions_that_lack_them(caption, words, expected):
    assert with_trigger(caption, words) == expected


def test_trigger_words_of_a_folder(tmp_path):
    where = folder(tmp_path, **{"a.png": "", "metadata.csv": "a.png,a cat\n"})
    assert captions(scan(where, trigger_words="sks")) == {"a.png": "sks, a cat"}


def test_reading_goes_on_past_what_is_complained_of(tmp_path):
    rows = "a.png,a cat\n../b.png,out\na.png,again\nghost.png,gone\n,no name\nc.png,\ne.png,a hen\n"
    pictures = dict.fromkeys(("a.png", "b.png", "c.png", "d.png", "e.png", "sub/deep/f.png"), "")
    where = folder(tmp_path, **pictures, **{"metadata.csv": rows, "b.txt": "x" * 30_000, "d.txt": "a dog"})
    told = []
    found = read_folder(where, complain=lambda place, problem: told.append((place.name, str(problem))))
    assert {image.name: text for image, (text, _) in found.captions.items()} == {
        "a.png": "a cat",
        "d.png": "a dog",
        "e.png": "a hen",
    }
    assert [place for place, _ in told] == ["metadata.csv"] * 4 + ["b.txt"]
    for (_, text), words in zip(
        told,
        ("lines 1 and 3", "expected a file name", "line 2", "line 4: ghost.png", "at most 20,000 characters"),
        strict=True,
    ):
        assert words in text
    assert [image.name for image in found.empty] == ["c.png"]
    assert [place.name for place in found.deeper] == ["deep"]
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "missing", complain=lambda place, problem: None)


def test_what_stops_a_training_is_complained_of_and_no_more(tmp_path):
    """`scan` is `read_folder` that stops at its first complaint."""
    where = folder(tmp_path, **{"a.png": "", "metadata.csv": "a.png,a cat\nghost.png,gone\n"})
    told = []
    read_folder(where, complain=lambda place, problem: told.append(str(problem)))
    assert told == [problem(where)]
