"""Settings from YAML, JSON, file headers, the command line and the API."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
from hypothesis import strategies as st

from lora_trainer.config import build, output_name_of
from lora_trainer.config.export import template, to_header, to_yaml
from lora_trainer.config.options import options
from lora_trainer.config.sources import HEADER_KEY, parse_overrides, read_file
from lora_trainer.models.ldm_yaml import read_beside
from tests.fuzz.harness import fuzz, quick, works_or_refuses
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
SCALARS = ["'", '"', '""', "x", "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 20_000, "1:2" * 3000]
SCALARS += [":".join(["1"] * 300) + ".5", "1e999", "-.inf", ".nan", "=", "*a", "&a x", "0o9", "1_2", "[a]"]
SCALARS += ["1:59.5", "2024-13-01", "{a: b}", "~"]
TAGS = ["", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!null ", "!!str ", "!!set ", "! "]


def references(first: str, line: str) -> str:
    """A few lines that stand for 9 to the power of 9 values."""
    lines = [f"a{n}: &a{n} {line.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 10)]
    return "\n".join([f"a0: &a0 {first}", *lines, "lora_rank: *a9", "<<: *a9"])


SEEDS = [template().encode(), b"lora_rank: 8\nsample_prompts: [a, b]\n"]
SEEDS += [references("[x, x, x]", "[{}]").encode(), references("{x: 1}", "{{<<: [{}]}}").encode()]


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


HARD = [10**400, -(10**400), "1" + "0" * 400, "9" * 5000, "\ud800", ["\ud800"], "a\0b"]
HARD += [[[[[[1]]]]], "x" * 10**6, [1] * 10**5]


@fuzz("config", 30, [{"value": value} for value in HARD], many=True, value=VALUES)
def test_any_value_of_any_option(value):
    for key in options():
        with quick(), works_or_refuses():
            usable({key: value})


@fuzz("config", 70, content=pieces(YAML) | pieces(YAML).map("lora_rank: ".__add__))
def test_yaml_text(content):
    with works_or_refuses():
        usable(read_file(file("settings.yaml", content)))


KEY = st.sampled_from(["lora_rank", "learning_rate", "training_comment", "sample_prompts", "trial", "x"])


LONG = [{"key": "lora_rank", "tag": "", "scalar": scalar} for scalar in SCALARS]


@fuzz("config", 70, LONG, key=KEY, tag=st.sampled_from(TAGS), scalar=st.sampled_from(SCALARS) | TEXT)
def test_yaml_values(key, tag, scalar):
    with works_or_refuses():
        usable(read_file(file("value.yaml", f"{key}: {tag}{scalar}")))
    with works_or_refuses():
        usable(parse_overrides([f"{key}={tag}{scalar}"]))


WHOLE = [{"content": seed, "suffix": ".yaml"} for seed in SEEDS]
SUFFIX = st.sampled_from([".yaml", ".yml", ".json", ".YAML"])


@fuzz("config", 40, WHOLE, content=mutated(SEEDS, front=5000), suffix=SUFFIX)
def test_yaml_with_damage(content, suffix):
    with works_or_refuses():
        usable(read_file(file(f"damaged{suffix}", content)))


@fuzz("config", 60, content=SETTINGS.map(dumps) | VALUES.map(dumps) | pieces(['{"', '": ', ",", "[", "]", "}"]))
def test_json_text(content):
    with works_or_refuses():
        usable(read_file(file("settings.json", content)))


INNER = SETTINGS.map(dumps) | VALUES.map(dumps) | st.just("[" * 5000) | st.just('[["a", 1], [2, 3]]') | VALUES
HEADERS = st.fixed_dictionaries({"__metadata__": st.fixed_dictionaries({HEADER_KEY: INNER}) | VALUES}) | VALUES


DEEP = [{"header": "[" * 10**5, "length": None, "tail": b""}, {"header": {}, "length": 2**63, "tail": b""}]
DEEP += [
    {"header": {"__metadata__": {HEADER_KEY: inner}}, "length": None, "tail": b""}
    for inner in ("[" * 10**5, "[[1, 2]]", '{"lora_rank": 8}')
]


@fuzz("config", 60, DEEP, header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), tail=st.binary(max_size=8))
def test_headers(header, length, tail):
    data = header.encode() if isinstance(header, str) and header[:2] == "[[" else dumps(header).encode()
    start = struct.pack("<Q", len(data) if length is None else length)
    with works_or_refuses():
        usable(read_file(file("header.safetensors", start + data + tail)))


WORD = TEXT | st.tuples(st.sampled_from(["", "--", "---"]), KEYS, st.sampled_from(["=", "", " "]), TEXT).map("".join)


@fuzz("config", 60, words=st.lists(WORD | pieces(YAML, 8).map("training_comment=".__add__), max_size=5))
def test_command_line(words):
    with works_or_refuses():
        usable(parse_overrides(words))


LDM = ["model:", "params:", "unet_config:", "num_heads: ", "scale_factor: ", "timesteps: ", "version: ", "linear_end: "]
WORLD = (Path(__file__).parents[2] / "demo" / "emoji-world.yaml").read_bytes()
CONFIGS = mutated([WORLD], front=2000) | pieces([*LDM, *YAML]).map(lambda text: text.encode("utf-8", "surrogatepass"))


@fuzz("config", 40, [{"content": b"[" * 10**5}, {"content": b"a" * 10**6}], content=CONFIGS)
def test_the_config_beside_a_checkpoint(content):
    path = file("model.yaml", content)
    with works_or_refuses():
        read_beside(path.with_suffix(".safetensors"))
