"""`lora-trainer convert`: names that the others have, and the very tensors on the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.ldm import unet_state
from benchmarks.models import UNETS
from lora_trainer.adapters.hashes import model_hash
from lora_trainer.adapters.load import read_lora
from lora_trainer.cli import main
from lora_trainer.errors import ModelError, OutputError
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.checkpoint import read_header
from lora_trainer.models.unet_names import LDM_PREFIX
from lora_trainer.sampling import apply_lora
from lora_trainer.tools.convert import convert

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
SD1, SD2, SDXL = "sd_v1", "sd_v2_v", "sdxl_base_v1-0"
FILES = {
    "sd1": (SD1, ("sd15_unet_278", "sd15_te_72")),
    "sd2": (SD2, ("sd15_unet_278", "sd2_te_138")),
    "sdxl": (SDXL, ("sdxl_unet_788", "sdxl_te1_72", "sdxl_te2_192")),
}


def names(family: str) -> list[str]:
    """kohya's, of every module of a full-size model with convolutions."""
    lists = [(GOLDEN / f"{name}.txt").read_text().splitlines() for name in FILES[family][1]]
    return [line.split()[0] for part in lists for line in part]


def kohya(path: Path, family: str, *, dtype=torch.float16, alpha: float | None = 6.0, rank=4, alpha_dtype=None) -> Path:
    """A file of random numbers with those names; its matrices are tiny."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, name in enumerate(names(family)):
        kernel = (3, 3) if name.endswith(("conv1", "in_layers_2")) else ()
        # One module of another rank and alpha.
        r = 2 * rank if number == 1 else rank
        tensors[f"{name}.lora_down.weight"] = torch.randn(r, 6, *kernel, generator=generator).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.randn(5, r, *[1] * len(kernel), generator=generator).to(dtype)
        if alpha is not None and number != 2:
            tensors[f"{name}.alpha"] = torch.tensor(alpha + number // 100, dtype=alpha_dtype or dtype)
    save_file(tensors, path, {"ss_base_model_version": FILES[family][0], "ss_tag_frequency": "{}", "format": "pt"})
    return path


def same(one: Path, other: Path) -> None:
    mine, theirs = load_file(one), load_file(other)
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert tensor.view(-1).view(torch.uint8).equal(theirs[name].view(-1).view(torch.uint8)), name


def deltas(path: Path) -> dict:
    factors = read_lora(path).factors
    return {n: f.alpha / f.rank * (f.up.double().flatten(1) @ f.down.double().flatten(1)) for n, f in factors.items()}


def agree(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("form", ["ldm", "diffusers", "peft"])
def test_there_and_back_gives_the_same_bytes(tmp_path, family, form):
    original = kohya(tmp_path / "a.safetensors", family)
    there = tmp_path / ("there" if form == "peft" else "there.safetensors")
    told = convert(original, there, form)
    assert len(told) == 1
    convert(there, tmp_path / "back.safetensors", "kohya")
    same(original, tmp_path / "back.safetensors")
    metadata = read_lora(tmp_path / "back.safetensors").metadata
    assert (metadata["ss_output_name"], metadata["ss_tag_frequency"]) == ("back", "{}")
    assert metadata["sshs_model_hash"] == model_hash((tmp_path / "back.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("dtype", "alpha", "alpha_dtype"),
    [
        (torch.float16, 3.0, torch.float32),
        (torch.bfloat16, 3.0, None),
        (torch.float16, None, None),
        (torch.float32, 8.0, torch.int64),
    ],
)
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_number_formats_and_alphas_come_back(tmp_path, dtype, alpha, alpha_dtype, form):
    original = kohya(tmp_path / "a.safetensors", "sd1", dtype=dtype, alpha=alpha, alpha_dtype=alpha_dtype)
    there = tmp_path / ("there" if form == "peft" else "there.safetensors")
    told = convert(original, there, form)
    if dtype != torch.float32:
        assert len(told) == 1
        convert(there, tmp_path / "back.safetensors", "kohya")
        same(original, tmp_path / "back.safetensors")
    agree(deltas(there), deltas(original))


def test_what_cannot_be_undone_in_32_bits_is_said(tmp_path):
    original = kohya(tmp_path / "a.safetensors", "sd1", dtype=torch.float32, alpha=3.0)
    told = convert(original, tmp_path / "there.safetensors", "diffusers")
    assert "come back with another last digit" in told[1]
    convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "kohya")
    mine, theirs = load_file(original), load_file(tmp_path / "back.safetensors")
    differing = sum(int((tensor != theirs[name]).sum()) for name, tensor in mine.items())
    assert told[1].startswith(f"{differing} numbers")
    torch.testing.assert_close(mine, theirs, rtol=2e-7, atol=0)


def test_a_file_of_diffusers_comes_back_too(tmp_path):
    """One whose header says the alphas, as its trainers write it, and one without any."""
    convert(kohya(tmp_path / "a.safetensors", "sdxl"), tmp_path / "made.safetensors", "diffusers")
    tensors = load_file(tmp_path / "made.safetensors")
    config = {f"{part}.lora_alpha": 3 for part in ("unet", "text_encoder", "text_encoder_2")}
    for name, said in {"plain": {}, "said": {"lora_adapter_metadata": json.dumps(config)}}.items():
        source = tmp_path / f"{name}.safetensors"
        save_file(tensors, source, {"ss_base_model_version": SDXL, **said})
        convert(source, tmp_path / f"{name}-kohya.safetensors", "kohya")
        convert(tmp_path / f"{name}-kohya.safetensors", tmp_path / f"{name}-back.safetensors", "diffusers")
        same(source, tmp_path / f"{name}-back.safetensors")
        found = read_lora(tmp_path / f"{name}-kohya.safetensors")
        assert set(found.factors) == set(names("sdxl"))
        assert {f.alpha / f.rank for f in found.factors.values()} >= ({3 / 4} if said else {1})


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_names_are_those_of_the_models_themselves(tmp_path, family):
    """Full-size: diffusers' modules, and the checkpoint's own tensors for LDM's."""
    original = kohya(tmp_path / "a.safetensors", family)
    config = UNETS["sd15" if family == "sd1" else family]
    with torch.device("meta"):
        modules = dict(UNet2DConditionModel(**config).named_modules())
    convert(original, tmp_path / "d.safetensors", "diffusers")
    found = {key.removesuffix(".lora_A.weight") for key in load_file(tmp_path / "d.safetensors") if "lora_A" in key}
    unet = {name.removeprefix("unet.") for name in found if name.startswith("unet.")}
    assert len(unet) == {"sd1": 278, "sdxl": 788}[family]
    assert unet <= modules.keys()
    convert(original, tmp_path / "ldm.safetensors", "ldm")
    known = {name.removeprefix(LDM_PREFIX).rpartition(".")[0].replace(".", "_") for name in unet_state(config)}
    ldm = {key.split(".")[0] for key in load_file(tmp_path / "ldm.safetensors") if key.startswith("lora_unet_")}
    assert len(ldm) == len(unet)
    assert {name.removeprefix("lora_unet_") for name in ldm} <= known


