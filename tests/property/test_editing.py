"""Whatever the captions and edits: no tag is lost or invented, other rows stay byte for byte, undo restores them."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.captions import parse_metadata
from lora_trainer.editing import rewriting, tags
from lora_trainer.editing.actions import Add, Remove, Replace, Write
from lora_trainer.editing.editor import Editor
from lora_trainer.editing.spans import table
from lora_trainer.errors import DataError

WORDS = st.text(st.sampled_from("abßÉ猫 '\"()\\|{}:;_-."), min_size=1, max_size=8).filter(lambda text: text.strip())
CAPTIONS = st.lists(WORDS, max_size=6).map(", ".join)
MANY = st.lists(CAPTIONS.filter(bool), min_size=1, max_size=3).map("\n".join)
TEXT = st.text(
    st.one_of(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), st.sampled_from('",;\t')), max_size=20
)
FAST = settings(deadline=None, derandomize=True)


def kinds(caption: str) -> list[str]:
    return [tags.same(tag) for tag in tags.split(caption)]


@FAST
@given(MANY, st.lists(WORDS, max_size=3), st.booleans())
def test_adding_keeps_every_tag(caption, new, front):
    for before, after in zip(caption.split("\n"), tags.with_tags(caption, new, front=front).split("\n"), strict=True):
        missing = list(dict.fromkeys(tags.same(tag) for tag in new if tags.same(tag) not in kinds(before)))
        given_ = [tag for tag in kinds(after) if tag in missing]
        assert list(dict.fromkeys(given_)) == missing
        assert [tag for tag in kinds(after) if tag not in missing] == kinds(before)
        assert after == before or (kinds(after)[: len(given_)] if front else kinds(after)[-len(given_) :]) == given_


@FAST
@given(CAPTIONS, st.data())
def test_removing_takes_only_what_is_named(caption, data):
    unwanted = data.draw(st.lists(st.sampled_from(tags.split(caption) or ["x"]) | WORDS, max_size=3))
    gone = set(map(tags.same, unwanted))
    assert kinds(tags.without_tags(caption, unwanted)) == [tag for tag in kinds(caption) if tag not in gone]


@FAST
@given(CAPTIONS, st.data())
def test_replacing_changes_only_what_is_named(caption, data):
    old = data.draw(st.sampled_from(tags.split(caption) or ["x"]) | WORDS)
    new = data.draw(st.lists(WORDS, max_size=2, unique_by=tags.same))
    after, rest = tags.with_tag_replaced(caption, old, new), set(map(tags.same, new)) | {tags.same(old)}
    assert [tag for tag in kinds(after) if tag not in rest] == [tag for tag in kinds(caption) if tag not in rest]
    if tags.same(old) in kinds(caption):
        assert all(tags.same(tag) in kinds(after) for tag in new)
        assert (tags.same(old) in kinds(after)) == (tags.same(old) in map(tags.same, new))
    else:
        assert after == caption


@FAST
@given(CAPTIONS, st.lists(WORDS, min_size=1, max_size=3, unique_by=tags.same))
def test_adding_then_removing_comes_back(caption, new):
    fresh = [tag for tag in new if tags.same(tag) not in kinds(caption)]
    assert kinds(tags.without_tags(tags.with_tags(caption, fresh), fresh)) == kinds(caption)


# Tables as people write them: any delimiter, quotes where none are needed, spaces, empty lines, Windows' line ends.


@st.composite
def tables(draw):
    delimiter = draw(st.sampled_from(",;\t"))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    columns = draw(st.permutations(["file_name", "text", "note"]))
    lines = [delimiter.join(columns)]
    for number in range(draw(st.integers(1, 5))):
        cells = {"file_name": f"{number}.png", "text": draw(TEXT), "note": draw(TEXT)}
        out = io.StringIO(newline="")
        quoting = draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
        csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="").writerow([cells[c] for c in columns])
        lines.append(draw(st.sampled_from(["", " "])) + out.getvalue() + draw(st.sampled_from(["", "  "])))
        lines += [""] * draw(st.integers(0, 1))
    return end.join(lines) + draw(st.sampled_from(["", end]))


@FAST
@given(tables(), CAPTIONS, st.data())
def test_a_table_changes_only_where_it_is_told(text, caption, data):
    path = Path("metadata.csv")
    rows = parse_metadata(path, text, [])
    row = data.draw(st.sampled_from(rows))
    added = data.draw(st.lists(CAPTIONS, max_size=2))
    edit = rewriting.Rows({row.number: caption}, [(f"new {number}.png", words) for number, words in enumerate(added)])
    before = text.encode()
    try:
        after = rewriting.metadata(path, before, edit)
    except DataError as error:
        # Few bytes can look like another encoding; that is said before anything is written.
        assert "UTF-8" in str(error)
        return
    start, stop, _ = table(path, text).caption(row.number)
    plain = after.decode("utf-8-sig")
    assert plain.startswith(text[:start])
    rest = text[stop:]
    assert plain[: len(plain) if not added else plain.rindex(rest) + len(rest)].endswith(rest)
    told = {read.file: read.caption for read in parse_metadata(path, plain, [])}
    wanted = {read.file: read.caption for read in rows} | {row.file: caption} | dict(edit.added)
    assert told == {file: tags.clean(words) for file, words in wanted.items()}


@FAST
@given(st.lists(TEXT, min_size=1, max_size=4), CAPTIONS, st.data())
def test_json_lines_change_only_where_they_are_told(captions, caption, data):
    path = Path("metadata.jsonl")
    ascii_ = data.draw(st.booleans())
    lines = [
        json.dumps(
            {"n": [1, {"text": "}"}], "text": text, "file_name": f"{number}.png", "x": text}, ensure_ascii=ascii_
        )
        for number, text in enumerate(captions)
    ]
    number = data.draw(st.integers(1, len(lines)))
    try:
        after = rewriting.metadata(path, "\n".join(lines).encode(), rewriting.Rows({number: caption}))
    except DataError as error:
        assert "UTF-8" in str(error)
        return
    changed = after.decode("utf-8-sig").split("\n")
    assert changed[: number - 1] + changed[number:] == lines[: number - 1] + lines[number:]
    assert json.loads(changed[number - 1]) == {**json.loads(lines[number - 1]), "text": tags.clean(caption)}


ACTIONS = st.one_of(
    st.builds(Add, tags=WORDS, front=st.booleans()),
    st.builds(Remove, tags=WORDS),
    st.builds(Replace, old=WORDS, new=CAPTIONS, text=st.booleans()),
    st.builds(Write, caption=MANY),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.none() | MANY, min_size=3, max_size=3),
    st.booleans(),
    st.lists(ACTIONS, min_size=1, max_size=4),
    st.data(),
)
def test_undo_restores_every_byte(captions, in_rows, actions, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, caption in enumerate(captions):
            (folder / f"{number}.png").write_bytes(b"not looked into")
            if caption is not None and not in_rows:
                (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
        if in_rows:
            rows = [
                f'{number}.png,"{(text or "").replace(chr(34), chr(34) * 2)}"' for number, text in enumerate(captions)
            ]
            (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")

        def everything():
            return {path.name: path.read_bytes() for path in folder.iterdir()}

        editor = Editor()
        opened = editor.open(folder, None)

        def as_read():
            """What the editor knows is what someone finds who opens the folder now."""
            assert opened.album.pictures == Editor().open(folder, None).album.pictures

        seen = [everything()]
        for action in actions:
            pictures = data.draw(
                st.lists(st.sampled_from(list(opened.album.pictures.values())), unique_by=lambda p: p.name)
            )
            try:
                if editor.edit(opened, opened.version, pictures, action):
                    seen.append(everything())
            except DataError:
                assert everything() == seen[-1]
            as_read()
        for before in reversed(seen[:-1]):
            editor.undo(opened, opened.version)
            assert everything() == before
            as_read()
