"""SSD-1B, Segmind Vega and SDXL's refiner from a file: shared tensors, conditioning, training, files, the tools."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTokenizer

from benchmarks.ldm import unet_state
from benchmarks.models import UNETS
from lora_trainer import sampling
from lora_trainer.adapters.forms import BY_NAME, family_of
from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.naming import Factors, from_native, native_name
from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Notice, Started, StepDone
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.bridge import unet_config, unet_view
from lora_trainer.models.families import REFINER, SDXL
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.text import END, TOKENIZER_FOLDER, bundled
from lora_trainer.models.unet_names import LDM_PREFIX, to_diffusers, to_ldm
from lora_trainer.sampling import Recipe as Drawn
from lora_trainer.tools.convert import convert
from lora_trainer.tools.extract import Recipe, extract
from lora_trainer.tools.merge import Weighted, merge
from lora_trainer.tools.merge_into import merge_into
from lora_trainer.tools.resize import resize
from lora_trainer.training.chosen import learning_rate_of
from lora_trainer.training.feed import Feed
from lora_trainer.training.precision import Precision
from lora_trainer.training.validation import Validator
from tests.tiny_sdxl import REFINERS, RELATIVES, tiny_relative_state
from tests.unit.test_bridge import shared
from tests.unit.test_run import of, train
from tests.unit.test_sdxl import header, open_clip_reference

CPU = torch.device("cpu")
LONG = "a cat, sitting " * 30
DRAWN = Drawn((64, 64), steps=2, guidance=5.0)
PLAIN = Precision(CPU, torch.float32)
TEXT = "0_model_transformer_resblocks_"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("relatives")
    for name in RELATIVES:
        save_file(tiny_relative_state(name), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in RELATIVES}


@pytest.fixture(params=RELATIVES)
def relative(request, settings, bases) -> dict:
    return {**settings, "base_model": str(bases[request.param]), "resolution": 64, "epochs": 1}


@pytest.fixture
def refiner(settings, bases) -> dict:
    return {**settings, "base_model": str(bases["refiner"]), "resolution": 64, "epochs": 1}


# --- the views


@pytest.mark.parametrize(("name", "count"), [("ssd", 944), ("vega", 564), ("refiner", 1220)])
def test_full_size_unets_share_all_tensors(name, count):
    config = UNETS[name]
    state = {key: torch.empty(shape, dtype=torch.float16) for key, shape in unet_state(config).items()}
    view = unet_view(state, head_channels=64)
    assert shared(state, view, LDM_PREFIX, lambda key: to_diffusers(key, 2)) == len(state) == count
    part = {key.removeprefix(LDM_PREFIX): tensor for key, tensor in state.items()}
    mine = unet_config(part, head_channels=64)
    assert {key: mine[key] for key in config} == config
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]
    assert list(BY_NAME["sdxl-refiner" if name == "refiner" else "sdxl"].attends) == attends
    for key in part:
        module, _, kind = key.rpartition(".")
        assert to_ldm(to_diffusers(key, 2).removesuffix("." + kind), 2, attends) == module


def test_every_parameter_is_the_files_own(relative):
    path = Path(relative["base_model"])
    family, state = place(path, CPU, torch.float32)
    model = model_of(state, family, path, device=CPU, hashes=lambda: None)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    used = {
        p.untyped_storage().data_ptr() for m in (model.unet, model.vae, *model.text.modules) for p in m.parameters()
    }
    left = storages - used
    assert used <= storages
    assert {key.rpartition(".")[2] for key, t in state.items() if t.untyped_storage().data_ptr() in left} == {
        "logit_scale"
    }


# --- conditioning


@pytest.mark.parametrize("caption", ["", "a cat", LONG])
def test_the_refiner_hears_its_one_encoder(bases, caption):
    _, state = place(bases["refiner"], CPU, torch.float32)
    model = open_model(bases["refiner"], CPU)
    said = model.text.read(caption)
    ids = bundled()(caption)
    for row in ids:
        row[row.tolist().index(END) + 1 :] = 0
    hidden, pooled = open_clip_reference(state, REFINERS, ids)
    torch.testing.assert_close(said.context, hidden.reshape(1, -1, hidden.shape[-1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.pooled, pooled[:1], rtol=1e-4, atol=1e-5)
    assert list(model.text.networks) == ["text_encoder_2"]


def test_the_refiner_is_told_a_score_in_place_of_the_target_size(refiner):
    model = open_model(Path(refiner["base_model"]), CPU)
    told = sampling.conditions(model, ["ugly", "a cat"], (96, 64), negatives=1)
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 2.5], [64, 96, 0, 0, 6]]
    feed, held_out = prepared(build(refiner, {"crop": "random", "flip": True}), model)
    (batch, *_) = feed.batches(next(feed.updates(0)))
    assert batch.sizes.dtype == torch.float32
    assert batch.sizes.shape == (len(batch.t), 5)
    assert (batch.sizes[:, 4] == 6).all()
    assert batch.t.max() < 200
    assert {t for one in held_out.batches(model.noise.trained) for t in one.t.tolist()} == set(range(12, 200, 25))
    sizes = torch.tensor([[768, 1024, 3, 4, 512, 640]])
    assert REFINER.told(sizes).tolist() == [[768, 1024, 3, 4, 6]]
    assert SDXL.told(sizes, negative=True).tolist() == sizes.tolist()


def prepared(config, model) -> tuple[Feed, Validator]:
    from lora_trainer.training import data

    made = data.load(data.find(config, lambda event: None), config, model, sink=lambda event: None)
    return Feed.of(config, made.train, model), Validator(made.train.samples)


def test_the_score_is_heard(bases):
    model = open_model(bases["refiner"], CPU)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100])
    with torch.no_grad():
        alike, other = (
            model.unet(x, t, **sampling.conditions(model, ["a cat"] * 2, (64, 64), negatives=n)).sample for n in (0, 1)
        )
    assert (alike[0] - other[0]).abs().max() > 1e-4
    assert torch.equal(alike[1], other[1])


# --- runs


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders too"])
def test_a_run_writes_what_draws_the_trainers_own_picture(relative, text, monkeypatch):
    latents, decode = [], sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda vae, x: latents.append(x) or decode(vae, x))
    path = Path(relative["base_model"])
    changes = {"sample_prompts": [LONG], "sample_steps": 2, "learning_rate": 0.02, "train_text_encoder": text}
    events, data = train(
        relative, **changes, save_precision="fp32", output_format="both", target_modules=["default", "conv"]
    )
    drawn, *_ = latents
    names = {name.split(".")[0] for name in load(data)}
    assert of(events, Started)[0].modules == len(names)
    assert all(tensor.any() for name, tensor in load(data).items() if "lora_up" in name)
    assert not any("_blocks_0_attentions" in name or "resnets" in name for name in names)
    alone = path.stem == "refiner"
    counts = [sum(name.startswith(prefix) for name in names) for prefix in ("lora_te1_", "lora_te2_", TEXT)]
    assert counts == ([0, 0, 0] if not text else [0, 0, 3 * 6] if alone else [2 * 6, 3 * 6, 0])
    assert ("lora_unet_middle_block_1_proj_in" in names) == alone
    files = [Path(relative["output_dir"]) / name for name in ("tiny.safetensors", "pytorch_lora_weights.safetensors")]
    for file in files:
        model = open_model(path, CPU)
        plain = sampling.denoise(model, LONG, DRAWN, PLAIN)
        sampling.apply_lora(model, file)
        again = sampling.denoise(model, LONG, DRAWN, PLAIN)
        torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-4)
        assert (plain - drawn).abs().max() > 1e-2
    if alone and text:
        assert {key.partition(".")[0] for key in load_file(files[1])} == {"unet", "text_encoder_2"}
    said = header(data)
    kind = ("sdxl_refiner_v1-0", "refiner") if alone else ("sdxl_base_v1-0", "base")
    assert said["ss_base_model_version"] == kind[0]
    assert said["modelspec.architecture"] == f"stable-diffusion-xl-v1-{kind[1]}/lora"
    assert said["modelspec.implementation"].endswith("generative-models")
    assert said["modelspec.timestep_range"] == ("0,200" if alone else "0,1000")
    assert said["ss_v2"] == "False"
    assert f"xl-v1-{kind[1]}" in describe(files[0]).family


def test_the_command_line_trains_and_draws(relative, tmp_path, capsys):
    settings = [f"{key}={value}" for key, value in relative.items()]
    assert main(["train", *settings, "train_text_encoder=true", "learning_rate=0.02", "--json"]) == 0
    lora = json.loads(capsys.readouterr().out)["output"][0]
    out, prompt = tmp_path / "drawn", ["--prompt", "a cat", "--steps", "2", "--size", "64"]
    assert main(["sample", "--base", relative["base_model"], "--lora", lora, "--out", str(out), *prompt]) == 0
    assert (out / "001-base.png").read_bytes() != (out / "001-lora.png").read_bytes()


def test_the_log_says_what_a_refiner_learns(refiner):
    events, _ = train(refiner, learning_rate=0.01)
    (told,) = (notice.text for notice in of(events, Notice) if "SDXL refiner" in notice.text)
    assert "200 least noisy timesteps" in told
    assert told.endswith("aesthetic score 6")
    assert all(math.isfinite(step.loss) for step in of(events, StepDone))


def test_timesteps_beyond_its_own_must_be_asked_for(refiner):
    with pytest.raises(ConfigError, match="min_timestep: expected less than 200, .* found 300"):
        train(refiner, learning_rate=0.01, min_timestep=300)
    _, data = train(refiner, learning_rate=0.01, min_timestep=300, max_timestep=400)
    assert header(data)["modelspec.timestep_range"] == "300,400"


def test_a_refiners_text_encoder_has_the_rate_of_text_encoders(refiner):
    config = build(refiner, {"train_text_encoder": True, "text_encoder_lr": 0.25})
    (network,) = open_model(Path(refiner["base_model"]), CPU).text.networks
    assert learning_rate_of(config, network) == 0.25


def test_a_run_goes_on_from_its_file(relative, tmp_path):
    _, data = train(relative, learning_rate=0.02, train_text_encoder=True)
    first = tmp_path / "first.safetensors"
    first.write_bytes(data)
    changes = {"learning_rate": 1e-9, "train_text_encoder": True, "initial_lora": str(first), "save_precision": "fp32"}
    _, again = train(relative, **changes, overwrite=True)
    before, after = load(data), load(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name].float(), tensor.float(), rtol=0, atol=1e-3)


# --- names and tools


def test_names_of_a_lone_open_clip_go_both_ways():
    for kohya, native in {
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj.alpha": f"{TEXT}31_attn_q_proj.alpha",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": f"{TEXT}0_mlp_c_fc",
        "lora_te2_text_model_encoder_layers_7_mlp_fc2.lora_up.weight": f"{TEXT}7_mlp_c_proj.lora_up.weight",
        "lora_te1_text_model_encoder_layers_7_mlp_fc2": "lora_te1_text_model_encoder_layers_7_mlp_fc2",
    }.items():
        assert native_name(kohya) == native
        assert from_native(native) == kohya


@pytest.fixture
def made(refiner, tmp_path) -> Path:
    """A refiner's LoRA, on the text encoder too."""
    _, data = train(refiner, learning_rate=0.02, train_text_encoder=True, lora_rank=4, save_precision="fp32")
    path = tmp_path / "made.safetensors"
    path.write_bytes(data)
    return path


