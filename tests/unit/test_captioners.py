"""Captioners that really caption: a BLIP that learned it here, and an ONNX tagger that looks at the pixels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.captioning.load import load, open_folder
from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.captioning.tagger import Tagger, prepared, read_tags
from lora_trainer.cli import main
from lora_trainer.dataset.items import scan
from lora_trainer.errors import ConfigError, ModelError
from tests.captioners import KINDS, drawing, sentence, train_blip, words_known, write_random, write_tagger

ROOT = Path(__file__).parents[2]
UNSEEN = 1_000_000


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return train_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def drawings(tmp_path) -> Path:
    """Of each kind a drawing that no training has seen, in another size."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for at, (color, ground) in enumerate(KINDS):
        drawing(color, ground, UNSEEN + at, size=72 + at).save(folder / f"{color}-{ground}.png")
    return folder


def test_a_captioner_of_transformers_really_captions(blip, drawings, capsys, one_thread):
    """Through the command line, into the guide's metadata.csv."""
    output = drawings / "metadata.csv"
    command = ["caption", "--input", str(drawings), "--output", str(output), "--captioner", str(blip), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["written"] == len(KINDS)
    found = {item.path.stem: item.caption for item in scan(drawings).items}
    assert found == {f"{color}-{ground}": sentence(color, ground) for color, ground in KINDS}
    before = output.read_bytes()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == len(KINDS)
    assert output.read_bytes() == before


def test_it_says_the_same_each_time_and_on_the_device_it_is_told(blip, one_thread):
    captioner = load(CaptionOptions(captioner=str(blip), device="cpu"))
    picture = drawing("blue", "grey", UNSEEN)
    assert captioner.caption(picture) == captioner.caption(picture) == open_folder(blip).caption(picture)
    captioner.rest()
    for device, problem in (("cuda:99", "CUDA devices, found cuda:99"), ("gpu", "found gpu")):
        with pytest.raises(ConfigError, match=problem):
            open_folder(blip, device).caption(picture)


@pytest.mark.parametrize("kind", ["git", "vision-encoder-decoder"])
def test_other_kinds_are_loaded_too(tmp_path, kind, one_thread):
    captioner = open_folder(write_random(tmp_path, kind))
    said = captioner.caption(drawing("red", "white", 1, size=50))
    assert said == captioner.caption(drawing("red", "white", 1, size=50))
    assert words_known(said.sentence)


def test_damaged_weights_are_named(blip, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(blip, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"damaged: not a captioner that transformers loads"):
        open_folder(folder).caption(drawing("red", "white", 1))


def test_a_download_asks_the_hub_for_no_more_than_is_needed(blip, monkeypatch, one_thread):
    import huggingface_hub

    asked: list = []
    names = ["README.md", "config.json", "pytorch_model.bin", "model.safetensors", "vocab.txt"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: names)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(blip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    said: list[str] = []
    captioner = load(CaptionOptions(captioner="someone/blip", download=True), said.append)
    assert captioner.caption(drawing("red", "black", UNSEEN)).sentence == sentence("red", "black")
    ((name, patterns),) = asked
    assert (name, "*.bin" in patterns, "*.safetensors" in patterns) == ("someone/blip", False, True)
    assert "downloading someone/blip" in said[0]

    def offline(self, name: str) -> list[str]:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(ModelError, match="someone/blip: could not be downloaded.*no route"):
        load(CaptionOptions(captioner="someone/blip", download=True))


@pytest.fixture
def tagger(tmp_path) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return write_tagger(tmp_path / "wd-test-tagger", size=96)


def test_a_tagger_really_tags(tagger, drawings, capsys):
    command = ["caption", "--input", str(drawings), "--captioner", str(tagger), "--trigger-words", "my style"]
    assert main([*command, "--blacklist", "ball (toy)"]) == 0
    assert "12 captions written" in capsys.readouterr().out
    for color in ("red", "green", "blue"):
        for ground, tag in (("white", "white ground"), ("black", "black ground"), ("grey", None)):
            found = (drawings / f"{color}-{ground}.txt").read_text(encoding="utf-8").strip().split(", ")
            assert found[0] == "my style"
            assert set(found[1:]) == {f"{color} ball", ">_<", *([tag] if tag else [])}


def test_scores_kinds_and_ratings_of_a_tagger(tagger):
    found = {tag.name: tag for tag in open_folder(tagger).caption(drawing("red", "black", UNSEEN)).tags}
    assert found["red_ball"].score > 0.9 > 0.1 > found["blue_ball"].score
    assert (found["bob_the_ball"].kind, found["red_ball"].kind) == ("character", "general")
    assert "explicit" not in found
    # The picture is what decides, and its colors are not turned round.
    other = {tag.name: tag.score for tag in open_folder(tagger).caption(drawing("blue", "white", UNSEEN)).tags}
    assert other["blue_ball"] > 0.5 > other["red_ball"]
    assert other["white_ground"] > 0.9 > 0.1 > other["black_ground"]


def test_pictures_as_a_tagger_wants_them():
    image = Image.new("RGB", (40, 10), (200, 100, 50))
    pixels = prepared(image, 20)
    assert (pixels.shape, pixels.dtype) == ((20, 20, 3), np.float32)
    np.testing.assert_array_equal(pixels[10, 10], (50, 100, 200))
    np.testing.assert_array_equal(pixels[[0, -1], 10], 255)


def test_taggers_that_cannot_be_used(tagger):
    rows = (tagger / "selected_tags.csv").read_text(encoding="utf-8")
    (tagger / "selected_tags.csv").write_text(rows + "11,one_more,0,1\n", encoding="utf-8")
    with pytest.raises(ModelError, match="11 tags in selected_tags.csv"):
        open_folder(tagger).caption(drawing("red", "white", 1))
    (tagger / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.onnx: not an ONNX model"):
        open_folder(tagger).caption(drawing("red", "white", 1))


@pytest.mark.parametrize("text", ["", "tag_id,tag\n1,x\n", "name,category\n", "name,category\n,0\n"])
def test_lists_of_tags_that_cannot_be_read(tmp_path, text):
    file = tmp_path / "selected_tags.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"selected_tags\.csv: expected"):
        read_tags(file)


def test_without_onnxruntime_the_command_that_mends_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "selected_tags.csv").write_text("name,category\nx,0\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        Tagger(tmp_path)


def test_the_guides_own_command(tmp_path):
    """`python tools/auto_label.py --input DIR --output FILE`, from any folder."""
    command = [sys.executable, str(ROOT / "tools" / "auto_label.py"), "--input", ".", "--output", "metadata.csv"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: captioner: Salesforce/blip-image-captioning-base is no folder here")
