"""Every option stands on every surface, and what is generated is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lora_trainer.config.export import PRESETS_START, TABLE_END, TABLE_START, preset_table, table, template, with_tables
from lora_trainer.config.options import options
from lora_trainer.config.schema import GROUPS

ROOT = Path(__file__).parents[2]


def test_template_is_fresh_and_complete():
    text = (ROOT / "configs" / "lora_default.yaml").read_text(encoding="utf-8")
    assert text == template(), "run: python -m lora_trainer.config.export"
    named = set(re.findall(r"^(?:# )?(\w+):", text, re.MULTILINE)) - {"Values"}
    assert named == set(options())
    loaded = yaml.safe_load(text)
    assert {key: value for key, value in loaded.items() if not options()[key].required} == {
        key: option.default for key, option in options().items() if option.default is not None
    }


def test_readme_table_is_fresh_and_complete():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python -m lora_trainer.config.export"
    part = text[text.index(TABLE_START) : text.index(TABLE_END)]
    assert set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == set(options())
    assert table() in part
    assert preset_table() in text[text.index(PRESETS_START) :]


def test_every_option_has_a_group_and_a_short_help():
    for option in options().values():
        assert option.group in GROUPS
        assert 10 < len(option.help) < 160
        assert option.help.endswith(".")
