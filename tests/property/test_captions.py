"""Whatever a spreadsheet or a script writes comes back, and whatever else comes in is an error of one line."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.captions import read_metadata
from lora_trainer.errors import DataError

UTF8 = st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"))
ASCII = st.characters(min_codepoint=32, max_codepoint=126)
JAPANESE = st.one_of(ASCII, st.sampled_from("赤いりんごの絵、アニメ風。青空と白い雲を背景にした少女"))
CHINESE = st.one_of(ASCII, st.sampled_from("一只红色的苹果，放在木桌上。动漫风格的女孩在蓝天白云下"))


def read(content: bytes, suffix: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"metadata{suffix}"
        path.write_bytes(content)
        return read_metadata(path)


def tidy(text):
    return " ".join(text.split())


def table(captions, *, dialect, header, columns=("file_name", "text")):
    out = io.StringIO(newline="")
    writer = csv.writer(out, **dialect)
    if header:
        writer.writerow(columns)
    for number, caption in enumerate(captions):
        writer.writerow([f"img {number}.png", caption])
    return out.getvalue()


def captions_of(characters):
    # Rich in what a table must quote.
    return st.lists(st.text(st.one_of(characters, st.sampled_from('",;\n\t')), max_size=30), min_size=1, max_size=6)


DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t"),
        "quoting": st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
    }
)


@settings(deadline=None, derandomize=True)
@given(captions_of(UTF8), DIALECTS, st.booleans(), st.sampled_from(["utf-8-sig", "utf-16"]))
def test_a_table_comes_back(captions, dialect, header, encoding):
    rows, _ = read(table(captions, dialect=dialect, header=header).encode(encoding), ".csv")
    trim = (lambda text: text) if header else (lambda text: tidy(text).rstrip(dialect["delimiter"] + " "))
    assert [(row.file, trim(row.caption)) for row in rows] == [
        (f"img {number}.png", trim(tidy(caption))) for number, caption in enumerate(captions)
    ]


@settings(deadline=None, derandomize=True)
@given(
    st.one_of(
        st.tuples(captions_of(JAPANESE), st.just(("cp932", "Shift-JIS", "赤いりんごの絵"))),
        st.tuples(captions_of(CHINESE), st.just(("gb18030", "GBK", "一只红色的苹果"))),
    )
)
def test_what_excel_writes_in_japan_and_china_comes_back(drawn):
    captions, (encoding, name, sure) = drawn
    rows, notes = read(table([sure, *captions], dialect={}, header=True).encode(encoding), ".csv")
    assert [row.caption for row in rows] == [tidy(caption) for caption in (sure, *captions)]
    assert any(name in note for note in notes)


@settings(deadline=None, derandomize=True)
@given(captions_of(UTF8), st.booleans())
def test_json_lines_come_back(captions, ascii_only):
    lines = [
        json.dumps({"file_name": f"{number}.png", "text": caption}, ensure_ascii=ascii_only)
        for number, caption in enumerate(captions)
    ]
    rows, _ = read("\n".join(lines).encode(), ".jsonl")
    assert [(row.number, row.file, row.caption) for row in rows] == [
        (number + 1, f"{number}.png", tidy(caption)) for number, caption in enumerate(captions)
    ]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('a.png,;\t"\n\r {}[]:\\é蔷'), max_size=60).map(str.encode),
    ),
    st.sampled_from([".csv", ".jsonl"]),
)
def test_anything_else_is_rows_or_one_line(content, suffix):
    try:
        rows, _ = read(content, suffix)
    except DataError as error:
        line = str(error)
    else:
        line = ""
        assert rows
        assert all(row.file and "\n" not in row.caption for row in rows)
    assert len(line.splitlines()) <= 1
