"""The command line: exit codes, one clear line for bad input, the JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.cli import main


def arguments(settings, *more):
    return ["train", *(f"{key}={value}" for key, value in settings.items()), *more]


def refused(capsys, *argv):
    """The error lines of a command that must end with exit code 2 and no traceback."""
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


def test_train_ends_with_one_json_line(settings, capsys):
    assert main([*arguments(settings, "validation_split=0.2"), "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    result = json.loads(line)
    assert set(result) == {"state", "output", "steps", "loss", "validation", "seconds"}
    assert result["state"] == "done"
    assert Path(result["output"][0]).is_file()
    assert result["validation"]["base"] > 0
    for words in ("parameters train", "effective batch 2", "LoRA scale 2", "training in fp32 on the CPU"):
        assert words in captured.err


def test_a_config_file_and_overrides(settings, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in settings.items()), encoding="utf-8")
    assert main(["train", "--config", str(path), "epochs=1", "--lora_rank", "2", "--enable_xformers", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "enable_xformers: not needed" in captured.err
    assert result["validation"] is None
    assert main(["inspect", result["output"][0]]) == 0
    assert "rank: 2; alpha: 4" in capsys.readouterr().out
    logs = Path(settings["output_dir"]) / "logs" / "steps.csv"
    assert len(logs.read_text().splitlines()) == 1 + result["steps"]


def test_tensorboard_log_is_written(settings):
    pytest.importorskip("tensorboard")
    assert main(arguments(settings, "log_with=tensorboard", "epochs=1")) == 0
    assert list((Path(settings["output_dir"]) / "logs").glob("events.out.tfevents*"))


def test_trial_ends_with_a_forecast(settings, capsys):
    assert main(arguments(settings, "--trial")) == 0
    assert "trial passed: the full run has 6 steps" in capsys.readouterr().err


def test_sample_draws_side_by_side(settings, tmp_path, capsys):
    assert main([*arguments(settings, "epochs=1"), "--json"]) == 0
    lora = json.loads(capsys.readouterr().out)["output"][0]
    out = tmp_path / "drawn"
    common = ["--base", settings["base_model"], "--prompt", "a cat", "--out", str(out), "--steps", "2", "--size", "64"]
    assert main(["sample", "--lora", lora, *common, "--weight", "0"]) == 0
    assert Image.open(out / "001-base.png").tobytes() == Image.open(out / "001-lora.png").tobytes()
    assert (out / "sheet.png").is_file()


def test_options_and_help(capsys):
    assert main(["options"]) == 0
    assert "| `lora_rank` |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "a", "--nonsense"])
    assert ended.value.code == 2


def test_misspelt_and_out_of_range_are_reported_at_once(settings, capsys):
    lines = refused(capsys, *arguments(settings, "learning_rat=1", "lora_rank=0", "epochs=many"))
    assert len(lines) == 3
    assert any("did you mean learning_rate" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("base_model=missing.safetensors", "missing.safetensors: no such file"),
        ("train_data_dir=missing", "missing: no such folder"),
        ("device=cuda:99", "device: expected auto, cpu or a device of this machine"),
        ("target_modules=to_z", "target_modules: expected sets or endings"),
        ("metadata_path=nothing.csv", "nothing.csv: no such file"),
        ("validation_data_dir=nowhere", "nowhere: no such folder"),
    ],
)
def test_what_is_not_there(settings, capsys, change, words):
    lines = refused(capsys, *arguments(settings, change))
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(Path(settings["output_dir"]).glob("*.safetensors"))


def test_data_errors_are_one_line(settings, capsys):
    folder = Path(settings["train_data_dir"])
    csv = folder / "metadata.csv"
    good = csv.read_text()
    csv.write_text(good + '\nghost.png,"not there"')
    assert "line 7: ghost.png" in refused(capsys, *arguments(settings))[0]
    csv.write_text("\n".join(good.splitlines()[:-2]))
    assert "2 of 6 pictures have no caption (p4.png, p5.png)" in refused(capsys, *arguments(settings))[0]
    csv.unlink()
    for picture in folder.glob("*.png"):
        picture.unlink()
    assert "found none among 0 files" in refused(capsys, *arguments(settings))[0]


def test_a_truncated_picture_is_named_skipped_and_counted(settings, capsys):
    picture = Path(settings["train_data_dir"]) / "p0.png"
    picture.write_bytes(picture.read_bytes()[:200])
    assert main(arguments(settings)) == 0
    err = capsys.readouterr().err
    assert f"skipped: {picture}" in err
    assert "1 of 6 images skipped" in err


def test_no_usable_picture_is_an_error(settings, capsys):
    for picture in Path(settings["train_data_dir"]).glob("*.png"):
        picture.write_bytes(b"no picture")
    lines = refused(capsys, *arguments(settings))
    assert "none of its 6 images can be used" in lines[-1]


def test_files_that_are_no_checkpoint(settings, tmp_path, capsys):
    from safetensors.torch import save_file

    from tests.tiny import tiny_state

    state = tiny_state()
    other = {
        "text.safetensors": b"hello",
        "page.safetensors": b"<html>" + b" " * 100,
        "empty.safetensors": b"",
        "bad.ckpt": b"not a pickle",
    }
    for name, data in other.items():
        (tmp_path / name).write_bytes(data)
    save_file({"a": state["model.diffusion_model.out.2.bias"]}, tmp_path / "strange.safetensors")
    flux = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": state["model.diffusion_model.out.2.bias"]}
    save_file(flux, tmp_path / "flux.safetensors")
    whole = Path(settings["base_model"]).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    words = {
        "text.safetensors": "not a .safetensors file",
        "page.safetensors": "not a .safetensors file",
        "empty.safetensors": "not a .safetensors file",
        "bad.ckpt": "not loaded",
        "strange.safetensors": "not Stable Diffusion 1.x",
        "flux.safetensors": "a Flux checkpoint",
        "short.safetensors": "truncated",
    }
    for name, expected in words.items():
        (line,) = refused(capsys, *arguments({**settings, "base_model": tmp_path / name}))
        assert name in line
        assert expected in line


def test_a_ckpt_of_plain_tensors_trains_alike(settings, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "tiny.ckpt"
    torch.save({"state_dict": load_file(settings["base_model"])}, path)
    results = []
    for base in (settings["base_model"], path):
        assert main([*arguments({**settings, "base_model": base, "overwrite": True}), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["loss"])
    assert results[0] == results[1]


def test_a_defect_of_ours_is_one_line_and_a_file(settings, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("lora_trainer.hosts.standalone.train", broken)
    assert main(arguments(settings)) == 1
    err = capsys.readouterr().err
    assert "failed: RuntimeError: boom (details for an issue in " in err
    assert "Traceback" not in err


def test_ctrl_c_saves_and_says_where(settings):
    """A real process gets a real SIGINT after its first steps."""
    import os
    import signal
    import subprocess
    import sys
    import time

    root = Path(__file__).parents[2]
    command = [sys.executable, "-u", "-m", "lora_trainer.cli", *arguments(settings, "epochs=5000"), "--json"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    steps = Path(settings["output_dir"]) / "logs" / "steps.csv"
    end = time.time() + 60
    while time.time() < end and not (steps.exists() and steps.stat().st_size > 100):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    result = json.loads(out)
    assert result["state"] == "stopped"
    assert Path(result["output"][0]).is_file()
    assert f"saved {result['output'][0]}" in err
