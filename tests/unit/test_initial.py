"""Runs that start from an existing LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from lora_trainer.adapters.hashes import model_hash
from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.naming import Factors
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Compared, Notice, Validated
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.tools.convert import convert
from lora_trainer.tools.result import kohya_tensors
from lora_trainer.training.initial import Start, fill
from lora_trainer.training.resume import ResumeError
from lora_trainer.training.segment import open_segment
from tests.tiny_sdxl import tiny_sdxl_checkpoint
from tests.unit.test_resize import delta
from tests.unit.test_resume import Run, at_step
from tests.unit.test_run import of, train

CPU = torch.device("cpu")


def trained(settings, folder: Path, **changes) -> Path:
    """The LoRA of a run over all that can be trained."""
    known = {"learning_rate": 0.02, "lora_alpha": 6, "output_dir": str(folder), "save_precision": "fp32"}
    train(settings, **{**known, "epochs": 1, "target_modules": ["default", "conv"], **changes})
    return folder / "tiny.safetensors"


@pytest.fixture
def lora(settings, tmp_path) -> Path:
    return trained(settings, tmp_path / "first", train_text_encoder=True)


ALL = {"target_modules": ["default", "conv"], "train_text_encoder": True, "lora_alpha": 6, "save_precision": "fp32"}


def begun(settings, path: Path, **changes) -> dict[str, Factors]:
    """What a run that starts from `path` would save before its first step, by kohya's names."""
    config = build(settings, {**ALL, **changes, "initial_lora": str(path)})
    from lora_trainer.adapters.parts import parts_of

    models = FileModels(Path(config.base_model), CPU, torch.float32, None, config.train_text_encoder)
    with models.borrow() as model, open_segment(config, model, None, start=Start.of(config)) as segment:
        parts = parts_of(model)
        return {name: f for part, fs in segment.factors().items() for name, f in parts[part].in_files(fs).items()}


def test_the_same_rank_and_alpha_take_the_very_numbers(settings, lora):
    mine, theirs = begun(settings, lora), read_lora(lora).factors
    assert mine.keys() == theirs.keys()
    for name, f in theirs.items():
        assert mine[name].down.equal(f.down)
        assert mine[name].up.equal(f.up)
        assert mine[name].alpha == f.alpha


@pytest.mark.parametrize(("changes", "tolerance"), [({"lora_alpha": 3}, 0), ({"lora_alpha": 5}, 1e-6)])
def test_another_alpha_scales_the_weights_to_match(settings, lora, changes, tolerance):
    mine, theirs = begun(settings, lora, **changes), read_lora(lora).factors
    for name, f in theirs.items():
        assert mine[name].alpha == changes["lora_alpha"]
        torch.testing.assert_close(delta(mine[name]), delta(f), rtol=tolerance, atol=tolerance)


def test_a_higher_rank_adds_the_same_and_can_learn(settings, lora):
    mine, theirs = begun(settings, lora, lora_rank=7, lora_alpha=10.5), read_lora(lora).factors
    for name, f in theirs.items():
        torch.testing.assert_close(delta(mine[name]), delta(f), rtol=1e-12, atol=1e-12)
        assert mine[name].down[f.rank :].abs().min() > 0
        assert not mine[name].up[:, f.rank :].any()


def test_a_lower_rank_is_the_nearest_one(settings, lora):
    mine, theirs = begun(settings, lora, lora_rank=2), read_lora(lora).factors
    for name, f in theirs.items():
        u, values, v = torch.linalg.svd(delta(f), full_matrices=False)
        torch.testing.assert_close(delta(mine[name]), (u[:, :2] * values[:2]) @ v[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_files_of_other_programs(settings, lora, tmp_path, form):
    there = tmp_path / ("there" if form == "peft" else "there.safetensors")
    convert(lora, there, form)
    mine, theirs = begun(settings, there), read_lora(lora).factors
    for name, f in theirs.items():
        torch.testing.assert_close(delta(mine[name]), delta(f), rtol=1e-5, atol=1e-6)


def test_what_it_lacks_starts_anew(settings, tmp_path):
    """A LoRA of the UNet alone, in a run that trains the text encoder too."""
    unet = trained(settings, tmp_path / "first")
    mine, theirs = begun(settings, unet), read_lora(unet).factors
    assert mine.keys() > theirs.keys()
    for name, f in mine.items():
        assert f.up.any() == (name in theirs), name


def test_a_run_goes_on_from_it_and_says_so(settings, lora, tmp_path):
    changes = {**ALL, "initial_lora": str(lora), "learning_rate": 1e-7, "epochs": 1, "output_dir": str(tmp_path / "2")}
    events, data = train(settings, **changes)
    before, after = load_file(lora), load(data)
    for name, tensor in before.items():
        # Lora dropout and Adam's first steps move each number by about the learning rate.
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)
    assert any(not after[name].equal(tensor) for name, tensor in before.items())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    expected = {"name": "tiny.safetensors", "sshs_model_hash": model_hash(lora.read_bytes())}
    assert json.loads(header["lora_trainer_initial"]) == expected
    assert str(tmp_path) not in json.dumps(header)
    assert any("starts from" in notice.text and "modules of rank 4" in notice.text for notice in of(events, Notice))


def test_the_curve_begins_at_the_base_without_it(settings, lora, tmp_path):
    held_out = {"validation_split": 0.2, "epochs": 1, "measure_drift": True, "drift_prompts": ["a dog"]}
    plain, _ = train(settings, **held_out, output_dir=str(tmp_path / "plain"))
    events, _ = train(settings, **held_out, **ALL, initial_lora=str(lora), output_dir=str(tmp_path / "2"))
    (base, *_), (first, *_) = of(plain, Validated), of(events, Validated)
    assert first.step == 0
    assert (first.base, first.train_base) == pytest.approx((base.lora, base.train), rel=1e-6)
    assert first.lora != first.base
    drift = of(events, Compared)[0]
    assert (drift.step, drift.drift > 0) == (0, True)
    assert of(plain, Compared)[0].drift == 0


@pytest.fixture
def job(settings, lora) -> Run:
    return Run({**settings, **ALL, "initial_lora": str(lora), "lora_rank": 3})


def test_a_killed_run_goes_on_from_its_state_even_without_the_file(job, settings, lora, tmp_path):
    other = {"output_dir": str(tmp_path / "undisturbed")}
    expected = Run({**job.settings, **other})(**other)
    job.killed(at_step(3))
    lora.unlink()
    assert job() == expected
    assert not any("starts from" in notice.text for notice in job.of(Notice))


def test_a_run_that_began_elsewhere_is_not_gone_on_with(job, lora):
    job.killed(at_step(3))
    with pytest.raises(ResumeError, match=r"tiny\.safetensors was its initial_lora, now None"):
        job(initial_lora=None)
    tensors = load_file(lora)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, lora)
    with pytest.raises(ResumeError, match="holds other weights"):
        job()


