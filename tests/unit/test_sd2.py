"""Stable Diffusion 2.x from a file: its text encoder, what it predicts, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.ldm import open_clip_state, unet_state
from lora_trainer import sampling
from lora_trainer.adapters.naming import TEXT_PREFIX
from lora_trainer.adapters.targets import select_text
from lora_trainer.events import Notice
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.families import SD2, SD2_V
from lora_trainer.models.single_file import place
from lora_trainer.models.text import END, ClipEncoder, bundled
from lora_trainer.sampling import Recipe
from lora_trainer.training.precision import Precision
from tests.golden.test_golden_keys import described, golden, shapes_of
from tests.ldm import vae_state
from tests.tiny import UNET, VAE, WIDTH
from tests.unit.test_run import of, train
from tests.unit.test_sdxl import open_clip_reference

CPU = torch.device("cpu")
TEXT = "cond_stage_model.model."
OUT = "model.diffusion_model.out.2.bias"
YAML = "model: {params: {parameterization: %s, unet_config: {params: {num_head_channels: 64}}}}"


def checkpoint(folder: Path, bias: float = 0.0, yaml: str | None = None) -> Path:
    """A tiny one whose UNet's answers are around `bias`."""
    generator = torch.Generator().manual_seed(0)

    def fill(shape, dtype=torch.float32):
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) / fan**0.5).to(dtype)

    unet = unet_state({**UNET, "attention_head_dim": (1, 1), "use_linear_projection": True})
    shapes = unet | open_clip_state(TEXT, width=WIDTH, layers=3)
    state = vae_state(VAE, torch.float32, fill) | {name: fill(shape) for name, shape in shapes.items()}
    state[OUT] += bias
    save_file(state, folder / "tiny2.safetensors")
    if yaml:
        (folder / "tiny2.yaml").write_text(YAML % yaml, encoding="utf-8")
    return folder / "tiny2.safetensors"


@pytest.mark.parametrize("caption", ["", "a cat", "a cat, sitting " * 30])
def test_the_context_is_the_layer_before_the_last_normed(tmp_path, caption):
    path = checkpoint(tmp_path)
    _, state = place(path, CPU, torch.float32)
    ids = bundled()(caption)
    zeros = ids.clone()
    for row in zeros:
        row[row.tolist().index(END) + 1 :] = 0
    hidden, _ = open_clip_reference(state, TEXT, zeros)
    norm = state[TEXT + "ln_final.weight"], state[TEXT + "ln_final.bias"]
    expected = F.layer_norm(hidden, (WIDTH,), *norm).reshape(1, -1, WIDTH)
    said = open_model(path, CPU).text.read(caption)
    torch.testing.assert_close(said.context, expected, rtol=1e-4, atol=1e-5)
    assert said.pooled is None


@pytest.mark.parametrize(
    ("yaml", "bias", "family"), [("eps", -9, SD2), ("v", 9, SD2_V), (None, 9, SD2), (None, -9, SD2_V)]
)
def test_what_it_predicts_is_in_the_yaml_or_else_tested(tmp_path, yaml, bias, family):
    model = open_model(checkpoint(tmp_path, bias, yaml), CPU)
    assert model.facts.family is family
    assert (model.noise.prediction, model.facts.family.resolution) == (family.prediction, family.resolution)
    assert [f"that is {'v' if family is SD2_V else 'noise'}" in told for told in model.facts.notices] == (
        [] if yaml else [True]
    )


def test_a_run_writes_files_that_are_taken_for_sd2s(settings, tmp_path):
    path = checkpoint(tmp_path, -9)
    settings = {**settings, "base_model": str(path), "resolution": 64, "epochs": 1, "learning_rate": 0.02}
    events, data = train(settings, train_text_encoder=True, save_precision="fp32")
    assert [notice for notice in of(events, Notice) if "by a test of its UNet" in notice.text]
    names = {name.split(".")[0] for name in load(data)}
    assert {
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        f"{TEXT_PREFIX}_text_model_encoder_layers_1_mlp_fc2",
    } <= names
    assert sum(name.startswith(TEXT_PREFIX) for name in names) == 2 * 6
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert (header["ss_v2"], header["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert header["modelspec.prediction_type"] == "v"
    model, recipe = open_model(path, CPU), Recipe((64, 64), steps=2)
    plain = sampling.denoise(model, "a cat", recipe, Precision(CPU, torch.float32))
    sampling.apply_lora(model, Path(settings["output_dir"]) / "tiny.safetensors")
    assert not torch.allclose(plain, sampling.denoise(model, "a cat", recipe, Precision(CPU, torch.float32)), atol=1e-3)


def test_text_encoder_names_are_kohyas():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        encoder = ClipEncoder(CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes)), 2)
    names = select_text(encoder.inner, encoder.layers)
    linear = {name: shapes_of(encoder.inner.get_submodule(name)) for name in names}
    assert described(TEXT_PREFIX, linear) == golden("sd2_te_138.txt")
