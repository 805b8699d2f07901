"""Full-size Stable Diffusion 1.5, SDXL, its relatives and 3: our names and shapes are those that kohya's own code gives
(rank 8).

The lists were recorded from sd-scripts' networks/lora.py and lora_sd3.py over its own networks and transformers' CLIP.
It knows none of SDXL's relatives: theirs are of the modules that the WebUI loads (generative-models' UNet, cut as the
WebUI cuts it, and OpenCLIP), chosen by the same rules, which gave SDXL's two lists line by line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.models import MEDIUM, UNETS
from lora_trainer.adapters.inject import Size, inject
from lora_trainer.adapters.naming import TEXT_PREFIX, UNET_PREFIX, Factors, to_kohya
from lora_trainer.adapters.parts import parts
from lora_trainer.adapters.targets import select, select_text
from lora_trainer.models.families import REFINER, SD3
from lora_trainer.models.mmdit import MMDiT
from lora_trainer.models.text import ClipEncoder
from lora_trainer.models.unet_names import to_ldm
from tests.ldm import SD15_UNET

HERE = Path(__file__).parent
RANK = 8


def golden(name: str) -> set[str]:
    return set((HERE / name).read_text().splitlines())


def described(prefix: str, factors: dict[str, Factors], *, alphas: bool = True) -> set[str]:
    tensors = to_kohya(prefix, factors, alphas=alphas)
    names = {name.rsplit(".lora_down", 1)[0] for name in tensors if ".lora_down." in name}
    assert len(tensors) == (3 if alphas else 2) * len(names)
    assert not alphas or all(tensors[f"{name}.alpha"].item() == 16 for name in names)

    def shape(name: str) -> str:
        return str(list(tensors[name].shape)).replace(" ", "")

    return {f"{n} {shape(n + '.lora_down.weight')} {shape(n + '.lora_up.weight')}" for n in names}


def shapes_of(module: nn.Module) -> Factors:
    if isinstance(module, nn.Conv2d):
        down = torch.empty(RANK, module.in_channels, *module.kernel_size, device="meta")
        return Factors(down, torch.empty(module.out_channels, RANK, 1, 1, device="meta"), 16.0)
    down = torch.empty(RANK, module.in_features, device="meta")
    return Factors(down, torch.empty(module.out_features, RANK, device="meta"), 16.0)


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15_UNET)


@pytest.mark.parametrize(("sets", "count"), [(["default"], 192), (["default", "conv"], 278)])
def test_unet_names_are_kohyas(unet, sets, count):
    names = select(unet, sets)
    assert len(names) == count
    factors = {name: shapes_of(unet.get_submodule(name)) for name in names}
    assert described(UNET_PREFIX, factors) == golden(f"sd15_unet_{count}.txt")


def test_what_peft_injects_has_these_shapes(unet):
    """A convolution's factors come from PEFT's own layers."""
    with torch.device("meta"):
        small = UNet2DConditionModel(
            **{**SD15_UNET, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32}
        )
    small = small.to_empty(device="cpu").requires_grad_(False)
    names = select(small, ["default", "conv"])
    sizes = dict.fromkeys(names, Size(RANK, 16.0))
    adapter = inject(small, sizes, generator=lambda name: torch.Generator().manual_seed(0))
    modules = {name: layer.get_base_layer() for name, layer in adapter.layers.items()}
    assert described(UNET_PREFIX, adapter.factors()) == described(
        UNET_PREFIX, {name: shapes_of(module) for name, module in modules.items()}
    )


def test_text_encoder_names_are_kohyas():
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        text = CLIPTextModel(config)
    names = select_text(text, 12)
    assert len(names) == 72
    linear = {name: shapes_of(text.get_submodule(name)) for name in names}
    assert described(TEXT_PREFIX, linear) == golden("sd15_te_72.txt")
    assert len(select_text(text, 11)) == 66


@pytest.mark.parametrize(("sets", "count"), [(["default"], 722), (["default", "conv"], 788)])
def test_sdxls_unet_has_ldm_names(sets, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sdxl"])
    attends = ["CrossAttn" in kind for kind in UNETS["sdxl"]["up_block_types"]]
    factors = {to_ldm(name, 2, attends): shapes_of(unet.get_submodule(name)) for name in select(unet, sets)}
    assert described(UNET_PREFIX, factors) == golden(f"sdxl_unet_{count}.txt")


@pytest.mark.parametrize(
    ("name", "attention", "all_of_them"), [("ssd", 360, 423), ("vega", 170, 233), ("refiner", 462, 548)]
)
def test_its_relatives_unets_have_ldm_names(name, attention, all_of_them):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    attends = ["CrossAttn" in kind for kind in UNETS[name]["up_block_types"]]
    modules = {to_ldm(m, 2, attends): shapes_of(unet.get_submodule(m)) for m in select(unet, ["default", "conv"])}
    assert described(UNET_PREFIX, modules) == golden(f"{name}_unet_{all_of_them}.txt")
    assert len(select(unet, ["default"])) == attention


def test_a_refiners_text_encoder_has_the_webuis_names():
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    config = CLIPTextConfig(vocab_size=49408, projection_dim=1280, **sizes)
    (text,) = REFINER.text
    with torch.device("meta"):
        module = CLIPTextModelWithProjection(config)
        unet = UNet2DConditionModel(**UNETS["refiner"])
    part = parts(REFINER, unet, {text.network: module})[text.network]
    encoder = ClipEncoder(module, text.layer, text.normed, text.pad, text.pooled, text.network)
    names = select_text(encoder.inner, encoder.layers)
    tensors = part.to_kohya({name: shapes_of(encoder.inner.get_submodule(name)) for name in names})
    modules = {name.partition(".")[0] for name in tensors}

    def shape(name: str) -> str:
        return str(list(tensors[name].shape)).replace(" ", "")

    found = {f"{n} {shape(n + '.lora_down.weight')} {shape(n + '.lora_up.weight')}" for n in modules}
    assert found == golden("refiner_te_192.txt")
    assert len(tensors) == 3 * 192


def test_sdxls_text_encoders_have_kohyas_names_where_they_are_heard():
    """kohya puts LoRAs on the last layer of the first encoder too, which nothing ever hears."""
    sizes = {"vocab_size": 49408, "projection_dim": 1280}
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device("meta"):
        encoders = (
            ClipEncoder(CLIPTextModel(CLIPTextConfig(**sizes, **first)), 2, False),
            ClipEncoder(CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **second)), 2, False, 0, True),
        )
    found = []
    for number, encoder in enumerate(encoders, start=1):
        names = select_text(encoder.inner, encoder.layers)
        linear = {name: shapes_of(encoder.inner.get_submodule(name)) for name in names}
        found.append(described(f"lora_te{number}", linear))
    unheard = {line for line in golden("sdxl_te1_72.txt") if "_layers_11_" in line}
    assert found == [golden("sdxl_te1_72.txt") - unheard, golden("sdxl_te2_192.txt")]
    assert (len(unheard), len(found[1])) == (6, 192)


def test_sd3s_transformer_has_the_names_of_its_checkpoint_and_no_alphas():
    with torch.device("meta"):
        network = MMDiT(MEDIUM)
    factors = {name: shapes_of(network.get_submodule(name)) for name in select(network, ["default"])}
    assert len(factors) == 237
    assert described(UNET_PREFIX, factors, alphas=SD3.alphas) == golden("sd3_mmdit_237.txt")
