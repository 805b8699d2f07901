"""The demo learns the style, and not just something: against a placebo and against shuffled captions."""

from __future__ import annotations

import json

import pytest

from lora_trainer.cli import main
from lora_trainer.demo import WORLD, demo_config
from lora_trainer.hosts.standalone import train


@pytest.mark.slow
def test_the_demo_learns_the_style_and_the_placebo_does_not(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    evidence = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert (tmp_path / "demo" / "sheet.png").is_file()
    assert {name: result["validation"][name] for name in ("base", "lora")} == {
        name: evidence[name] for name in ("base", "lora")
    }
    assert evidence["gain"] >= 0.25
    assert evidence["shuffled_captions"] >= 1.03 * evidence["lora"]
    assert evidence["weight_0_is_base"]

    folder = WORLD / "placebo"
    placebo = train(
        demo_config(tmp_path / "placebo", train_data_dir=str(folder), metadata_path=str(folder / "metadata.csv")),
        lambda event: None,
    )
    placebo_gain = 1 - placebo.validation_lora / placebo.validation_base
    print(f"gain {evidence['gain']:.3f}, of the placebo {placebo_gain:.3f}")
    assert evidence["gain"] >= 3 * placebo_gain
