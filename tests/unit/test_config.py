"""One declaration, many ways in: conversion, problems, files, the command line, the header."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from lora_trainer.config import build, output_name_of, replace
from lora_trainer.config.export import table, to_header, to_yaml
from lora_trainer.config.sources import HEADER_KEY, parse_overrides, read_file
from lora_trainer.errors import ConfigError

NEEDED = {"train_data_dir": "./data/style_train", "base_model": "v1-5.safetensors"}
GUIDE = """
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
gradient_accumulation_steps: 2
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
log_with: "tensorboard"
"""


def problems(**settings):
    with pytest.raises(ConfigError) as caught:
        build(NEEDED, settings)
    return caught.value.problems


def test_the_guides_yaml_arrives(tmp_path):
    path = tmp_path / "guide.yaml"
    path.write_text(GUIDE, encoding="utf-8-sig")
    config = build(read_file(path))
    assert config.learning_rate == 0.0002
    assert config.save_steps == 100
    assert config.log_with == "tensorboard"
    assert output_name_of(config) == "style-train-r8-e10"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mixed_precision", False, "no"),
        ("gradient_checkpointing", "on", True),
        ("gradient_checkpointing", "No", False),
        ("sample_prompts", "a cat", ["a cat"]),
        ("target_modules", ["to_q", "to_v"], ["to_q", "to_v"]),
        ("lora_rank", 8.0, 8),
        ("lora_rank", "16", 16),
        ("learning_rate", "1e-5", 1e-5),
        ("output_name", 2024, "2024"),
        ("max_train_steps", None, None),
        ("resolution", 768, 768),
    ],
)
def test_values_are_converted_by_their_field(key, value, expected):
    got = getattr(build(NEEDED, {key: value}), key)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", 4.5),
        ("lora_rank", True),
        ("lora_rank", None),
        ("learning_rate", float("inf")),
        ("learning_rate", "nan"),
        ("learning_rate", 0),
        ("gradient_checkpointing", "maybe"),
        ("gradient_checkpointing", 1),
        ("mixed_precision", True),
        ("mixed_precision", "fp32"),
        ("resolution", 500),
        ("sample_prompts", [{}]),
        ("target_modules", []),
        ("output_dir", {"a": 1}),
        ("weight_decay", float("nan")),
    ],
)
def test_a_wrong_value_is_one_line_with_key_and_value(key, value):
    (problem,) = problems(**{key: value})
    assert problem.startswith(f"{key}: expected ")
    assert "found " in problem


def test_all_problems_are_reported_at_once_with_the_nearest_key():
    with pytest.raises(ConfigError) as caught:
        build({"train_data_dir": "a", "lora_rnk": 4, "epochs": 0, "batch_size": "x"})
    text = str(caught.value)
    assert "lora_rnk: no such option; did you mean lora_rank?" in text
    assert "base_model: missing; add base_model=…" in text
    assert "epochs: expected a whole number from 1" in text
    assert "batch_size" in text
    assert len(caught.value.problems) == 4


def test_rules_between_fields():
    assert "validation_split" in problems(validation_data_dir="v", validation_split=0.1)[0]
    assert "sample_prompts" in problems(sample_every=10)[0]
    assert "validation_data_dir" in problems(validate_every=10)[0]
    assert "max_train_steps (5)" in problems(max_train_steps=5, lr_warmup_steps=9)[0]
    for name in ("a:b", "a/b", "..", "none", "Addams", "CON", "nul.x", "x,y", "a<b", "x" * 200, " a"):
        assert problems(output_name=name)[0].startswith("output_name"), name
    assert build(NEEDED, {"output_name": "スタイル-v1.5"}).output_name == "スタイル-v1.5"


def test_replace_checks_too():
    with pytest.raises(ConfigError, match="lora_rank"):
        replace(build(NEEDED), lora_rank=0)


def test_default_names_stay_usable():
    assert (
        output_name_of(build(NEEDED, {"train_data_dir": "/data/赤い りんご/", "max_train_steps": 7}))
        == "赤い-りんご-r8-s7"
    )
    assert output_name_of(build(NEEDED, {"train_data_dir": "d/" + "長" * 80})).encode().__len__() <= 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "line 2: not valid YAML: the key a stands there twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "expected lines of `key: value`, found list"),
        ("", "found NoneType"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_place(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="x.yaml") as caught:
        read_file(path)
    assert message in str(caught.value)


def test_other_bad_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "bad.json").write_text('{"a": }')
    (tmp_path / "huge.yaml").write_bytes(b"#" * 2_000_000)
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    (tmp_path / "other.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    for name, part in {
        "latin.yaml": "UTF-8",
        "bad.json": "line 1",
        "huge.yaml": "64 KiB",
        "short.safetensors": "truncated",
        "other.safetensors": "no settings in its header",
        "missing.yaml": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=part):
            read_file(tmp_path / name)


def test_the_command_lines_forms():
    assert parse_overrides(
        ["epochs=3", "--lora_rank", "4", "--learning-rate=1e-5", "--enable_xformers", "--gradient_checkpointing", "no"]
        + ["sample_prompts=[a cat, a dog]", "output_name=2024", "--trigger_words", "a: b", "--trial"]
    ) == {
        "epochs": 3,
        "lora_rank": 4,
        "learning_rate": "1e-5",
        "enable_xformers": True,
        "gradient_checkpointing": False,
        "sample_prompts": ["a cat", "a dog"],
        "output_name": 2024,
        "trigger_words": "a: b",
        "trial": True,
    }
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides(["epochs"])
    with pytest.raises(ConfigError, match="expected a value after it"):
        parse_overrides(["--epochs"])


def test_yaml_and_header_round_trip(tmp_path):
    config = build(
        NEEDED, {"sample_prompts": ["x"], "sample_every": 5, "output_dir": str(tmp_path), "learning_rate": 3e-5}
    )
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert build(read_file(path)) == config
    header = json.dumps({"__metadata__": {HEADER_KEY: to_header(config)}}).encode()
    lora = tmp_path / "c.safetensors"
    lora.write_bytes(struct.pack("<Q", len(header)) + header)
    settings = read_file(lora)
    assert "sample_prompts" not in settings
    assert "output_dir" not in settings
    assert settings["train_data_dir"] == NEEDED["train_data_dir"]
    assert replace(build(settings), output_dir=str(tmp_path), sample_prompts=["x"], sample_every=5) == config
    everything = replace(config, metadata_private=True)
    assert build(json.loads(to_header(everything))) == everything


def test_a_header_that_left_a_path_out_says_what_to_add():
    settings = json.loads(to_header(build(NEEDED, {"train_data_dir": "/home/me/pictures"})))
    with pytest.raises(ConfigError, match="train_data_dir: missing; add train_data_dir=…"):
        build(settings)


def test_shipped_yaml_is_valid():
    root = Path(__file__).parents[2]
    build(read_file(root / "configs" / "lora_default.yaml"))
    build(read_file(root / "demo" / "style.yaml"))


def test_no_cell_of_the_table_of_options_is_cut_by_a_bar_in_its_words():
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert "\\|" in next(row for row in rows if "`wildcards`" in row)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}
