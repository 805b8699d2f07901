"""Where a job's files go among the user's own, on a stand-in for the WebUI."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer import files
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, OutputError
from tests.fake_webui.loras import LAYERS, add_lora, lora_bytes


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def notices() -> list:
    return []


@pytest.fixture
def store(fake_webui, folder, notices):
    def make(overwrite: bool = False):
        return fake_webui.host("store").LoraFolder(folder, overwrite, notices.append)

    fake_webui.model  # noqa: B018
    return make


@pytest.fixture
def own(fake_webui):
    """A LoRA of the user's own, which the WebUI knows; as `add_lora`."""

    def add(name: str, **wanted) -> Path:
        path = add_lora(fake_webui.loras, name, **wanted)
        fake_webui.networks.list_available_networks()
        return path

    return add


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["none", "None", "addams", "Addams"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_prompts_give_another_meaning_are_refused(store, name, overwrite):
    with pytest.raises(ConfigError, match="output_name"):
        store(overwrite).free(name)


def test_a_name_is_taken_in_any_case(store, own):
    assert store().free("style")
    own("style")
    assert not store().free("style")
    assert not store().free("STYLE")
    assert store().free("style-2")
    assert store(overwrite=True).free("style")


def test_names_are_taken_in_subfolders_too(store, own):
    own("people/style")
    assert not store().free("style")


def test_names_that_files_give_themselves_are_taken(store, own):
    own("renamed", ss_output_name="style")
    assert not store().free("style")


def test_an_alias_of_two_files_is_taken(store, own):
    own("one", ss_output_name="Style")
    own("two", ss_output_name="Style")
    assert not store().free("style")


def test_a_file_that_the_webui_has_not_seen_yet_is_not_overwritten(store, fake_webui):
    add_lora(fake_webui.loras, "style")
    assert not store().free("style")


def test_only_the_finished_lora_is_published(store, fake_webui, folder):
    data = lora_bytes()
    made = store()
    kept = [made.publish(file, data, final=False) for file in ("style-step00000002.safetensors", "samples/1.png")]
    kept.append(made.publish("style.yaml", b"a: 1", final=True))
    kept.append(made.publish("pytorch_lora_weights.safetensors", data, final=True))
    assert names(fake_webui.loras) == []
    path = made.publish("style.safetensors", data, final=True)
    assert path == fake_webui.loras / "style.safetensors"
    assert path.read_bytes() == data
    assert names(fake_webui.loras) == ["style.safetensors"]
    assert names(folder) == sorted(p.relative_to(folder).as_posix() for p in kept)
    # Without a click on Refresh.
    assert fake_webui.networks.available_networks["style"].filename == str(path)
    assert fake_webui.picture("a cat <lora:style:1>") != fake_webui.picture("a cat")


def test_a_lora_that_is_overwritten_is_overwritten_where_it_lies(store, own, fake_webui):
    own("people/style", seed=1)
    path = store(overwrite=True).publish("style.safetensors", lora_bytes(seed=2), final=True)
    assert path == fake_webui.loras / "people" / "style.safetensors"
    assert path.read_bytes() == lora_bytes(seed=2)
    assert names(fake_webui.loras) == ["people/style.safetensors"]


def test_an_overwritten_lora_is_loaded_anew(store, own, fake_webui):
    path = own("style", seed=1)
    os.utime(path, (1e9, 1e9))
    before = fake_webui.picture("a cat <lora:style:1>")
    store(overwrite=True).publish("style.safetensors", lora_bytes(seed=2), final=True)
    plain = fake_webui.picture("a cat")
    assert fake_webui.picture("a cat <lora:style:1>") not in (before, plain)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_which_the_loader_knows_only_some_modules_stays_out(store, own, fake_webui, folder, overwrite):
    own("style", seed=1)
    before = {path: path.read_bytes() for path in fake_webui.loras.iterdir()}
    data = lora_bytes(seed=2, layers=LAYERS | {"lora_unet_mid_block_attentions_7_to_q": (8, 8)})
    with pytest.raises(OutputError, match=r"only 4 of its 5 modules"):
        store(overwrite).publish("style.safetensors", data, final=True)
    assert {path: path.read_bytes() for path in fake_webui.loras.iterdir()} == before
    # What was learned is not lost.
    assert (folder / "style.safetensors").read_bytes() == data
    assert fake_webui.networks.available_networks["style"].filename == str(fake_webui.loras / "style.safetensors")


def test_a_file_that_the_loader_refuses_stays_out(store, fake_webui, folder):
    data = lora_bytes(layers={"lora_unet_mid_block_attentions_0_norm": (4, 4)})
    with pytest.raises(OutputError, match="refuses it"):
        store().publish("style.safetensors", data, final=True)
    assert names(fake_webui.loras) == []
    assert (folder / "style.safetensors").read_bytes() == data


def test_checking_merges_nothing_and_leaves_no_trace_of_the_place_in_the_run(store, fake_webui, folder, notices):
    before = fake_webui.digest()
    store().publish("style.safetensors", lora_bytes(sshs_model_hash="ab" * 32), final=True)
    assert fake_webui.digest() == before
    assert fake_webui.networks.loaded_networks == []
    assert any("4 of 4 modules" in notice.text for notice in notices)
    known = [
        *fake_webui.networks.available_networks.values(),
        *fake_webui.networks.available_network_hash_lookup.values(),
    ]
    assert {Path(entry.filename).parent for entry in known} == {fake_webui.loras}


def test_a_file_in_use_is_not_replaced_but_the_new_one_gets_another_name(store, own, fake_webui, notices, monkeypatch):
    path = own("style", seed=1)
    own("style-2")
    replace = os.replace

    def locked(source, target) -> None:
        if Path(target) == path:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", locked)
    published = store(overwrite=True).publish("style.safetensors", lora_bytes(seed=2), final=True)
    assert published == fake_webui.loras / "style-3.safetensors"
    assert (path.read_bytes(), published.read_bytes()) == (lora_bytes(seed=1), lora_bytes(seed=2))
    assert names(fake_webui.loras) == ["style-2.safetensors", "style-3.safetensors", "style.safetensors"]
    assert any("style-3.safetensors" in notice.text for notice in notices)
    assert "style-3" in fake_webui.networks.available_networks


def test_a_folder_that_cannot_be_written_is_an_error(store, fake_webui, folder, monkeypatch):
    replace = os.replace

    def locked(source, target) -> None:
        if Path(target).parent == fake_webui.loras:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", locked)
    with pytest.raises(OutputError, match="not written"):
        store().publish("style.safetensors", lora_bytes(), final=True)
    assert names(fake_webui.loras) == []
    assert (folder / "style.safetensors").is_file()


def test_without_the_lora_extension_files_are_published_unchecked(webui_checkpoints, tmp_path):
    from tests.fake_webui.install import installed

    (tmp_path / "webui" / "models").mkdir(parents=True)
    (tmp_path / "webui" / "models" / "Stable-diffusion").symlink_to(webui_checkpoints)
    with installed(tmp_path / "webui", lora=False) as ui:
        assert "networks" not in sys.modules
        made = ui.host("store").LoraFolder(tmp_path / "run", False, lambda event: None)
        assert made.free("style")
        assert made.publish("style.safetensors", b"data", final=True) == ui.loras / "style.safetensors"
        assert not made.free("style")
        assert ui.host("merged").unmerge(ui.model) is False
        with pytest.raises(ConfigError):
            made.free("none")


def test_the_card_is_written_once_and_the_users_edits_stay(fake_webui, folder, pictures):
    config = build({"base_model": "tiny", "train_data_dir": str(pictures), "trigger_words": "tiny thing"})
    lora = add_lora(fake_webui.loras, "style")
    write_card = fake_webui.host("card").write_card
    write_card(lora, config, folder)
    card, picture = lora.with_suffix(".json"), lora.with_suffix(".png")
    values = json.loads(card.read_text(encoding="utf-8"))
    assert (values["activation text"], values["preferred weight"], values["sd version"]) == ("tiny thing", 0.8, "SD1")
    assert Image.open(picture).size == (64, 64)
    card.write_text('{"notes": "mine"}', encoding="utf-8")
    picture.unlink()
    mine = lora.with_suffix(".preview.jpg")
    mine.write_bytes(b"mine")
    write_card(lora, config, folder)
    assert (card.read_text(encoding="utf-8"), mine.read_bytes()) == ('{"notes": "mine"}', b"mine")
    assert not picture.exists()


def test_the_card_shows_the_newest_preview(fake_webui, folder, pictures):
    samples = folder / "samples"
    samples.mkdir(parents=True)
    for step, colour in ((2, "red"), (10, "blue")):
        Image.new("RGB", (1024, 512), colour).save(samples / f"style-step{step:08}-1.png")
    Image.new("RGB", (64, 64), "green").save(samples / "style-step00000010-2.png")
    lora = add_lora(fake_webui.loras, "style")
    fake_webui.host("card").write_card(lora, build({"base_model": "tiny", "train_data_dir": str(pictures)}), folder)
    picture = Image.open(lora.with_suffix(".png"))
    assert (picture.size, picture.getpixel((0, 0))) == ((512, 256), (0, 0, 255))


def test_the_card_of_several_concepts(fake_webui, folder, pictures):
    for name in ("gate", "wall"):
        (pictures / name).mkdir()
    (pictures / "p5.png").rename(pictures / "gate" / "p5.png")
    concepts = [{"folder": "wall", "trigger_words": "my wall"}, {"folder": "gate", "trigger_words": "my gate"}]
    config = build(
        {"base_model": "tiny", "train_data_dir": str(pictures), "trigger_words": "sks", "concepts": concepts}
    )
    lora = add_lora(fake_webui.loras, "style")
    fake_webui.host("card").write_card(lora, config, folder)
    values = json.loads(lora.with_suffix(".json").read_text(encoding="utf-8"))
    assert values["activation text"] == "sks, my wall, my gate"
    # Of the pictures in the concepts, not of those beside them.
    assert Image.open(lora.with_suffix(".png")).size == (128, 64)


def test_a_lora_to_start_from_is_known_by_its_name(fake_webui, own):
    """In a subfolder, by what it calls itself, or not yet scanned; a path stays one."""
    fake_webui.model  # noqa: B018
    named = fake_webui.host("store").named_lora
    style = own("sub/style", ss_output_name="my style")
    assert {named(text) for text in ("style", "style.safetensors", "my style")} == {str(style)}
    new = add_lora(fake_webui.loras, "new")
    assert named("new") == str(new)
    for text in ("unknown", "/elsewhere/style.safetensors", "sub/style", "C:style", "..", ""):
        assert named(text) == text
