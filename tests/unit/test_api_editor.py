"""The caption editor's routes: for who knows the pass, in allowed folders, and never a file of the caller's choice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from PIL import Image

from lora_trainer.api import mount_editor
from lora_trainer.api.editor import HEADER, PAGE, PREFIX
from lora_trainer.api.routes import MAX_BODY
from lora_trainer.editing.editor import Editor
from lora_trainer.editing.thumbnails import Thumbnails
from lora_trainer.hosts.roots import Roots

PASS = "a pass of the test"
NAUGHTY = '"><img src=x onerror=alert(1)>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "inside" / "set"
    place.mkdir(parents=True)
    for number in range(PAGE + 3):
        Image.new("RGB", (20, 30), "red").save(place / f"{number:03}.png")
        (place / f"{number:03}.txt").write_text(f"cat, {number}")
    (place / "000.txt").write_text(NAUGHTY)
    return place


@pytest.fixture
def client(tmp_path: Path):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    host = SimpleNamespace(
        editor=Editor(),
        thumbnails=Thumbnails(tmp_path / "thumbnails"),
        editor_pass=PASS,
        allowed=Roots([tmp_path / "inside"], enforced=True).settings,
    )
    app = fastapi.FastAPI()
    mount_editor(app, host)
    return TestClient(app, base_url="http://any.name:7860", headers={HEADER: PASS})


def post(client, route: str, body: object, status: int = 200):
    response = client.post(f"{PREFIX}/{route}", content=json.dumps(body))
    assert response.status_code == status, response.text
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    return response.json() if status == 200 else "\n".join(response.json()["errors"])


def test_without_the_pass_nothing_is_answered(client, folder: Path) -> None:
    given = json.dumps({"folder": str(folder)})
    for wrong in ({}, {HEADER: ""}, {HEADER: "another"}, {HEADER: "ä".encode("latin-1")}):
        del client.headers[HEADER]
        for route in ("look", "edit", "undo"):
            assert client.post(f"{PREFIX}/{route}", content=given, headers=wrong).status_code == 403
        assert client.get(f"{PREFIX}/picture", headers=wrong).status_code == 403
        client.headers[HEADER] = PASS


def test_a_page_at_a_time(client, folder: Path) -> None:
    look = {"folder": str(folder)}
    first = post(client, "look", look)
    assert (first["total"], first["found"], first["pages"], first["without"]) == (PAGE + 3, PAGE + 3, 2, 0)
    assert first["pictures"][0] == {"name": "000.png", "caption": NAUGHTY, "home": "000.txt"}
    assert first["tags"][0] == ["cat", PAGE + 2]
    assert (first["undo"], first["notes"], first["from_names"], first["folder"]) == (None, [], False, "set")
    last = post(client, "look", {**look, "page": 99})
    assert (last["page"], len(last["pictures"])) == (1, 3)
    assert [one["name"] for one in post(client, "look", {**look, "tags": ["CAT", "7"]})["pictures"]] == ["007.png"]


def test_edits_and_undo(client, folder: Path) -> None:
    look = {"folder": f' "{folder}" ', "words": "00"}
    seen = post(client, "look", look)
    edit = {"look": look, "version": seen["version"], "action": {"kind": "add", "tags": "new"}}
    after = post(client, "edit", {**edit, "names": ["001.png", "062.png"]})
    assert after["changed"] == 2
    assert (folder / "062.txt").read_text() == "cat, 62, new"
    assert "from another page" in post(client, "edit", edit, 400)
    # Without names: all that is found.
    after = post(client, "edit", {**edit, "version": after["version"]})
    assert after["changed"] == after["found"] - 1
    assert (folder / "010.txt").read_text() == "cat, 10"
    undone = post(client, "undo", {"look": look, "version": after["version"]})
    assert undone["undone"] == f"add “new” ({after['changed']} pictures)"
    assert undone["undo"] == "add “new” (2 pictures)"
    assert (folder / "000.txt").read_text() == NAUGHTY


def test_only_allowed_folders_and_their_pictures(client, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "a.png")
    (tmp_path / "inside" / "link").symlink_to(outside)
    for place in (outside, f"{folder}/../../outside", tmp_path / "inside" / "link", "", "\0"):
        assert "train_data_dir: expected" in post(client, "look", {"folder": str(place)}, 400)
    refused = post(client, "look", {"folder": str(folder), "metadata": str(outside / "words.csv")}, 400)
    assert "metadata_path: expected" in refused

    def picture(**query: str):
        return client.get(f"{PREFIX}/picture?{urlencode({'folder': str(folder), **query})}")

    made = picture(name="001.png")
    assert (made.status_code, made.headers["content-type"]) == (200, "image/jpeg")
    assert made.content.startswith(b"\xff\xd8")
    for name in ("../../outside/a.png", str(outside / "a.png"), "001.txt", "", "link/a.png", NAUGHTY):
        assert picture(name=name).status_code == 400
    assert picture(name="001.png", size="huge").status_code == 400
    assert picture(name="001.png", folder=str(outside)).status_code == 400
    (folder / "002.png").write_bytes(b"no picture")
    assert "002.png" in picture(name="002.png").text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 5000,
        b'{"folder": 1}',
        b'{"folder": "x", "more": 1}',
        b'{"folder": "x", "page": 1e99}',
        b'{"look": {"folder": "x"}, "version": "", "action": {"kind": "delete"}}',
    ],
)
def test_nonsense_is_refused(client, body: bytes) -> None:
    for route in ("look", "edit", "undo"):
        response = client.post(f"{PREFIX}/{route}", content=body)
        assert response.status_code == 400
        assert response.json()["errors"][0].startswith("expected a request of the caption editor")


def test_a_long_body_is_not_read(client) -> None:
    assert client.post(f"{PREFIX}/look", content=b" " * (MAX_BODY + 1)).status_code == 413


def test_names_of_nobody_are_refused(client, folder: Path) -> None:
    look = {"folder": str(folder)}
    version = post(client, "look", look)["version"]
    action = {"kind": "write", "caption": "x"}
    for name in ("../set/001.png", "nobody.png"):
        body = {"look": look, "version": version, "action": action, "names": ["001.png", name]}
        assert "no such picture" in post(client, "edit", body, 400)
    assert (folder / "001.txt").read_text() == "cat, 1"
