"""What the README tells people to type is understood."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import install
from lora_trainer.api.routes import PREFIX, ROUTES
from lora_trainer.cli import _crops, _find_lr, _parser, _train, config_of
from lora_trainer.config import build, output_name_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
COMMANDS = re.findall(r"^(?:lora-trainer|python train\.py|python tools/auto_label\.py) .+$", README, re.MULTILINE)
FILES = {"train.py": "train", "tools/auto_label.py": "caption"}


def test_the_yaml_is_valid_and_gives_the_name_that_follows_in_the_text():
    assert f"{output_name_of(build(GUIDE))}.safetensors" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_style.yaml").write_text(yaml.safe_dump(GUIDE), encoding="utf-8")
    words = shlex.split(command.split("#")[0])
    given = words[1:] if words[0] == "lora-trainer" else [FILES[words[1]], *words[2:]]
    arguments, rest = _parser().parse_known_args(given)
    if arguments.command in (_train, _find_lr, _crops):
        config_of(arguments.config, rest, base_model="any")
    else:
        assert not rest


def test_there_are_commands_and_files():
    assert len(COMMANDS) >= 5
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_api_is_described_as_it_is():
    described = set(re.findall(rf"^\| `(GET|POST) {PREFIX}([\w/{{}}-]+)` \|", README, re.MULTILINE))
    assert described == {(method, path) for method, path, _ in ROUTES}
    (body,) = re.findall(r"^ +-d '(.+)'$", README, re.MULTILINE)
    build({"base_model": "the loaded one", "output_dir": "runs"}, json.loads(body))


def test_what_install_adds_is_named():
    added = README[README.index("`install.py` adds") : README.index("A package that is there")]
    for package in install.PACKAGES:
        assert package.name in added
        assert package.needed_by or f"{package.name} {package.version}" in added