@pytest.fixture
def trained(settings, tmp_path, capsys) -> Path:
    """A real file of both networks, with convolutions."""
    changes = {"learning_rate": 0.02, "train_text_encoder": True, "target_modules": "[default, conv]", "lora_alpha": 3}
    assert main(["train", *(f"{k}={v}" for k, v in {**settings, "epochs": 1, **changes}.items()), "--json"]) == 0
    return Path(json.loads(capsys.readouterr().out)["output"][0])


def test_peft_itself_loads_it(settings, trained, tmp_path):
    base = Path(settings["base_model"])
    assert main(["convert", str(trained), str(tmp_path / "peft"), "--to", "peft"]) == 0
    mine, theirs = open_model(base, CPU), open_model(base, CPU)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    context = mine.text.embed("a cat").detach()
    with torch.no_grad():
        plain = mine.unet(x, t, context).sample
        apply_lora(mine, trained)
        expected = mine.unet(x, t, context).sample
        loaded = PeftModel.from_pretrained(theirs.unet, tmp_path / "peft" / "unet")
        found = loaded.base_model.model(x, t, context).sample
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    modules = {key for key in load_file(tmp_path / "peft" / "unet" / "adapter_model.safetensors") if "lora_A" in key}
    assert len([m for m in loaded.modules() if hasattr(m, "lora_A")]) == len(modules)
    # And the trainer itself, with both networks.
    apply_lora(other := open_model(base, CPU), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(other.text.embed("a cat"), mine.text.embed("a cat"))
        torch.testing.assert_close(other.unet(x, t, context).sample, expected)


def test_every_form_of_a_real_file_is_the_same_lora(settings, tmp_path):
    """An SD1 file by LDM's names, which some trainers write, is known by its sizes."""
    original = kohya(tmp_path / "a.safetensors", "sd1")
    for form in ("ldm", "diffusers"):
        convert(original, tmp_path / f"{form}.safetensors", form)
    assert read_header(tmp_path / "ldm.safetensors")["__metadata__"]["ss_base_model_version"] == SD1
    agree(deltas(tmp_path / "diffusers.safetensors"), deltas(original))


def test_what_is_refused(tmp_path):
    original = kohya(tmp_path / "a.safetensors", "sd1")
    with pytest.raises(OutputError, match="exists already"):
        convert(original, original, "ldm")
    with pytest.raises(OutputError, match="ends in .safetensors"):
        convert(original, tmp_path / "b.ckpt", "ldm")
    with pytest.raises(OutputError, match="name of a new folder"):
        convert(original, tmp_path / "b.safetensors", "peft")
    convert(original, tmp_path / "peft", "peft")
    with pytest.raises(OutputError, match="name of a new folder"):
        convert(original, tmp_path / "peft", "peft")
    tensors = load_file(original)
    save_file(tensors, tmp_path / "silent.safetensors")
    with pytest.raises(ModelError, match="add --family, one of sd1, sd2, sdxl"):
        convert(tmp_path / "silent.safetensors", tmp_path / "b.safetensors", "ldm")
    convert(tmp_path / "silent.safetensors", tmp_path / "b.safetensors", "ldm", family="sd1")
    for key in ("lora_unet_strange", "lora_unet_down_blocks_7_attentions_9", "lora_unet_down__blocks_0"):
        strange = {f"{key}.lora_down.weight": torch.ones(2, 3), f"{key}.lora_up.weight": torch.ones(3, 2)}
        save_file(strange, tmp_path / "strange.safetensors", {"ss_base_model_version": SD1})
        with pytest.raises(ModelError, match=key):
            convert(tmp_path / "strange.safetensors", tmp_path / "c.safetensors", "ldm")
    pair = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(3, 2)}
    twice = {
        f"{te}_text_model_encoder_layers_0_mlp_fc1.{n}": t.clone()
        for te in ("lora_te", "lora_te1")
        for n, t in pair.items()
    }
    save_file(twice, tmp_path / "twice.safetensors", {"ss_base_model_version": SD1})
    with pytest.raises(ModelError, match="two of its names mean one module: lora_te_text"):
        convert(tmp_path / "twice.safetensors", tmp_path / "c.safetensors", "diffusers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="a folder without adapter_model"):
        convert(tmp_path / "empty", tmp_path / "c.safetensors", "ldm")
    assert not (tmp_path / "c.safetensors").exists()


def test_damage_on_the_way_is_named(tmp_path):
    convert(kohya(tmp_path / "a.safetensors", "sd1"), tmp_path / "d.safetensors", "diffusers")
    tensors = load_file(tmp_path / "d.safetensors")
    for text in ("{", "[]", '{"dtype": "F16", "alphas": {}}', '{"dtype": "X", "alphas": {"*": [1, null, null]}}'):
        save_file(tensors, tmp_path / "d2.safetensors", {"ss_base_model_version": SD1, "lora_trainer_alphas": text})
        with pytest.raises(ModelError, match="lora_trainer_alphas is damaged"):
            convert(tmp_path / "d2.safetensors", tmp_path / "e.safetensors", "kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft")
    (tmp_path / "peft" / "unet" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(ModelError, match="expected peft_type LORA"):
        convert(tmp_path / "peft", tmp_path / "e.safetensors", "kohya")
