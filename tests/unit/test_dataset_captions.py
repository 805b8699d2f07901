"""Caption files as people, Excel and scripts write them."""

from __future__ import annotations

import codecs

import pytest

from lora_trainer.dataset import captions
from lora_trainer.dataset.captions import Row, read_metadata
from lora_trainer.errors import DataError

CHINESE = "一只可爱的猫坐在窗边"
JAPANESE = "窓辺に座る可愛い猫"


def rows(tmp_path, content, name="metadata.csv"):
    return read(tmp_path, content, name)[0]


def read(tmp_path, content, name="metadata.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_metadata(path)


def problem(tmp_path, content, name="metadata.csv"):
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    return str(caught.value)


def test_without_a_header(tmp_path):
    found, notes = read(tmp_path, 'img01.jpg,"a cat, sitting"\nimg02.jpg,a dog\n')
    assert found == [Row(1, "img01.jpg", "a cat, sitting"), Row(2, "img02.jpg", "a dog")]
    assert notes == []


@pytest.mark.parametrize("file", ["file_name", "file", "image", "filename", "File_Name"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt", "description"])
def test_with_a_header(tmp_path, file, text):
    assert rows(tmp_path, f"{file},{text}\na.jpg,a cat\n") == [Row(2, "a.jpg", "a cat")]
    assert rows(tmp_path, f'{text},{file}\n"a cat, big",a.jpg\n') == [Row(2, "a.jpg", "a cat, big")]


def test_other_columns_are_named(tmp_path):
    found, notes = read(tmp_path, "id,file_name,width,text\n1,a.jpg,512,a cat\n")
    assert found == [Row(2, "a.jpg", "a cat")]
    assert notes == ["metadata.csv: columns not used: id, width"]


def test_a_header_without_a_caption_column(tmp_path):
    assert "expected a column text or caption" in problem(tmp_path, "file_name,label\na.jpg,cat\n")


def test_unquoted_commas_of_a_plain_row_belong_to_its_caption(tmp_path):
    assert rows(tmp_path, "a.jpg,1girl,red hair,  smile,\n") == [Row(1, "a.jpg", "1girl, red hair, smile")]


def test_unquoted_commas_under_a_header_are_an_error(tmp_path):
    message = problem(tmp_path, "file_name,text\na.jpg,ok\nb.jpg,1girl,red hair\n")
    assert "line 3: expected 2 columns, found 3" in message


def test_a_row_that_is_too_short(tmp_path):
    assert "line 2: expected a file name and a caption" in problem(tmp_path, "a.jpg,a cat\nb.jpg\n")
    assert "line 2: expected 2 columns, found 1" in problem(tmp_path, "file_name,text\nb.jpg\n")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs(tmp_path, delimiter):
    plain = f"a.jpg{delimiter}a cat, sitting\nb.jpg{delimiter}a dog, big\n"
    expected = [Row(1, "a.jpg", "a cat, sitting"), Row(2, "b.jpg", "a dog, big")]
    assert rows(tmp_path, plain) == expected
    headed = f"file_name{delimiter}text\na.jpg{delimiter}a cat, sitting\n"
    assert rows(tmp_path, headed) == [Row(2, "a.jpg", "a cat, sitting")]


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_line_ends_blank_lines_and_spaces(tmp_path, end):
    content = end.join(["", 'a.jpg, "a cat" ', "", ",", " b.jpg ,a dog", "", ""])
    assert rows(tmp_path, content) == [Row(2, "a.jpg", "a cat"), Row(5, "b.jpg", "a dog")]


def test_quotes_and_newlines_in_quotes(tmp_path):
    content = 'a.jpg,"a ""big""\r\ncat"\r\n"b, c.jpg",a 5" dog\r\n'
    assert rows(tmp_path, content) == [Row(1, "a.jpg", 'a "big" cat'), Row(3, "b, c.jpg", 'a 5" dog')]


def test_a_quote_that_never_closes_does_not_swallow_the_rest(tmp_path):
    assert "line 2: not valid CSV" in problem(tmp_path, 'a.jpg,x\nb.jpg,"a cat\nc.jpg,a dog\n')
    assert "line 1: not valid CSV" in problem(tmp_path, 'a.jpg,"a cat\nb.jpg,"a dog"\n')


def test_the_same_file_twice(tmp_path):
    assert "lines 1 and 3" in problem(tmp_path, "a.jpg,x\nb.jpg,y\na.jpg,z\n")
    assert "lines 1 and 2" in problem(tmp_path, "sub/a.jpg,x\n.\\sub\\a.jpg,z\n")


@pytest.mark.parametrize("content", ["", "\n\n", "file_name,text\n", "\ufeff"])
def test_no_rows(tmp_path, content):
    assert "found none" in problem(tmp_path, content)
    assert "found none" in problem(tmp_path, "\n", "a.jsonl")


def test_a_row_without_a_file_name(tmp_path):
    assert "line 2: expected a file name" in problem(tmp_path, "a.jpg,x\n,a cat\n")


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, "café"])
@pytest.mark.parametrize("header", ["", "file_name,text\r\n"])
def test_unicode(tmp_path, text, header):
    content = f"{header}a.jpg,{text}\r\n"
    assert [row.caption for row in rows(tmp_path, content)] == [text]
    found, notes = read(tmp_path, codecs.BOM_UTF8 + content.encode())
    assert (found[0].file, found[0].caption, notes) == ("a.jpg", text, [])
    for bom, codec in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        found, notes = read(tmp_path, bom + content.encode(codec))
        assert (found[0].file, found[0].caption) == ("a.jpg", text)
        assert notes == ["metadata.csv: read as UTF-16"]


@pytest.mark.parametrize(
    ("codec", "name", "texts"),
    [
        (
            "gbk",
            "GBK",
            [
                CHINESE,
                "红苹果",
                "赛博朋克风格,城市夜景",
                "璀璨的星空下，一位少女",
                "女孩",
                "a “big” cat",
                "汉服",
                "a cat，big",
            ],
        ),
        (
            "cp932",
            "Shift-JIS",
            [JAPANESE, "赤いりんご", "サイバーパンク風の街", "少女", "「夜」の city", "浮世絵", "桜", "a cat、big"],
        ),
    ],
)
def test_what_excel_writes_in_china_and_japan(tmp_path, codec, name, texts):
    for text in texts:
        found, notes = read(tmp_path, f'img01.jpg,"{text}"\r\n'.encode(codec))
        assert found == [Row(1, "img01.jpg", text)]
        assert notes == [f"metadata.csv: read as {name}"]


@pytest.mark.parametrize("text", ["café au lait", "naïve art", "a “quoted” word", "Ärger über Öl", "garçon"])
def test_other_encodings_are_refused_rather_than_garbled(tmp_path, text):
    assert "save it as UTF-8" in problem(tmp_path, f"a.jpg,{text}\n".encode("cp1252"))


def test_broken_utf_16(tmp_path):
    assert "expected UTF-16" in problem(tmp_path, codecs.BOM_UTF16_LE + b"a")


def test_jsonl(tmp_path):
    content = '{"file_name": "a.jpg", "text": "a\u2028cat", "x": 1}\r\n\r\n{"image": "b.jpg", "prompt": "dog"}'
    assert rows(tmp_path, content, "a.jsonl") == [Row(1, "a.jpg", "a cat"), Row(3, "b.jpg", "dog")]


@pytest.mark.parametrize("line", ['{"file_name": "b.jpg"}', '{"file_name": 3, "text": "x"}', "[]", "{", "[" * 9999])
def test_jsonl_errors_name_the_line(tmp_path, line):
    content = '{"file_name": "a.jpg", "text": "a cat"}\n' + line
    assert "a.jsonl, line 2: " in problem(tmp_path, content, "a.jsonl")


def test_no_file_or_no_sane_one(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        read_metadata(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="found a folder"):
        read_metadata(tmp_path)
    monkeypatch.setattr(captions, "MAX_FILE_BYTES", 10)
    assert "at most 10 bytes" in problem(tmp_path, "a.jpg,a long caption\n")


def test_a_field_beyond_all_bounds(tmp_path):
    assert "line 1: not valid CSV" in problem(tmp_path, f'a.jpg,"{"x" * 200_000}"\n')
