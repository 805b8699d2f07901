"""Other trainers' files: whatever is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hypothesis import strategies as st

from lora_trainer.config import build
from lora_trainer.config.yaml_text import parse_yaml
from lora_trainer.dataset.items import scan
from lora_trainer.errors import UserError
from lora_trainer.imports import kohya, lora_scripts
from lora_trainer.imports.read import read_file, to_yaml
from tests.fuzz.harness import fuzz, readable, works_or_refuses
from tests.fuzz.inputs import FINE, TEXT, VALUES, dumps, file, mutated, pieces
from tests.fuzz.watch import ARENA

TOML = ["[general]\n", "[[datasets]]\n", "[[datasets.subsets]]\n", "image_dir = ", "num_repeats = ", "a.b.c = ", "\n"]
TOML += ["'", '"', '"""', "[", "]", "{", "}", ",", "=", ".", "1", "1e999", "nan", "true", "1979-05-27T07:32:00Z", "#"]
TOML += [*("train_data_dir = ", "network_dim = ", "network_alpha = ", "resolution = ", "sample_prompts = '--n --l'")]
SEEDS = [b"[general]\nkeep_tokens = 1\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'C:\\hoge'\n"]
SEEDS += [
    b"[a]\ntrain_data_dir = 'x'\nnetwork_dim = 32\nnetwork_alpha = 16\nunet_lr = '1e-4'\nresolution = '512,512'\n"
]
KEYS = st.sampled_from(
    [
        *("general", "datasets", "subsets", "image_dir", "num_repeats", "class_tokens", "is_reg", "validation_split"),
        *("concepts", "path", "enabled", "type", "balancing", "balancing_strategy", "image", "text", "prompt_source"),
        *(*lora_scripts._SAME, *lora_scripts._DEFAULTS, *lora_scripts._PREVIEWS, *lora_scripts._REASONS),
        *kohya.AUGMENT,
        *(
            "resolution",
            "sample_prompts",
            "unet_lr",
            "text_encoder_lr",
            "max_train_epochs",
            "max_train_steps",
            "metadata",
        ),
    ]
)
TABLES = st.recursive(
    VALUES | st.sampled_from(["a", ".", "../x", "C:\\x", "\\\\nas\\x", "\0", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
SUBSETS = st.lists(st.dictionaries(KEYS, TABLES, max_size=4).map(lambda table: {"image_dir": "a", **table}), max_size=3)
DATASETS = st.fixed_dictionaries({"datasets": st.lists(st.fixed_dictionaries({"subsets": SUBSETS}), max_size=2)})
CONCEPTS = st.lists(st.dictionaries(KEYS, TABLES, max_size=5).map(lambda table: {"path": "a", **table}), min_size=1)
RUNS = st.dictionaries(KEYS, TABLES, max_size=8).map(lambda table: {"train_data_dir": "a", **table})


def imported(path: Path) -> None:
    """What is taken builds, and its YAML says it again."""
    name, taken = read_file(path)
    build(FINE, taken.settings)
    text = to_yaml(path, name, taken)
    for line in text.splitlines():
        readable(line or "-")
    assert build(FINE, parse_yaml(text)) == build(FINE, taken.settings)


@fuzz("imports", 60, content=mutated(SEEDS, front=200) | pieces(TOML, 12))
def test_any_toml(content):
    with works_or_refuses():
        imported(file("run.toml", content))


@fuzz("imports", 100, data=TABLES | DATASETS | CONCEPTS | RUNS)
def test_any_json(data):
    with works_or_refuses():
        imported(file("run.json", dumps(data)))


NAMES = st.tuples(st.sampled_from(["", "1", "10", "0", "007", "1001", "9" * 50, "-1", "１"]), TEXT).map("_".join)


@fuzz(
    "concepts",
    60,
    folders=st.lists(NAMES | st.sampled_from(["train", "test", "Train", "val"]), max_size=4),
    concepts=VALUES,
)
def test_any_folder_names_and_any_concepts(folders, concepts):
    home = ARENA.inside / "set"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    for name in folders:
        if "/" in name or name in (".", ".."):
            continue
        try:
            (home / name).mkdir(exist_ok=True)
            (home / name / "a.png").write_bytes(b"")
        except (OSError, ValueError):
            continue
    with works_or_refuses():
        try:
            told = scan(home)
        except UserError as error:
            readable(str(error))
            raise
        for line in told.notes:
            readable(line)
        assert all(1 <= item.repeats <= 1000 for item in told.items)
    with works_or_refuses():
        config = build(FINE, {"train_data_dir": str(home), "concepts": concepts})
        json.dumps([str(concept) for concept in config.concepts])
