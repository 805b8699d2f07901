"""The extension as the tab sees it, in the WebUI's stand-in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lora_trainer.errors import ConfigError, DataError
from lora_trainer.ui.ports import TabHost


@pytest.fixture
def extension(fake_webui):
    return fake_webui.host("extension").Extension()


def test_it_has_all_that_the_tab_asks_for(extension):
    asked = [name for name in vars(TabHost) if not name.startswith("_")]
    assert "grid" in asked
    assert [name for name in asked if not hasattr(type(extension), name) and not hasattr(extension, name)] == []


def test_a_base_in_another_storage_than_the_webuis_is_refused(extension, pictures):
    with pytest.raises(ConfigError, match=r"base_precision: expected auto, found 'nf4': .*would be a second copy"):
        extension.submit({"train_data_dir": str(pictures), "base_precision": "nf4"})
    assert extension.jobs.jobs() == []


def test_pictures_are_looked_at_where_a_visitor_may(extension, fake_webui, pictures, monkeypatch):
    given = {"train_data_dir": str(pictures), "resolution": "128", "metadata_path": None}
    assert extension.check(given).usable == 6
    with pytest.raises(ConfigError) as refused:
        extension.check({**given, "resolution": "7"})
    assert refused.value.problems[0].startswith("resolution:")
    with pytest.raises(DataError, match="no such folder"):
        extension.check({**given, "train_data_dir": str(pictures / "missing")})
    # One at a time, also after one that failed.
    with extension._checking, pytest.raises(DataError, match="other pictures just now"):
        extension.check(given)
    fake_webui("shared").cmd_opts.webui_is_non_local = True
    with pytest.raises(ConfigError, match="allowed folders"):
        extension.check(given)
    inside = extension.home / "uploads" / "mine"
    inside.parent.mkdir(parents=True)
    pictures.rename(inside)
    assert extension.check({**given, "train_data_dir": str(inside)}).usable == 6


def test_the_concepts_of_the_pictures_are_looked_at(extension, fake_webui, pictures):
    (pictures / "gate").mkdir()
    for name in ("p0", "p1"):
        (pictures / f"{name}.png").rename(pictures / "gate" / f"{name}.png")
    rows = (pictures / "metadata.csv").read_text().replace("p0.", "gate/p0.").replace("p1.", "gate/p1.")
    (pictures / "metadata.csv").write_text(rows)
    given = {"train_data_dir": str(pictures), "resolution": "128"}
    assert extension.check({**given, "concepts": ["gate"]}).usable == 2
    assert extension.check({**given, "concepts": []}).usable == 6
    with pytest.raises(ConfigError, match="concepts, entry 1, repeats: expected a whole number"):
        extension.check({**given, "concepts": ["{folder: gate, repeats: many}"]})
    fake_webui("shared").cmd_opts.webui_is_non_local = True
    inside = extension.home / "uploads" / "mine"
    inside.parent.mkdir(parents=True)
    pictures.rename(inside)
    with pytest.raises(ConfigError, match=r"concepts, entry 1: expected a path without \.\."):
        extension.check({**given, "train_data_dir": str(inside), "concepts": ["../.."]})


def test_prompts_have_the_trigger_words_of_all_concepts(extension):
    settings = {"trigger_words": "sks", "concepts": [{"folder": "a", "trigger_words": "alice"}, {"folder": "b"}]}
    job = SimpleNamespace(name="style", output=(), state="done", settings=settings)
    assert extension.prompt(job) == "sks, alice <lora:style:0.8>"


def test_an_upload_that_has_no_place_is_refused(extension):
    extension.home.mkdir(parents=True, exist_ok=True)
    (extension.home / "uploads").write_text("a file where the folder would be")
    with pytest.raises(DataError, match="upload: .*cannot be made"):
        extension.upload_folder()


def test_saved_steps_are_compared_where_prompts_can_name_them(extension, fake_webui, tmp_path):
    networks = sys.modules["networks"]
    files = []
    for name in ("style", "style-step00000100"):
        files.append(tmp_path / f"{name}.safetensors")
        files[-1].write_bytes((2).to_bytes(8, "little") + b"{}")
    job = SimpleNamespace(
        name="style", output=(*map(str, files), str(tmp_path / "a.png")), settings={"trigger_words": "sks"}
    )
    lines = extension.grid(job).splitlines()
    assert lines[0] == "sks <lora:style:0.8>"
    assert lines[1].startswith("Script: X/Y/Z plot, X Type: Prompt S/R")
    assert "<lora:style-step00000100:0.8>" in lines[1]
    for file in files:
        assert networks.available_network_aliases[file.stem].filename == str(file)
    files[1].unlink()
    assert extension.grid(job) is None


def test_the_editor_is_there_without_the_api_and_for_its_own_page_only(extension, fake_webui, pictures):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    fake_webui("shared").cmd_opts.api = False
    fake_webui.host("extension").started(None, app)
    client = TestClient(app)
    asked = f'{{"folder": {str(pictures)!r}}}'.replace("'", '"')
    known = {"x-lora-trainer-pass": fake_webui.host("extension").extension().editor_pass}
    assert client.post("/lora-trainer/editor/look", content=asked).status_code == 403
    assert client.post("/lora-trainer/editor/look", content=asked, headers=known).json()["total"] == 6
    assert client.get("/lora-trainer/v1/jobs").status_code == 404
    fake_webui("shared").cmd_opts.webui_is_non_local = True
    refused = client.post("/lora-trainer/editor/look", content=asked, headers=known)
    assert "allowed folders" in refused.json()["errors"][0]
    assert extension.editor_pass != known["x-lora-trainer-pass"]
