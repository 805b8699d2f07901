"""Settings that were made to hurt, or by somebody who was in a hurry."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from lora_trainer.config import build
from lora_trainer.config.header import MAX_HEADER_BYTES
from lora_trainer.config.sources import HEADER_KEY, parse_overrides, read_file
from lora_trainer.errors import ConfigError

NEEDED = {"base_model": "b.safetensors", "train_data_dir": "d"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 10**400),
        ("learning_rate", "1" + "0" * 400),
        pytest.param("lora_rank", 16**5000, id="huge"),
        ("output_name", "\ud800"),
        ("training_comment", "half a pair \udc00"),
        ("sample_prompts", ["fine", "\ud800"]),
        ("output_dir", "a\0b"),
        ("train_data_dir", "a\0b"),
    ],
)
def test_values_that_no_file_can_hold(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: expected "):
        build(NEEDED, {key: value})


def test_thousands_of_unknown_keys_are_counted_only():
    with pytest.raises(ConfigError) as caught:
        build(NEEDED, dict.fromkeys(map(str, range(5000))), {"x" * 10**6: 1})
    assert len(caught.value.problems) < 110


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nlora_rank: *a",
        "base: &b {x: 1}\n<<: *b",
        'lora_rank: !!int ""',
        "lora_rank: !!bool x",
        "lora_rank: !!timestamp x",
        "training_comment: 2024-13-01",
        "learning_rate: " + ":".join(["1"] * 300) + ".5",
        "lora_rank: " + "9" * 5000,
        "[" * 3000,
    ],
)
def test_yaml_that_makes_its_reader_stumble(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_file(path)


def test_what_yaml_stumbles_over_is_text_on_the_command_line():
    assert parse_overrides(["training_comment=2024-13-01"]) == {"training_comment": "2024-13-01"}
    assert parse_overrides(["training_comment=*stars*"]) == {"training_comment": "*stars*"}
    assert parse_overrides(["training_comment=" + "[" * 3000])["training_comment"].startswith("[[[")


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"[" * 100_000),
        safetensors(b'{"__metadata__": 7}'),
        safetensors(b"{}", 2**63),
        safetensors(b" " * (MAX_HEADER_BYTES + 1)),
        *(
            safetensors(json.dumps({"__metadata__": {HEADER_KEY: inner}}).encode())
            for inner in (7, None, "[" * 100_000, '[["a", 1]]', "[[1, 2]]", "7", "{")
        ),
    ],
)
def test_headers_that_hold_no_settings(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_file(path)


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="64 KiB"):
        read_file(Path("/dev/zero"))