def test_the_tools_keep_a_refiners_names(made, bases, tmp_path):
    names = {key.partition(".")[0] for key in load_file(made)}
    assert sum(name.startswith(TEXT) for name in names) == 3 * 6
    lora = read_lora(made)
    assert family_of(lora) is REFINER
    wide = Factors(torch.empty(4, 1280), torch.empty(768, 4), 4.0)
    factors = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": wide, "lora_te2_text_model_x": wide}
    assert family_of(replace(lora, metadata={}, factors=factors)) is REFINER
    paths = {tool: tmp_path / f"{tool}.safetensors" for tool in ("smaller", "merged", "diffusers", "back")}
    resize(made, paths["smaller"], rule(2))
    merge([Weighted(made, 0.5), Weighted(made, 0.5)], paths["merged"])
    convert(made, paths["diffusers"], "diffusers")
    convert(paths["diffusers"], paths["back"], "kohya")
    for tool in ("smaller", "merged", "back"):
        assert {key.partition(".")[0] for key in load_file(paths[tool])} == names
        assert read_metadata(paths[tool])["ss_base_model_version"] == REFINER.base_version
    drawn = [
        drawn_with(bases["refiner"], path) for path in (made, *(paths[n] for n in ("merged", "diffusers", "back")))
    ]
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-4, atol=1e-4)


