"""Settings from YAML, JSON, file headers, the command line and the API."""

from __future__ import annotations

import struct

import msgspec
from hypothesis import strategies as st

from lora_trainer.config import build, output_name_of
from lora_trainer.config.export import template, to_header, to_yaml
from lora_trainer.config.options import options
from lora_trainer.config.sources import HEADER_KEY, parse_overrides, read_file
from tests.fuzz.harness import fuzz, works_or_refuses
from tests.fuzz.inputs import FINE, KEYS, SETTINGS, TEXT, VALUES, dumps, file, mutated, pieces

YAML = [
    *("\n", " ", "  ", ": ", "- ", ",", "[", "]", "{", "}", "#", "|", ">", "'", '"', "&a ", "*a", "<<: ", "? ", "!")
]
YAML += [
    *("---\n", "...\n", "%YAML 1.1\n", "!!int ", "!!float ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "=")
]
YAML += [
    *("1_000", "0o17", "0b11", "190:20:30", "190:20:30.15", ".inf", "2001-12-14t21:59:43.10-05:00", "\t"),
    *options(),
]
# Lists of lists by reference: a few lines stand for 9 to the power of 9 values.
REFERENCES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
SEEDS = [template().encode(), (REFERENCES + "lora_rank: *a9\n").encode(), b"lora_rank: 8\nsample_prompts: [a, b]\n"]


def usable(*sources) -> None:
    """What is accepted can also be kept: on disk, in a header, as an answer."""
    config = build(FINE, *sources)
    assert build(read_file(file("kept.yaml", to_yaml(config)))) == config
    msgspec.json.encode(config)
    to_header(config).encode()
    output_name_of(config).encode()


@fuzz("config", 80, settings=SETTINGS)
def test_any_settings(settings):
    with works_or_refuses():
        usable(settings)


@fuzz("config", 40, key=st.sampled_from(list(options())), value=VALUES)
def test_any_value_of_an_option(key, value):
    with works_or_refuses():
        usable({key: value})


@fuzz("config", 70, content=pieces(YAML) | pieces(YAML).map("lora_rank: ".__add__))
def test_yaml_text(content):
    with works_or_refuses():
        usable(read_file(file("settings.yaml", content)))


@fuzz("config", 40, content=mutated(SEEDS, front=5000), suffix=st.sampled_from([".yaml", ".yml", ".json", ".YAML"]))
def test_yaml_with_damage(content, suffix):
    with works_or_refuses():
        usable(read_file(file(f"damaged{suffix}", content)))


@fuzz("config", 60, content=SETTINGS.map(dumps) | VALUES.map(dumps) | pieces(['{"', '": ', ",", "[", "]", "}"]))
def test_json_text(content):
    with works_or_refuses():
        usable(read_file(file("settings.json", content)))


INNER = SETTINGS.map(dumps) | VALUES.map(dumps) | st.just("[" * 5000) | st.just('[["a", 1], [2, 3]]') | VALUES
HEADERS = st.fixed_dictionaries({"__metadata__": st.fixed_dictionaries({HEADER_KEY: INNER}) | VALUES}) | VALUES


@fuzz("config", 60, header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), tail=st.binary(max_size=8))
def test_headers(header, length, tail):
    data = dumps(header).encode()
    start = struct.pack("<Q", len(data) if length is None else length)
    with works_or_refuses():
        usable(read_file(file("header.safetensors", start + data + tail)))


WORD = TEXT | st.tuples(st.sampled_from(["", "--", "---"]), KEYS, st.sampled_from(["=", "", " "]), TEXT).map("".join)


@fuzz("config", 60, words=st.lists(WORD | pieces(YAML, 8).map("training_comment=".__add__), max_size=5))
def test_command_line(words):
    with works_or_refuses():
        usable(parse_overrides(words))
