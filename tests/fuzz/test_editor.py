"""The caption editor over any caption files, and its routes for any body."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

from hypothesis import strategies as st

from lora_trainer.api import editor as routes
from lora_trainer.api.routes import served
from lora_trainer.editing.actions import Add, Remove, Replace, Write
from lora_trainer.editing.editor import Editor
from lora_trainer.editing.thumbnails import Thumbnails
from lora_trainer.hosts.roots import Roots
from tests.fuzz.harness import fuzz, works_or_refuses
from tests.fuzz.inputs import EVIL, TEXT, VALUES, dumps, mutated
from tests.fuzz.test_api import fair
from tests.fuzz.test_captions import ENCODED, SEEDS
from tests.fuzz.watch import ARENA

CONTENT = ENCODED | st.binary(max_size=200) | mutated(SEEDS)
ACTIONS = (
    st.builds(Write, caption=TEXT)
    | st.builds(Add, tags=TEXT, front=st.booleans())
    | st.builds(Remove, tags=TEXT)
    | st.builds(Replace, old=TEXT | st.sampled_from(["a cat", '"', "a"]), new=TEXT, text=st.booleans())
)
HOME = st.sampled_from(["metadata.csv", "metadata.jsonl", "a.txt", "b.png.caption"])
FOLDER = ARENA.inside / "edited"


def pictures(name: str, content: bytes) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for picture in ("a.png", "b.png"):
        (FOLDER / picture).write_bytes(b"")
    (FOLDER / name).write_bytes(content)


@fuzz("editor", 150, name=HOME, content=CONTENT, action=ACTIONS)
def test_any_caption_file(name, content, action):
    pictures(name, content)
    editor = Editor()
    opened = editor.open(FOLDER, None)
    with works_or_refuses():
        changed = editor.edit(opened, opened.version, list(opened.album.pictures.values()), action)
        # Training reads what the editor shows, and undo gives every byte back.
        shown = {name: picture.caption for name, picture in opened.album.pictures.items()}
        again = Editor().open(FOLDER, None).album.pictures
        assert shown == {name: picture.caption for name, picture in again.items()}
        if changed:
            editor.undo(opened, opened.version)
    assert (FOLDER / name).read_bytes() == content
    assert {path.name for path in FOLDER.iterdir()} == {"a.png", "b.png", name}


def host() -> SimpleNamespace:
    allowed = Roots([ARENA.inside], True).settings
    return SimpleNamespace(editor=Editor(), thumbnails=Thumbnails(ARENA.inside / "thumbnails"), allowed=allowed)


NAMES = st.sampled_from([str(FOLDER), str(ARENA.outside), "a.png", "../outside/pictures/a.png"]) | st.sampled_from(EVIL)
LOOK = st.fixed_dictionaries(
    {"folder": st.just(str(FOLDER)) | NAMES},
    optional={"metadata": NAMES, "words": TEXT, "tags": st.lists(TEXT, max_size=2), "page": VALUES, "without": VALUES},
)
ACTION = st.fixed_dictionaries(
    {"kind": st.sampled_from(["write", "add", "remove", "replace"]) | TEXT},
    optional={"tags": TEXT, "caption": TEXT, "old": TEXT, "new": TEXT, "text": VALUES, "front": VALUES},
)
BODY = LOOK | st.fixed_dictionaries(
    {"look": LOOK, "version": TEXT}, optional={"action": ACTION, "names": st.lists(NAMES, max_size=3)}
)


@fuzz("editor routes", 150, body=BODY | VALUES)
def test_any_body(body):
    pictures("metadata.csv", b"a.png,a cat\n")
    given, data = host(), dumps(body).encode("utf-8", "surrogatepass")
    for action in routes.ACTIONS.values():
        answer = served(lambda action=action: action(given, data))
        fair(answer.status, answer.body)


@fuzz("editor pictures", 60, query=st.dictionaries(st.sampled_from(["folder", "metadata", "name", "size"]), NAMES))
def test_any_picture(query):
    pictures("metadata.csv", json.dumps(query).encode("utf-8", "backslashreplace"))
    answer = served(lambda: routes.picture(host(), query))
    assert answer.status in (200, 400)
    assert b"canary" not in answer.body
