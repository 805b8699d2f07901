"""Clip skip and single captions, against transformers' own numbers."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.errors import ConfigError
from lora_trainer.hosts.standalone import FileModels
from lora_trainer.models.latents import encode


def model_of(checkpoint, clip_skip=None):
    with FileModels(checkpoint, torch.device("cpu"), torch.float32, clip_skip).borrow() as model:
        return model


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(checkpoint):
    text = model_of(checkpoint).text
    skipped = model_of(checkpoint, clip_skip=2).text
    inner = getattr(text.module, "text_model", text.module)
    with torch.no_grad():
        layers = text.module(input_ids=text.tokenize("a cat"), output_hidden_states=True).hidden_states
        assert torch.equal(text.embed("a cat"), inner.final_layer_norm(layers[-1]))
        assert torch.equal(skipped.embed("a cat"), inner.final_layer_norm(layers[-2]))
    assert not torch.allclose(text.embed("a cat"), skipped.embed("a cat"))


def test_one_caption_is_embedded_alone_and_frozen(checkpoint):
    text = model_of(checkpoint).text
    embedded = text.embed("cat " * 100)
    assert embedded.shape[:2] == (1, 154)
    assert not embedded.requires_grad


def test_a_half_vae_that_overflows_is_asked_again_in_float32(checkpoint):
    vae = model_of(checkpoint).vae
    pixels, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        # Weights that half precision holds, whose products it does not.
        vae.encoder.mid_block.resnets[0].norm2.weight.mul_(2.0**16)
        vae.encoder.mid_block.resnets[0].conv2.weight.mul_(2.0**5)
    expected = encode(vae, pixels, noise)
    half = vae.half()
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 1, 1).half(), torch.ones(1, 1, 1, 1).half())
    except RuntimeError:
        pytest.skip("this torch has no half-precision convolution on the CPU")
    assert not torch.isfinite(half.encode(pixels.half()).latent_dist.mean).all(), "the test's VAE should overflow"
    assert torch.allclose(encode(half, pixels, noise), expected, atol=0.05 * expected.abs().max())
    assert next(half.parameters()).dtype == torch.float16


def test_caption_syntax_of_the_webui_needs_it(checkpoint, tmp_path):
    from lora_trainer.config import build
    from lora_trainer.hosts.standalone import train

    config = build(
        {"base_model": str(checkpoint), "train_data_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
        | {"caption_syntax": "webui"}
    )
    with pytest.raises(ConfigError, match=r"caption_syntax.*literal"):
        train(config, lambda event: None)
