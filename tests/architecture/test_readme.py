"""What the README tells people to type is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lora_trainer.cli import _parser, _train, config_of
from lora_trainer.config import build, output_name_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
COMMANDS = re.findall(r"^(?:lora-trainer|python train\.py) .+$", README, re.MULTILINE)


def test_the_yaml_is_valid_and_gives_the_name_that_follows_in_the_text():
    assert f"{output_name_of(build(GUIDE))}.safetensors" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_style.yaml").write_text(yaml.safe_dump(GUIDE), encoding="utf-8")
    words = shlex.split(command.split("#")[0])
    arguments, rest = _parser().parse_known_args(words[1:] if words[0] == "lora-trainer" else ["train", *words[2:]])
    if arguments.command is _train:
        config_of(arguments.config, rest)
    else:
        assert not rest


def test_there_are_commands_and_files():
    assert len(COMMANDS) >= 5
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
