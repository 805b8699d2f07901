"""The demo's committed files: there, small enough, consistent and credited."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.models.text import TOKENIZER_FOLDER, Tokenizer

DEMO = Path(__file__).parents[2] / "demo"
CHECKPOINT = DEMO / "emoji-world.safetensors"
SETS = {"twemoji": range(60, 121), "twemoji-held-out": range(60, 70), "placebo": range(60, 121)}


def rows(name: str) -> dict[str, str]:
    with (DEMO / name / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return dict(csv.reader(file))


def header() -> dict:
    with CHECKPOINT.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


@pytest.mark.parametrize("name", SETS)
def test_each_row_has_its_picture_and_each_picture_its_row(name):
    captions = rows(name)
    assert set(captions) == {path.name for path in (DEMO / name).glob("*.png")}
    assert len(captions) in SETS[name]
    assert len(set(captions.values())) == len(captions)
    assert all(caption.startswith("twemoji emoji of ") for caption in captions.values())
    for file in captions:
        with Image.open(DEMO / name / file) as picture:
            assert picture.size == (128, 128)


def test_held_out_subjects_are_never_trained_on():
    assert not set(rows("twemoji").values()) & set(rows("twemoji-held-out").values())


def test_the_placebo_has_the_same_words_and_other_pictures():
    assert rows("placebo") == rows("twemoji")
    assert all((DEMO / "placebo" / f).read_bytes() != (DEMO / "twemoji" / f).read_bytes() for f in rows("placebo"))


def test_the_pictures_stay_small():
    assert sum(path.stat().st_size for name in SETS for path in (DEMO / name).iterdir()) < 1_000_000


def test_the_checkpoint_fits_its_bounds():
    raw = CHECKPOINT.read_bytes()
    assert len(raw) <= 32_000_000
    assert len(zlib.compress(raw)) <= 24_000_000


def test_the_checkpoint_has_webui_names_in_half_precision():
    entries = header()
    metadata = entries.pop("__metadata__")
    counts = {
        prefix: sum(name.startswith(prefix) for name in entries)
        for prefix in (
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.transformer.text_model.",
        )
    }
    assert list(counts.values()) == [684, 176, 53]
    assert sum(counts.values()) == len(entries)
    assert {entry["dtype"] for entry in entries.values()} == {"F16", "I64"}
    assert "CC-BY 4.0" in metadata["modelspec.license"]
    assert entries["first_stage_model.encoder.mid.attn_1.q.weight"]["shape"] == [64, 64, 1, 1]
    assert entries["model.diffusion_model.input_blocks.1.1.proj_in.weight"]["shape"] == [64, 64, 1, 1]


def test_the_clip_folder_is_the_tokenizer_and_the_sizes_of_the_checkpoint():
    for file in TOKENIZER_FOLDER.iterdir():
        assert (DEMO / "clip" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((DEMO / "clip" / "config.json").read_text(encoding="utf-8"))
    table = header()["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert table["shape"] == [config["vocab_size"], config["hidden_size"]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("A  photo of a CAT", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("", [49406, 49407]),
    ],
)
def test_the_tokenizer_is_clips(text, ids):
    assert Tokenizer()(text).tolist() == [ids + [49407] * (77 - len(ids))]


def test_sources_and_licenses_are_named():
    text = (DEMO / "README.md").read_text(encoding="utf-8")
    for credit in (
        "Noto Emoji",
        "Fluent Emoji",
        "EmojiOne",
        "Streamline",
        "FxEmoji",
        "Twemoji",
        "Apache-2.0",
        "MIT",
        "CC-BY 4.0",
        "Changes",
    ):
        assert credit in text