def test_a_refiners_lora_goes_into_its_checkpoint(made, bases, tmp_path):
    whole = tmp_path / "whole.safetensors"
    merge_into(bases["refiner"], [Weighted(made, 1.0)], whole)
    found = sampling.denoise(open_model(whole, CPU), LONG, DRAWN, PLAIN)
    drawn = drawn_with(bases["refiner"], made)
    torch.testing.assert_close(found, drawn, rtol=1e-3, atol=1e-3)
    back = tmp_path / "back.safetensors"
    extract(bases["refiner"], whole, back, Recipe(4, precision="fp32"), sink=lambda event: None)
    assert {key.partition(".")[0] for key in load_file(back)} == {key.partition(".")[0] for key in load_file(made)}
    torch.testing.assert_close(drawn_with(bases["refiner"], back), drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="these diffusers and transformers have no PEFT backend")
def test_diffusers_pipeline_of_the_refiner_takes_its_file(made, bases, tmp_path, caplog):
    theirs, file = open_model(bases["refiner"], CPU), tmp_path / "diffusers.safetensors"
    convert(made, file, "diffusers")
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=theirs.vae,
        text_encoder=None,
        text_encoder_2=theirs.text.module,
        tokenizer=None,
        tokenizer_2=CLIPTokenizer.from_pretrained(str(TOKENIZER_FOLDER)),
        unet=theirs.unet,
        scheduler=DDIMScheduler.from_config(sampling.scheduler(theirs.noise).config),
        requires_aesthetics_score=True,
    )
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    assert not any("unexpected keys" in record.message for record in caplog.records)
    with_lora = [len([m for m in net.modules() if hasattr(m, "lora_A")]) for net in (theirs.unet, theirs.text.module)]
    assert sum(with_lora) == len({key.partition(".")[0] for key in load_file(made)})
    assert with_lora[1] == 3 * 6
    drawn = sampling.denoise(theirs, LONG, DRAWN, PLAIN)
    torch.testing.assert_close(drawn, drawn_with(bases["refiner"], made), rtol=1e-4, atol=1e-4)


def test_a_refiners_lora_is_for_no_other_model(made, bases):
    with pytest.raises(ModelError, match="made for another base model"):
        sampling.apply_lora(open_model(bases["ssd"], CPU), made)


def rule(rank: int):
    from lora_trainer.adapters.svd import Rule

    return Rule(rank)


def drawn_with(base: Path, lora: Path) -> torch.Tensor:
    model = open_model(base, CPU)
    sampling.apply_lora(model, lora)
    return sampling.denoise(model, LONG, DRAWN, PLAIN)


def read_metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
