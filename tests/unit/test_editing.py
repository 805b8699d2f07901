"""The caption editor without a page: what is shown, what an edit writes, and what undo gives back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.dataset.items import read_folder
from lora_trainer.editing import tags
from lora_trainer.editing.actions import Add, Remove, Replace, Write
from lora_trainer.editing.album import Search, common
from lora_trainer.editing.editor import MAX_OPEN, MAX_STEPS, Editor
from lora_trainer.editing.thumbnails import Thumbnails
from lora_trainer.errors import DataError, OutputError

CSV = 'file_name;rating;text\r\na.png;5;"a cat; sleeping"\r\n b.png ; 3 ;dog\r\n\r\nc.png;1;""\r\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (80, 60), "red").save(place / f"{name}.png")
    return place


@pytest.fixture
def editor() -> Editor:
    return Editor()


def act(editor: Editor, folder: Path, action, *names: str, metadata: Path | None = None) -> int:
    opened = editor.open(folder, metadata)
    wanted = names or tuple(opened.album.pictures)
    return editor.edit(opened, opened.version, [opened.album.pictures[name] for name in wanted], action)


def undo(editor: Editor, folder: Path, metadata: Path | None = None) -> str:
    opened = editor.open(folder, metadata)
    return editor.undo(opened, opened.version)


def captions(editor: Editor, folder: Path) -> dict[str, str]:
    """As the editor shows them, which is as training reads them."""
    shown = {name: picture.caption for name, picture in editor.open(folder, None).album.pictures.items()}
    read = read_folder(folder, complain=lambda *_: None)
    if read.homes:
        told = {image.relative_to(folder).as_posix(): text for image, (text, _) in read.captions.items()}
        assert told == {name: " ".join(text.split()) for name, text in shown.items() if text}
    return shown


# Tags


def test_a_tag_is_replaced_once_and_where_it_was() -> None:
    assert tags.with_tag_replaced("cat, dog, Cat", "CAT", ["tom", "tabby"]) == "tom, tabby, dog"
    assert tags.with_tag_replaced("cat, dog, tom", "cat", ["tom"]) == "dog, tom"
    assert tags.with_tag_replaced("cats, dog", "cat", ["tom"]) == "cats, dog"
    assert tags.with_text_replaced("a cat, cats", "cat", "dog") == "a dog, dogs"
    assert tags.typed(" 猫，dog, Dog,, ") == ["猫", "dog"]


# Text files


def test_a_caption_goes_where_it_was(editor: Editor, folder: Path) -> None:
    (folder / "a.txt").write_bytes("один, two\r\nthree, two\r\n".encode("utf-8-sig"))
    (folder / "b.png.caption").write_bytes("眠る猫、夜".encode("cp932"))
    (folder / "c.txt").write_bytes(b"")
    assert captions(editor, folder) == {
        "a.png": "один, two\nthree, two",
        "b.png": "眠る猫、夜",
        "c.png": "",
        "d.png": "",
    }
    assert act(editor, folder, Add("new")) == 4
    assert (folder / "a.txt").read_bytes() == "один, two, new\r\nthree, two, new\r\n".encode("utf-8-sig")
    assert (folder / "b.png.caption").read_bytes() == "眠る猫、夜, new".encode("cp932")
    assert (folder / "c.txt").read_bytes() == b"new\n"
    assert (folder / "d.txt").read_bytes() == b"new\n"
    assert captions(editor, folder)["a.png"] == "один, two, new\nthree, two, new"
    undo(editor, folder)
    assert (folder / "a.txt").read_bytes() == "один, two\r\nthree, two\r\n".encode("utf-8-sig")
    assert (folder / "c.txt").read_bytes() == b""
    assert not (folder / "d.txt").exists()
    assert captions(editor, folder)["d.png"] == ""


def test_what_an_encoding_lacks_is_not_written(editor: Editor, folder: Path) -> None:
    before = "眠る猫、夜".encode("cp932")
    (folder / "a.txt").write_bytes(before)
    with pytest.raises(DataError, match=r"a\.txt: its encoding has not all of these characters"):
        act(editor, folder, Write("眠る猫 🐈"), "a.png")
    assert (folder / "a.txt").read_bytes() == before


def test_words_that_would_be_read_as_another_encoding_are_marked(editor: Editor, folder: Path) -> None:
    text = "ǾỸ"[0] + "\u07b1"  # what GBK's 蔷薇 looks like in UTF-8
    act(editor, folder, Write(text), "a.png")
    assert captions(editor, folder)["a.png"] == text


def test_pictures_of_one_name_get_files_of_their_own(editor: Editor, folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "a.jpg")
    act(editor, folder, Write("a png"), "a.png")
    act(editor, folder, Write("a jpg"), "a.jpg")
    assert (folder / "a.png.txt").read_text() == "a png\n"
    assert (folder / "a.jpg.txt").read_text() == "a jpg\n"
    (folder / "b.txt").write_text("both")
    Image.new("RGB", (9, 9)).save(folder / "b.jpg")
    editor.open(folder, None, fresh=True)
    act(editor, folder, Write("the same"), "b.jpg")
    assert captions(editor, folder)["b.png"] == "the same"


def test_an_emptied_caption_is_no_caption(editor: Editor, folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "a.png.txt").write_text("another")
    assert act(editor, folder, Remove("ONE"), "a.png") == 1
    assert captions(editor, folder)["a.png"] == "another"


# Tables


def test_a_table_keeps_everything_else(editor: Editor, folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_bytes(CSV.encode("utf-16"))
    assert captions(editor, folder) == {"a.png": "a cat; sleeping", "b.png": "dog", "c.png": "", "d.png": ""}
    assert act(editor, folder, Add('so "big"; wet')) == 4
    expected = (
        'file_name;rating;text\r\na.png;5;"a cat; sleeping, so ""big""; wet"\r\n b.png ; 3 ;"dog, so ""big""; wet"\r\n'
        '\r\nc.png;1;"so ""big""; wet"\r\nd.png;;"so ""big""; wet"\r\n'
    )
    assert table.read_bytes() == expected.encode("utf-16")
    assert captions(editor, folder)["d.png"] == 'so "big"; wet'
    undo(editor, folder)
    assert table.read_bytes() == CSV.encode("utf-16")
    assert not (folder / "d.txt").exists()


def test_a_table_without_a_header(editor: Editor, folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_bytes(b'a.png, a cat, at night \nb.png,"dog"')
    act(editor, folder, Add("x", front=True), "a.png", "b.png", "c.png")
    assert table.read_bytes() == b'a.png, "x, a cat, at night" \nb.png,"x, dog"\nc.png,x\n'
    assert captions(editor, folder)["a.png"] == "x, a cat, at night"


def test_what_would_be_read_otherwise_is_not_written(editor: Editor, folder: Path) -> None:
    # At the end of a row without a header a delimiter counts as an empty cell.
    table = folder / "metadata.csv"
    table.write_text("a.png;cat\n")
    with pytest.raises(DataError, match="cannot be written into it"):
        act(editor, folder, Write("cat;"), "a.png")
    assert table.read_text() == "a.png;cat\n"


def test_json_lines_keep_their_keys_and_numbers(editor: Editor, folder: Path) -> None:
    table = folder / "metadata.jsonl"
    lines = [
        '{"w": 1.50,  "text":"猫","file_name": "a.png", "k": [1e5, {"text": "no"}]}',
        '{"file_name": "b.png", "text": "dog"}',
    ]
    table.write_bytes("\r\n".join(lines).encode())
    act(editor, folder, Replace("猫", "cat\\dog"), "a.png")
    act(editor, folder, Write("new"), "c.png")
    after = table.read_bytes().decode().split("\r\n")
    assert after[0] == '{"w": 1.50,  "text":"cat\\\\dog","file_name": "a.png", "k": [1e5, {"text": "no"}]}'
    assert after[1] == lines[1]
    assert json.loads(after[2]) == {"file_name": "c.png", "text": "new"}
    assert captions(editor, folder)["a.png"] == "cat\\dog"


def test_rows_that_cannot_be_read_stay(editor: Editor, folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_text("file_name,text\na.png,cat\nb.png,one,two\nmissing.png,x\na.png,again\n")
    assert editor.open(folder, None).album.notes
    act(editor, folder, Add("y"), "a.png")
    assert table.read_text() == 'file_name,text\na.png,"cat, y"\nb.png,one,two\nmissing.png,x\na.png,again\n'


def test_a_table_with_no_row_of_the_pictures_takes_one(editor: Editor, folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nold.png,gone\n")
    act(editor, folder, Write("a cat"), "a.png")
    assert (folder / "metadata.csv").read_text() == "file_name,text\nold.png,gone\na.png,a cat\n"
    assert captions(editor, folder)["a.png"] == "a cat"


def test_a_table_that_is_no_caption_file_is_left_alone(editor: Editor, folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_bytes(b"a.png,cat\n" * 4_000_000)
    assert "at most" in editor.open(folder, None).album.notes[0]
    with pytest.raises(DataError, match=r"metadata\.csv: expected a caption file that can be read"):
        act(editor, folder, Write("x"), "b.png")
    with pytest.raises(DataError, match=r"missing\.csv: expected a caption file that can be read"):
        act(editor, folder, Write("x"), "b.png", metadata=tmp_path / "missing.csv")
    assert not (folder / "b.txt").exists()


def test_a_caption_file_named_elsewhere(editor: Editor, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "words.csv"
    other.write_text("a.png,cat\n")
    act(editor, folder, Write("dog"), "b.png", metadata=other)
    assert other.read_text() == "a.png,cat\nb.png,dog\n"


def test_pictures_in_sub_folders(editor: Editor, folder: Path) -> None:
    (folder / "10_cat").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "10_cat" / "e.png")
    (folder / "10_cat" / "metadata.csv").write_text("file_name,text\ne.png,cat\n")
    assert act(editor, folder, Add("x"), "10_cat/e.png") == 1
    assert (folder / "10_cat" / "metadata.csv").read_text() == 'file_name,text\ne.png,"cat, x"\n'


def test_a_split_of_a_data_set(editor: Editor, tmp_path: Path) -> None:
    place = tmp_path / "set" / "train" / "cats"
    place.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(place / "a.png")
    table = tmp_path / "set" / "train" / "metadata.csv"
    table.write_text("file_name,text\ncats/b.png,a cat\n")
    assert act(editor, tmp_path / "set", Write("a dog"), "train/cats/a.png") == 1
    assert table.read_text() == "file_name,text\ncats/b.png,a cat\ncats/a.png,a dog\n"
    assert captions(editor, tmp_path / "set") == {"train/cats/a.png": "a dog"}


# Undo, and others who write


def test_undo_goes_back_step_by_step(editor: Editor, folder: Path) -> None:
    (folder / "metadata.csv").write_text(before := "file_name,text\na.png,cat\nb.png,dog\nc.png,x\nd.png,y\n")
    seen = [before]
    for number in range(4):
        act(editor, folder, Add(f"tag {number}"))
        seen.append((folder / "metadata.csv").read_text())
    assert len(set(seen)) == 5
    for text in reversed(seen[:-1]):
        undo(editor, folder)
        assert (folder / "metadata.csv").read_text() == text
    with pytest.raises(DataError, match="nothing to undo"):
        undo(editor, folder)


def test_what_another_program_wrote_is_not_lost(editor: Editor, folder: Path) -> None:
    (folder / "a.txt").write_text("cat")
    (folder / "b.txt").write_text("dog")
    act(editor, folder, Add("x"), "a.png", "b.png")
    (folder / "b.txt").write_text("theirs")
    with pytest.raises(DataError, match=r"b\.txt: was changed by another program"):
        act(editor, folder, Add("y"))
    assert [(folder / f"{name}.txt").read_text() for name in "ab"] == ["cat, x", "theirs"]
    assert not (folder / "c.txt").exists()
    # It is on show now, and an edit adds to it.
    assert captions(editor, folder)["b.png"] == "theirs"
    with pytest.raises(DataError, match="was changed by another program"):
        undo(editor, folder)
    act(editor, folder, Add("y"), "b.png")
    assert (folder / "b.txt").read_text() == "theirs, y"
    (folder / "c.txt").write_text("new file")
    with pytest.raises(DataError, match=r"c\.txt: was changed"):
        act(editor, folder, Add("y"), "c.png")
    (folder / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: was changed"):
        act(editor, folder, Add("y"), "a.png")


def test_a_page_that_is_behind_changes_nothing(editor: Editor, folder: Path) -> None:
    opened = editor.open(folder, None)
    old = opened.version
    act(editor, folder, Write("cat"), "a.png")
    with pytest.raises(DataError, match="from another page"):
        editor.edit(opened, old, list(opened.album.pictures.values()), Add("x"))
    with pytest.raises(DataError, match="from another page"):
        editor.undo(opened, old)
    assert (folder / "a.txt").read_text() == "cat\n"


def test_a_full_disk_loses_nothing(editor: Editor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.txt").write_text("cat")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    act(editor, folder, Add("x"), "a.png")
    monkeypatch.setattr("lora_trainer.files._write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        act(editor, folder, Add("y"))
    monkeypatch.undo()
    assert (folder / "a.txt").read_text() == "cat, x"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt", "b.png", "c.png", "d.png"]
    assert undo(editor, folder) == "add “x” (a.png)"
    assert (folder / "a.txt").read_text() == "cat"


def test_an_edit_is_done_to_all_or_none(editor: Editor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_one(source: Path, target: Path) -> None:
        if target.name == "c.txt":
            raise OSError(5, "Input/output error")
        source.replace(target)

    (folder / "a.txt").write_text("cat")
    monkeypatch.setattr("lora_trainer.files._rename", only_one)
    with pytest.raises(OutputError, match=r"c\.txt: not written"):
        act(editor, folder, Add("y"))
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt", "b.png", "c.png", "d.png"]
    assert (folder / "a.txt").read_text() == "cat"
    assert editor.open(folder, None).steps == []


def test_only_so_much_is_remembered(editor: Editor, folder: Path, tmp_path: Path) -> None:
    for number in range(MAX_STEPS + 5):
        act(editor, folder, Write(f"caption {number}"), "a.png")
    assert len(editor.open(folder, None).steps) == MAX_STEPS
    for number in range(MAX_OPEN):
        place = tmp_path / str(number)
        place.mkdir()
        Image.new("RGB", (9, 9)).save(place / "z.png")
        editor.open(place, None)
    assert editor.open(folder, None).steps == []


def test_bad_words_are_refused_and_named(editor: Editor, folder: Path) -> None:
    for text, problem in (("a\0b", "no words|is none"), ("x" * 20_001, "at most 20,000"), ("a\ud800", "is none")):
        with pytest.raises(DataError, match=problem):
            act(editor, folder, Write(text), "a.png")
    for action in (Add(" , "), Remove(""), Replace("", "x"), Replace("", "x", text=True), Replace("a, b", "x")):
        with pytest.raises(DataError, match="expected"):
            act(editor, folder, action)
    assert act(editor, folder, Write("  a,  cat ,"), "a.png") == 1
    assert act(editor, folder, Write("a, cat"), "a.png") == 0
    assert captions(editor, folder)["a.png"] == "a, cat"


def test_a_folder_without_pictures(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected pictures"):
        editor.open(tmp_path, None)
    with pytest.raises(DataError, match="no such folder"):
        editor.open(tmp_path / "missing", None)


# Looking


def test_search_and_counts(editor: Editor, folder: Path) -> None:
    for name, text in {"a": "Cat, night", "b": "cat, day", "c": "dog, night, night"}.items():
        (folder / f"{name}.txt").write_text(text)
    album = editor.open(folder, None).album

    def found(**asked: object) -> list[str]:
        return [picture.name[0] for picture in album.found(Search(**asked))]

    assert found() == ["a", "b", "c", "d"]
    assert found(words="NIGHT c") == ["a", "c"]
    assert found(words="b.png") == ["b"]
    assert found(tags=("cat", "Night")) == ["a"]
    assert found(tags=("nigh",)) == []
    assert found(without=True) == ["d"]
    everything = list(album.pictures.values())
    assert common(everything, 9) == [("Cat", 2), ("night", 2), ("day", 1), ("dog", 1)]
    assert common(everything, 2, rare=True) == [("day", 1), ("dog", 1)]


def test_thumbnails_are_small_upright_and_kept(folder: Path, tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path / "kept")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4000, 2000), "red").save(folder / "big.jpg", exif=exif)
    made = thumbnails.get(folder / "big.jpg", "small")
    (kept,) = (tmp_path / "kept").glob("*/*.jpg")
    assert kept.read_bytes() == made
    assert Image.open(kept).size == (128, 256)
    kept.write_bytes(b"from the disk\xff\xd9")
    assert thumbnails.get(folder / "big.jpg", "small") == b"from the disk\xff\xd9"
    kept.write_bytes(made[:100])
    assert thumbnails.get(folder / "big.jpg", "small") == made
    Image.new("RGB", (100, 100), "blue").save(folder / "big.jpg")
    assert thumbnails.get(folder / "big.jpg", "small") != made
    thumbnails.trim(0)
    assert list((tmp_path / "kept").glob("*/*.jpg")) == []
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(DataError, match=name):
            thumbnails.get(folder / name, "large")
