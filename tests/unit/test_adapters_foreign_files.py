"""LoRA files in forms that we do not write: each is read, or refused in one true line."""

from __future__ import annotations

import json

import pytest
import torch

from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.writer import serialize
from lora_trainer.errors import ModelError
from lora_trainer.models.checkpoint import read_shapes
from lora_trainer.models.detection import detect

DOWN, UP = torch.ones(4, 6), torch.ones(5, 4)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.safetensors"


def put(target, tensors, metadata=None):
    target.write_bytes(serialize(tensors, metadata or {}))
    return target


def pair(name, down=DOWN, up=UP):
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def refused(path):
    """The one line that refuses it."""
    with pytest.raises(ModelError) as caught:
        describe(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_kohyas_names_with_pefts_parts(target):
    lora = read_lora(put(target, {**pair("lora_unet_x"), "lora_unet_x.alpha": torch.tensor(2.0)}))
    assert torch.equal(lora.factors["lora_unet_x"].up, UP)
    assert lora.factors["lora_unet_x"].alpha == 2.0


def test_diffusers_file_with_two_text_encoders(target):
    first, second = "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.layers.0.mlp.fc1"
    config = {"text_encoder.lora_alpha": 8, "text_encoder_2.lora_alpha": 16}
    lora = read_lora(put(target, {**pair(first), **pair(second)}, {"lora_adapter_metadata": json.dumps(config)}))
    assert {name: f.alpha for name, f in lora.factors.items()} == {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 8,
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": 16,
    }


@pytest.mark.parametrize("name", ["base_model.model.x", "transformer.x", "diffusion_model.x"])
def test_a_lora_in_an_unknown_form_is_not_called_a_checkpoint(target, name):
    message = refused(put(target, pair(name)))
    assert "a LoRA whose names are not known here" in message
    assert f"'{name}.lora_A.weight'" in message


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '"x"', '{"unet.lora_alpha": "8"}', '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {"x": {}}}'],
)
def test_a_peft_config_that_makes_no_sense_is_named(target, text):
    assert "lora_adapter_metadata" in refused(put(target, pair("unet.x"), {"lora_adapter_metadata": text}))


def test_scalars_and_wide_kernels_are_refused_by_their_shapes(target):
    config = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.use_rslora": True})}
    assert "has shapes [] and [5, 4]" in refused(put(target, pair("unet.x", down=torch.tensor(1.0)), config))
    assert "and [5, 4, 1, 2]" in refused(put(target, pair("unet.x", up=torch.ones(5, 4, 1, 2))))


def test_a_name_with_a_line_break_stays_on_one_line(target):
    assert r"a\nb" in refused(put(target, {**pair("unet.x"), "a\nb": DOWN}))


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "SDXL"), (96, "unnamed")],
)
def test_a_file_that_names_no_base_model_tells_it_by_its_sizes(target, width, family):
    sizes = pair("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", down=torch.ones(4, width))
    assert family in describe(put(target, sizes)).family
    named = put(target, sizes, {"modelspec.architecture": "said/lora"})
    assert describe(named).family == "said/lora"


@pytest.mark.parametrize("header", [b"[1]", b'"x"', b"[" * 100_000])
def test_a_header_that_is_not_an_object_is_refused(target, header):
    target.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not a .safetensors file" in refused(target)


def test_an_alpha_that_no_float_can_hold_is_refused(target):
    text = '{"unet.use_rslora": true, "unet.lora_alpha": 1' + "0" * 400 + "}"
    assert "expected a number as alpha of x" in refused(put(target, pair("unet.x"), {"lora_adapter_metadata": text}))


def test_norms_beyond_any_float_are_named_not_raised(target):
    report = describe(put(target, pair("unet.x", down=torch.full((4, 6), 1e200, dtype=torch.float64))))
    assert set(report.norms.values()) == {None}


def test_a_block_of_thousands_of_digits_and_escapes_stays_readable(target):
    name = "lora_unet_down_blocks_" + "9" * 5000
    kohya = {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": torch.zeros(5, 4)}
    report = describe(put(target, kohya, {"ss_sd_model_name": "\x1b[2Jgone\nalpha: 1"}))
    assert all("\x1b" not in line and "\n" not in line and len(line) < 2100 for line in report.lines())


@pytest.mark.parametrize("entry", ["1", "{}", '{"dtype": "F32", "shape": "ab"}', '{"dtype": "F32", "shape": [-1]}'])
def test_entries_of_a_header_that_are_no_tensors(target, entry):
    header = f'{{"model.diffusion_model.input_blocks.0.0.weight": {entry}}}'.encode()
    target.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "no dtype and shape" in refused(target)
    with pytest.raises(ModelError, match="no dtype and shape"):
        read_shapes(target)


def test_a_checkpoint_without_its_first_convolution_is_named():
    needed = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    }
    for shape in ((), (7,), (320, 4)):
        with pytest.raises(ModelError, match="first convolution"):
            detect(needed | {"model.diffusion_model.input_blocks.0.0.weight": shape}, "x.safetensors")
