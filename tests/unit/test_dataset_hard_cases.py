"""Data sets as they come from other people's machines."""

from __future__ import annotations

import os
import random
import sys

import pytest
from PIL import Image

from lora_trainer.dataset.captions import read_metadata
from lora_trainer.dataset.encodings import decode
from lora_trainer.dataset.items import scan
from lora_trainer.errors import DataError

GB_LEVEL_1 = [bytes((a, b)).decode("gb2312") for a in range(0xB0, 0xD7) for b in range(0xA1, 0xFF)]
KANA = [chr(code) for code in (*range(0x3041, 0x3094), *range(0x30A1, 0x30F7))]
JIS_LEVEL_1 = [bytes((a, b)).decode("shift_jis") for a in range(0x89, 0x98) for b in range(0x9F, 0xFD)]


def picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    return path


@pytest.mark.parametrize(
    ("characters", "codec", "name"),
    [
        (GB_LEVEL_1, "gbk", "GBK"),
        (JIS_LEVEL_1, "cp932", "Shift-JIS"),
        (JIS_LEVEL_1 + KANA * 5, "cp932", "Shift-JIS"),
    ],
)
def test_a_few_everyday_characters_are_enough(tmp_path, characters, codec, name):
    rng = random.Random(0)
    for _ in range(300):
        text = "img01.jpg,a red " + "".join(rng.choices(characters, k=rng.randint(4, 9)))
        assert decode(tmp_path, text.encode(codec)) == (text, name)


@pytest.mark.parametrize("text", ["蔷薇", "img01.jpg,蔷薇 garden", "装咋"])
def test_gbk_that_happens_to_be_valid_utf_8(tmp_path, text):
    text.encode("gbk").decode("utf-8")
    assert decode(tmp_path, text.encode("gbk")) == (text, "GBK")


@pytest.mark.parametrize(
    "text",
    [
        *("café, naïve, Ångström", "Жар-птица", "αβγ", "שלום", "5 µm, 20 °C × 3", "Å–B", "é"),
        *("n.º 5 café", "α café", "Việt Nam ơ ư", "café שלום", "مرحبا é"),
    ],
)
def test_utf_8_of_two_byte_characters_stays_utf_8(tmp_path, text):
    assert decode(tmp_path, text.encode()) == (text, "UTF-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep file names as Unicode")
def test_a_name_that_is_no_text_is_skipped_by_a_name_that_can_be_printed(tmp_path):
    picture(tmp_path / "apple.png")
    os.rename(picture(tmp_path / "b.png"), os.fsencode(tmp_path) + b"/\xb9\xfb.png")
    found = scan(tmp_path)
    assert [item.path.name for item in found.items] == ["apple.png"]
    (skipped,) = found.skipped
    assert r"\udcb9\udcfb.png" in skipped
    skipped.encode()


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "\\ud83c\\udf4e"}\n{"file_name": "b.png", "text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"line 2: .*surrogate"):
        read_metadata(path)


def test_sub_folders_may_have_their_own_metadata(tmp_path):
    for name in ("10_cat/a.png", "dog/b.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "10_cat/metadata.csv").write_text("a.png,a cat\n")
    (tmp_path / "dog/metadata.jsonl").write_text('{"file_name": "b.png", "text": "a dog"}\n')
    (tmp_path / "metadata.csv").write_text("c.png,neither\ndog/b.png,a puppy\n")
    assert {item.path.name: item.caption for item in scan(tmp_path).items} == {
        "a.png": "a cat",
        "b.png": "a puppy",
        "c.png": "neither",
    }
    (tmp_path / "10_cat/metadata.csv").write_text("a.png,a cat\n10_cat/a.png,a cat\n")
    with pytest.raises(DataError, match=r"10_cat.metadata.csv: 1 of 2 rows .*line 2: 10_cat/a.png"):
        scan(tmp_path)


def test_one_metadata_file_given_is_the_only_one_read(tmp_path):
    picture(tmp_path / "sub/a.png")
    (tmp_path / "sub/metadata.csv").write_text("a.png,not this\n")
    given = tmp_path / "given.csv"
    given.write_text("sub/a.png,this\n")
    assert [item.caption for item in scan(tmp_path, metadata=given).items] == ["this"]


def test_a_quote_inside_quotes_is_explained(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text('a.png,"x"\nb.png,"a "big" dog"\n')
    with pytest.raises(DataError, match=r'line 2: .*a quote is written ""'):
        read_metadata(path)


@pytest.mark.parametrize(
    "stem",
    [
        "IMG_0001",
        "DSC01234",
        "P1010001",
        "WhatsApp Image 2024-01-01 at 10.00.00",
        "微信图片_20240101120000",
        "3f2a9b8c7d6e5f4a3b2c1d0e",
        "123e4567-e89b-12d3-a456-426614174000",
        "00012-1234567890",
    ],
)
def test_names_given_by_machines_give_way_to_the_folder(tmp_path, stem):
    picture(tmp_path / f"10_red style/{stem}.png")
    assert [item.caption for item in scan(tmp_path).items] == ["red style"]


def test_what_is_not_a_plain_file_is_not_read(tmp_path):
    picture(tmp_path / "apple.png")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "._apple.png").rename(tmp_path / "._apple.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
    assert [item.path.name for item in scan(tmp_path).items] == ["apple.png"]