def test_a_name_among_the_webuis_loras(settings, lora, tmp_path):
    """models/Stable-diffusion/base.safetensors, models/Lora/folder/style.safetensors."""
    base = tmp_path / "models" / "Stable-diffusion" / "base.safetensors"
    style = tmp_path / "models" / "Lora" / "folder" / "style.safetensors"
    for path in (base, style):
        path.parent.mkdir(parents=True)
    base.symlink_to(settings["base_model"])
    style.write_bytes(lora.read_bytes())
    for name in ("style", "style.safetensors"):
        start = Start.of(build(settings, {"base_model": str(base), "initial_lora": name}))
        assert start.origin["name"] == "style.safetensors"
    with pytest.raises(
        ModelError, match=r"initial_lora: expected a LoRA file, or the name of one in .*Lora, found 'x'"
    ):
        Start.of(build(settings, {"base_model": str(base), "initial_lora": "x"}))
    with pytest.raises(ConfigError, match="initial_lora: expected a file or a name, found nothing"):
        build(settings, {"initial_lora": " "})


def refused(settings, tmp_path, path: Path, **changes) -> str:
    """The one line that refuses it, before anything is encoded or written."""
    out = tmp_path / "refused"
    with pytest.raises(ModelError) as caught:
        train(settings, **{"initial_lora": str(path), "output_dir": str(out), **changes})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("initial_lora: ")
    assert not out.exists() or not [file for file in out.rglob("*") if file.is_file()]
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(settings, lora, tmp_path):
    assert "train_text_encoder: true" in refused(settings, tmp_path, lora, target_modules=["default", "conv"])
    message = refused(settings, tmp_path, lora, train_text_encoder=True)
    assert "would be lost; expected train_unet and target_modules that mean them" in message
    f = next(iter(read_lora(lora).factors.values()))
    sd1 = {"ss_base_model_version": "sd_v1"}
    save_file(kohya_tensors({"lora_unet_down_blocks_9_x": f}), tmp_path / "strange.safetensors", sd1)
    assert "1 of its 1 modules have no place in" in refused(settings, tmp_path, tmp_path / "strange.safetensors")
    wide = {"lora_unet_mid_block_attentions_0_proj_in": Factors(torch.ones(2, 7), torch.ones(5, 2), 1.0)}
    save_file(kohya_tensors(wide), tmp_path / "wide.safetensors", sd1)
    assert "made for another base model" in refused(settings, tmp_path, tmp_path / "wide.safetensors")
    loha = {
        f"lora_unet_mid_block_attentions_0_proj_in.hada_w{n}": torch.ones(2, 2) for n in ("1_a", "1_b", "2_a", "2_b")
    }
    save_file(loha, tmp_path / "loha.safetensors", sd1)
    refused(settings, tmp_path, tmp_path / "loha.safetensors")


def test_an_sdxl_lora_starts_no_sd1_run_and_starts_an_sdxl_one(settings, tmp_path):
    base = tiny_sdxl_checkpoint(tmp_path)
    xl = {**settings, "base_model": str(base), "resolution": 64}
    lora = trained(xl, tmp_path / "first", train_text_encoder=True)
    assert "is a LoRA for SDXL; this run trains Stable Diffusion 1.x" in refused(settings, tmp_path, lora)
    # Its file has modules of zeros, which nobody trains, beside those of partly trained attentions.
    mine, theirs = begun(xl, lora), read_lora(lora).factors
    assert mine.keys() == theirs.keys()
    assert all(mine[name].up.equal(f.up) for name, f in theirs.items())


def test_nothing_is_filled_of_nothing():
    fill({}, Start().placed(None, None))
