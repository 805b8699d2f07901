"""Files of other tools, damaged files, and saving where something is in the way."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_trainer import files
from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.load import match, read_lora
from lora_trainer.adapters.metadata import BaseFacts, DataFacts, Folder, build_metadata
from lora_trainer.adapters.naming import Factors, to_diffusers, to_kohya
from lora_trainer.adapters.save import assemble
from lora_trainer.adapters.writer import serialize
from lora_trainer.errors import ModelError, OutputError
from lora_trainer.files import publish
from tests.unit.test_adapters import factors, facts

RANK, ALPHA = 4, 2.0


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.safetensors"


def put(target, tensors, metadata=None):
    target.write_bytes(serialize(tensors, metadata or {}))
    return target


# --- saving


def test_a_folder_name_in_another_encoding_does_not_cost_the_run():
    run, data, base = facts()
    odd = DataFacts({"caf\udce9": Folder(["a cat"])}, data.buckets, data.resolution, data.batches_per_epoch)
    saved = assemble(to_kohya("lora_unet", factors()), build_metadata(run, odd, base))
    assert len(safetensors.torch.load(saved)) == 6
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    assert json.loads(header["__metadata__"]["ss_tag_frequency"]) == {"caf?": {"a cat": 1}}


def test_an_interrupted_publish_leaves_nothing(target, monkeypatch):
    target.write_bytes(b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(b"new", target)
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"old"]


def test_a_write_that_stops_half_way_leaves_nothing(target):
    """The system itself refuses, after a part was written."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OutputError, match="not written"):
            publish(b"x" * (3 << 20), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(target.parent.iterdir())


# --- reading


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"unet.lora_alpha": 8}, 8.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 16.0),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"^mid_block.attentions.0.proj_in": 8}}, 8.0),
        ({"text_encoder.lora_alpha": 8}, float(RANK)),
    ],
)
def test_diffusers_own_alpha_is_honoured(target, config, alpha):
    lora = read_lora(put(target, to_diffusers(factors()), {"lora_adapter_metadata": json.dumps(config)}))
    assert lora.factors["lora_unet_mid_block_attentions_0_proj_in"].alpha == alpha


def test_diffusers_older_names_and_text_encoder(target):
    f = factors()["mid_block.attentions.0.proj_in"]
    tensors = {
        "unet.x.to_q.lora.down.weight": f.down,
        "unet.x.to_q.lora.up.weight": f.up,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": f.down,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": f.up,
    }
    lora = read_lora(put(target, tensors))
    assert set(lora.factors) == {"lora_unet_x_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1"}
    assert torch.equal(lora.factors["lora_unet_x_to_q"].down, f.down)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("alpha", torch.ones(2), "has 2 numbers; expected one"),
        ("lora_down.weight", torch.tensor(1.0), r"has shapes \[\] and \[5, 4\]"),
        ("lora_down.weight", torch.zeros(0, 6), "has ranks 0 and 4"),
        ("lora_up.weight", torch.zeros(5, 3), "has ranks 4 and 3"),
    ],
)
def test_tensors_that_make_no_sense_are_named(target, part, value, words):
    tensors = to_kohya("lora_unet", factors())
    name = next(name for name in tensors if name.endswith(f"to_q.{part}"))
    with pytest.raises(ModelError, match=words) as caught:
        read_lora(put(target, {**tensors, name: value}))
    assert "to_q" in str(caught.value)
    assert str(target) in str(caught.value)


def test_alphas_alone_are_no_lora(target):
    with pytest.raises(ModelError, match="lora_unet_x lacks its"):
        read_lora(put(target, {"lora_unet_x.alpha": torch.tensor(1.0)}))


def test_a_lora_of_another_family_is_refused_by_its_sizes(target):
    net = nn.ModuleDict({"to_k": nn.Linear(768, 320), "conv": nn.Conv2d(6, 5, 1)})
    other = {"to_k": Factors(torch.ones(RANK, 1024), torch.ones(320, RANK), ALPHA)}
    with pytest.raises(ModelError, match="another base model: lora_unet_to_k maps 1024 to 320") as caught:
        match(read_lora(put(target, to_kohya("lora_unet", other))), net)
    assert str(target) in str(caught.value)
    # A linear layer's factors fit a 1×1 convolution.
    flat = {"conv": Factors(torch.ones(RANK, 6), torch.ones(5, RANK), ALPHA)}
    assert list(match(read_lora(put(target, to_kohya("lora_unet", flat))), net)[0]) == ["conv"]


# --- inspection


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_module_can_still_be_inspected(target, value):
    tensors = to_kohya("lora_unet", factors())
    name = next(name for name in tensors if name.endswith("proj_in.lora_up.weight"))
    tensors[name] = torch.full_like(tensors[name], value)
    report = describe(put(target, tensors))
    assert report.norms == {"unet mid_block": None}
    assert any("not finite" in line for line in report.lines())
    assert "proj_in" in report.warnings[0]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(report.to_json(), parse_constant=refuse)


def test_an_untrained_file_is_called_so(target):
    untrained = {name: Factors(f.down, torch.zeros_like(f.up), f.alpha) for name, f in factors().items()}
    report = describe(put(target, to_kohya("lora_unet", untrained)))
    assert "2 of 2 modules are all zero" in report.warnings[0]
    assert report.norms == {"unet mid_block": 0.0}
    assert report.lines()


def test_blocks_come_in_their_order(target):
    f = factors()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    names = {f"encoder.layers.{layer}.mlp.fc1": f for layer in (10, 2)}
    report = describe(put(target, to_kohya("lora_te", names)))
    assert list(report.norms) == ["te layers_2", "te layers_10"]


# --- metadata


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [
        ("stable-diffusion-v1", "diffusers"),
        ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
    ],
)
def test_modelspec_names_the_implementation_that_kohya_names(architecture, implementation):
    run, data, _ = facts()
    base = BaseFacts("x", "y", architecture, "epsilon", None, None)
    assert build_metadata(run, data, base)["modelspec.implementation"] == implementation
