"""The bridge shares every tensor, and its names are diffusers' own."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.errors import ModelError
from lora_trainer.models.bridge import unet_config, unet_view, vae_config, vae_view
from lora_trainer.models.unet_names import LDM_PREFIX as UNET
from lora_trainer.models.unet_names import to_diffusers as unet_name
from lora_trainer.models.vae_names import LDM_PREFIX as VAE
from lora_trainer.models.vae_names import to_diffusers as vae_name
from tests.ldm import SD15_UNET, SD15_VAE, unet_state, vae_state


def shared(state, view, prefix, rename):
    """How many tensors have the address, shape and stride of the state dict's; a 1×1 convolution may be flat."""
    mine = view.state_dict()
    count = 0
    for name, tensor in state.items():
        other = mine[rename(name.removeprefix(prefix))]
        same = tensor.squeeze() if tensor.dim() != other.dim() else tensor
        count += (
            other.data_ptr() == tensor.data_ptr()
            and other.dtype == tensor.dtype
            and other.shape == same.shape
            and other.stride() == same.stride()
        )
    assert len(mine) == len(state)
    return count


def test_full_size_unet_shares_all_686_tensors():
    state = unet_state(SD15_UNET, torch.float16)
    view = unet_view(state, num_heads=8)
    assert shared(state, view, UNET, lambda name: unet_name(name, 2)) == len(state) == 686
    assert not any(parameter.requires_grad for parameter in view.parameters())


def test_full_size_vae_shares_all_248_tensors():
    state = vae_state(SD15_VAE, torch.float16)
    view = vae_view(state, scale_factor=0.18215)
    assert shared(state, view, VAE, lambda name: vae_name(name, 4)) == len(state) == 248


def test_unet_config_is_sd15s():
    part = {name.removeprefix(UNET): tensor for name, tensor in unet_state(SD15_UNET).items()}
    config = unet_config(part, num_heads=8)
    assert {key: config[key] for key in SD15_UNET} == SD15_UNET


def test_vae_config_is_sd15s():
    part = {name.removeprefix(VAE): tensor for name, tensor in vae_state(SD15_VAE).items()}
    config = vae_config(part, scale_factor=0.18215)
    assert {key: config[key] for key in SD15_VAE} == SD15_VAE


def test_names_agree_with_diffusers_own_converters():
    oracle = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = unet_state(SD15_UNET, torch.float16)
    theirs = oracle.convert_ldm_unet_checkpoint(
        dict(state), {**SD15_UNET, "class_embed_type": None, "addition_embed_type": None}
    )
    assert {unet_name(n.removeprefix(UNET), 2): t.data_ptr() for n, t in state.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items()
    }
    state = vae_state(SD15_VAE, torch.float16)
    theirs = oracle.convert_ldm_vae_checkpoint(dict(state), {**SD15_VAE})
    assert {vae_name(n.removeprefix(VAE), 4): t.data_ptr() for n, t in state.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items()
    }


def test_a_tensor_too_many_or_too_few_is_named():
    state = unet_state(SD15_UNET, torch.float16)
    missing = {name: tensor for name, tensor in state.items() if name != UNET + "middle_block.1.norm.weight"}
    with pytest.raises(ModelError, match=r"lacks 1 of 686.*mid_block\.attentions\.0\.norm\.weight"):
        unet_view(missing, num_heads=8)
    extra = {**state, UNET + "input_blocks.1.0.in_layers.9.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"input_blocks\.1\.0\.in_layers\.9\.weight"):
        unet_view(extra, num_heads=8)
