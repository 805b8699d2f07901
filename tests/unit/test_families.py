"""What a file is told to be by its tensors' names and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_trainer.errors import ModelError
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.checkpoint import read_shapes
from lora_trainer.models.detection import detect
from lora_trainer.models.families import REFINER, SD1, SDXL, SSD
from tests.tiny import tiny_state
from tests.tiny_sdxl import tiny_relative_state, tiny_sdxl_state

UNET = "model.diffusion_model."
CONV_IN = UNET + "input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def sd1() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_state().items()}


@pytest.fixture(scope="module")
def sdxl() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_sdxl_state().items()}


def refused(shapes) -> str:
    with pytest.raises(ModelError) as error:
        detect(shapes, "x.safetensors")
    (line,) = str(error.value).splitlines()
    assert line.startswith("x.safetensors: ")
    return line


# A tensor's name that gives it away, alone or beside others, and what is said of it.
NAMES = {
    f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 checkpoint",
    f"{UNET}double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a Flux checkpoint",
    "double_layers.0.attn.w1q.weight": "an AuraFlow checkpoint",
    "cap_embedder.1.weight": "Lumina or Z-Image",
    "txt_norm.weight": "a Qwen-Image checkpoint",
    "head.modulation": "a Wan checkpoint",
    "cond_stage_model.roberta.embeddings.word_embeddings.weight": "AltDiffusion",
    "edm_mean": "Playground",
    "edm_vpred.sigma_max": "CosXL",
    f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4": "quantised to 4 bits",
    f"{UNET}double_blocks.0.img_attn.qkv.weight.absmax": "quantised to 4 bits",
    "scaled_fp8": "scaled fp8",
    f"{UNET}out.2.scale_weight": "scaled fp8",
    "conv_in.weight": "a diffusers UNet",
}


@pytest.mark.parametrize("name", NAMES)
def test_other_kinds_are_named(sdxl, name):
    for beside in ({}, sdxl):
        assert NAMES[name] in refused(beside | {name: (1,)})


@pytest.mark.parametrize(("channels", "words"), [(8, "editing"), (5, "depth"), (6, "not known")])
def test_a_unet_that_is_shown_more_is_named(sd1, sdxl, channels, words):
    for shapes in (sd1, sdxl):
        assert words in refused(shapes | {CONV_IN: (32, channels, 3, 3)})


def test_a_unet_for_inpainting_is_its_family(sd1, sdxl):
    assert detect(sd1 | {CONV_IN: (32, 9, 3, 3)}, "x") is SD1
    assert detect(sdxl | {CONV_IN: (32, 9, 3, 3)}, "x") is SDXL


def test_what_was_cut_out_of_sdxl_is_told(sdxl):
    def without(*parts: str) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in sdxl.items() if not name.startswith(parts)}

    assert detect(without(f"{UNET}middle_block.1.", f"{UNET}middle_block.2."), "x") is SSD
    assert "KOALA" in refused(without(f"{UNET}middle_block."))


@pytest.mark.parametrize(("name", "family"), [("ssd", SSD), ("vega", SSD), ("refiner", REFINER)])
def test_sdxls_relatives_are_told_apart(name, family):
    shapes = {key: tuple(tensor.shape) for key, tensor in tiny_relative_state(name).items()}
    assert detect(shapes, "x") is family
    assert "of the EDM form" in refused(shapes | {"edm_mean": ()})
    assert "editing" in refused(shapes | {CONV_IN: (32, 8, 3, 3)})


def test_an_unknown_kind_is_told_by_what_it_lacks():
    assert "a UNet with text attention and a VAE and a CLIP text encoder not found in 1 tensors" in refused({"x": (1,)})


def test_families_are_told_apart(sd1, sdxl):
    assert detect(sd1, "x") is SD1
    assert detect(sdxl, "x") is SDXL


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_gguf_file_is_named_whatever_it_is_called(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="GGUF"):
        read_shapes(path)


def test_a_checkpoint_in_plain_fp8_is_read(tmp_path):
    state = tiny_state()
    unet = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items() if name.startswith(UNET)}
    save_file(state | unet, tmp_path / "fp8.safetensors")
    weight = next(iter(open_model(Path(tmp_path / "fp8.safetensors"), torch.device("cpu")).unet.parameters()))
    assert weight.dtype == torch.float32
    assert torch.equal(weight, unet[CONV_IN].float())
