"""SDXL from a file: shared tensors, conditioning beside a reference of its own, training, files."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch.nn import functional as F

from benchmarks.ldm import unet_state
from benchmarks.models import UNETS
from lora_trainer import sampling
from lora_trainer.adapters.inspect import describe
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.parts import parts_of, whole_attention
from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Compared, Notice, Started, StepDone
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.bridge import unet_config, unet_view
from lora_trainer.models.families import SDXL
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.text import END, bundled
from lora_trainer.models.unet_names import LDM_PREFIX, to_diffusers, to_ldm
from lora_trainer.sampling import Recipe
from lora_trainer.training.precision import Precision
from lora_trainer.training.segment import open_segment
from tests.tiny import WIDTH
from tests.tiny_sdxl import FIRST, SECOND, UNET, tiny_sdxl_checkpoint, tiny_sdxl_state
from tests.unit.test_bridge import shared
from tests.unit.test_run import of, train

CPU = torch.device("cpu")
LONG = "a cat, sitting " * 30
RECIPE = Recipe((64, 64), steps=2, seed=1)
PLAIN = Precision(CPU, torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_sdxl_checkpoint(tmp_path_factory.mktemp("xl"))


@pytest.fixture
def xl(settings, base) -> dict:
    return {**settings, "base_model": str(base), "resolution": 64, "epochs": 1}


# --- the views


def test_full_size_unet_shares_all_1680_tensors():
    config = UNETS["sdxl"]
    state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in unet_state(config).items()}
    view = unet_view(state, head_channels=64)
    assert shared(state, view, LDM_PREFIX, lambda name: to_diffusers(name, 2)) == len(state) == 1680
    part = {name.removeprefix(LDM_PREFIX): tensor for name, tensor in state.items()}
    mine = unet_config(part, head_channels=64)
    assert {key: mine[key] for key in config} == config


def test_every_text_parameter_is_the_checkpoints_own(base):
    family, state = place(base, CPU, torch.float32)
    assert family is SDXL
    model = model_of(state, family, base, device=CPU, hashes=lambda: None)
    first, second = (encoder.module for encoder in model.text.encoders)
    places = {state[name].data_ptr() for name in state if name.startswith(FIRST)}
    assert {p.data_ptr() for p in first.parameters()} == places
    named = dict(second.named_parameters())
    ending = "q_proj.weight"
    layer = next(name for name in named if name.endswith(f"layers.1.self_attn.{ending}")).removesuffix(ending)
    packed = state[SECOND + "transformer.resblocks.1.attn.in_proj_weight"]
    for part, third in zip("qkv", packed.chunk(3), strict=True):
        assert named[f"{layer}{part}_proj.weight"].data_ptr() == third.data_ptr()
    storages = {state[name].untyped_storage().data_ptr() for name in state if name.startswith(SECOND)}
    assert {p.untyped_storage().data_ptr() for p in named.values()} == storages - {
        state[SECOND + "logit_scale"].untyped_storage().data_ptr()
    }
    assert not any(p.requires_grad for part in (first, second, model.unet) for p in part.parameters())


def test_module_names_go_both_ways():
    attends = [kind.startswith("Cross") for kind in UNETS["sdxl"]["up_block_types"]]
    for name in (n.removeprefix(LDM_PREFIX) for n in unet_state(UNETS["sdxl"])):
        module, _, kind = name.rpartition(".")
        assert to_ldm(to_diffusers(name, 2).removesuffix("." + kind), 2, attends) == module


# --- conditioning


def clip_reference(state, prefix, ids):
    """(the layer before the last's output, the last's) of CLIP ViT-L's text half (Radford et al. 2021)."""
    part = {name.removeprefix(f"{prefix}text_model."): t for name, t in state.items() if name.startswith(prefix)}

    def linear(x, name):
        return F.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), part[f"{name}.weight"], part[f"{name}.bias"])

    x = part["embeddings.token_embedding.weight"][ids] + part["embeddings.position_embedding.weight"]
    outputs = []
    for layer in (f"encoder.layers.{n}" for n in range(3)):
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH) + torch.full((77, 77), -math.inf).triu(1)
        x = x + linear(scores.softmax(-1) @ v, f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
        outputs.append(x)
    return outputs[-2], outputs[-1]


def open_clip_reference(state, prefix, ids):
    """(the layer before the last's output, the pooled vector), as open_clip computes them with packed attention."""
    part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), part[f"{name}.weight"], part[f"{name}.bias"])

    x = part["token_embedding.weight"][ids] + part["positional_embedding"]
    outputs = []
    for block in (f"transformer.resblocks.{n}" for n in range(3)):
        y = norm(x, f"{block}.ln_1").transpose(0, 1)
        packed = part[f"{block}.attn.in_proj_weight"], part[f"{block}.attn.in_proj_bias"]
        out = part[f"{block}.attn.out_proj.weight"], part[f"{block}.attn.out_proj.bias"]
        mask = torch.full((77, 77), -math.inf).triu(1)
        y, _ = F.multi_head_attention_forward(
            y, y, y, WIDTH, 1, *packed, None, None, False, 0.0, *out, training=False, attn_mask=mask
        )
        x = x + y.transpose(0, 1)
        y = F.linear(norm(x, f"{block}.ln_2"), part[f"{block}.mlp.c_fc.weight"], part[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(y), part[f"{block}.mlp.c_proj.weight"], part[f"{block}.mlp.c_proj.bias"])
        outputs.append(x)
    pooled = norm(outputs[-1], "ln_final")[torch.arange(len(ids)), ids.argmax(-1)] @ part["text_projection"]
    return outputs[-2], pooled


@pytest.mark.parametrize("caption", ["", "a cat", LONG])
def test_conditioning_is_that_of_both_encoders(base, caption):
    _, state = place(base, CPU, torch.float32)
    said = open_model(base, CPU).text.read(caption)
    ids = bundled()(caption)
    zeros = ids.clone()
    for row in zeros:
        row[row.tolist().index(END) + 1 :] = 0
    first, _ = clip_reference(state, FIRST, ids)
    second, pooled = open_clip_reference(state, SECOND, zeros)
    expected = torch.cat([first, second], -1).reshape(1, -1, 2 * WIDTH)
    torch.testing.assert_close(said.context, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.pooled, pooled[:1], rtol=1e-4, atol=1e-5)


def test_clip_skip_is_refused_and_the_usual_one_is_not(base, xl):
    family, state = place(base, CPU, torch.float32)
    model_of(state, family, base, device=CPU, hashes=lambda: None, clip_skip=2)
    with pytest.raises(ConfigError, match="clip_skip: SDXL always takes layer 2"):
        model_of(state, family, base, device=CPU, hashes=lambda: None, clip_skip=1)


# --- what is predicted

V_YAML = """
model:
  params:
    denoiser_config:
      params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}
    network_config: {params: {num_head_channels: 32}}
"""


@pytest.mark.parametrize("key", ["v_pred", "ztsnr"])
def test_the_files_keys_say_what_is_predicted(xl, tmp_path, key):
    path = tmp_path / f"{key}.safetensors"
    save_file(tiny_sdxl_state() | {key: torch.tensor([])}, path)
    model = open_model(path, CPU)
    assert model.noise.prediction == ("v" if key == "v_pred" else "epsilon")
    assert (model.noise.alphas_cumprod[-1] == 0) == (key == "ztsnr")
    events, data = train({**xl, "base_model": str(path)}, learning_rate=0.01)
    assert [notice.text for notice in of(events, Notice) if f"its key {key} says" in notice.text]
    assert header(data)["modelspec.prediction_type"] == model.noise.prediction
    assert all(math.isfinite(step.loss) for step in of(events, StepDone))


def test_a_derivative_that_predicts_v_down_to_no_signal_draws(tmp_path):
    path = tmp_path / "both.safetensors"
    save_file(tiny_sdxl_state() | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    model = open_model(path, CPU)
    ddim = sampling.scheduler(model.noise)
    ddim.set_timesteps(4)
    assert ddim.timesteps.tolist() == [999, 749, 499, 249]
    assert torch.isfinite(sampling.denoise(model, "a cat", RECIPE, PLAIN)).all()


def test_a_yaml_beside_it_says_so_too(tmp_path):
    path = tiny_sdxl_checkpoint(tmp_path)
    path.with_suffix(".yaml").write_text(V_YAML, encoding="utf-8")
    model = open_model(path, CPU)
    assert model.noise.prediction == "v"
    assert not model.facts.notices
    assert model.unet.config.attention_head_dim == (1, 2)


# --- runs


def header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("text", [False, True], ids=["unet", "both encoders too"])
def test_a_run_writes_what_draws_the_trainers_own_picture(xl, text, monkeypatch):
    latents, decode = [], sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda vae, x: latents.append(x) or decode(vae, x))
    changes = {"sample_prompts": [LONG], "sample_steps": 2, "learning_rate": 0.02, "train_text_encoder": text}
    events, data = train(xl, **changes, save_precision="fp32", output_format="both", target_modules=["default", "conv"])
    drawn, *_ = latents
    names = {name.split(".")[0] for name in load(data)}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k" in names
    assert {
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_middle_block_1_proj_in",
    } <= names
    counts = [sum(name.startswith(f"lora_te{n}_text_model_encoder_layers_") for name in names) for n in (1, 2)]
    # The first encoder's last layer is not heard.
    assert counts == ([2 * 6, 3 * 6] if text else [0, 0])
    assert not any("blocks_0_attentions" in name or "resnets" in name for name in names)
    assert of(events, Started)[0].modules == len(names)
    assert all(tensor.any() for name, tensor in load(data).items() if "lora_up" in name)
    made, diffusers = sorted(
        Path(xl["output_dir"]).glob("*.safetensors"), key=lambda path: path.name != "tiny.safetensors"
    )
    for file in (made, diffusers):
        model = open_model(Path(xl["base_model"]), CPU)
        plain = sampling.denoise(model, LONG, Recipe((64, 64), steps=2, guidance=5.0), PLAIN)
        sampling.apply_lora(model, file)
        again = sampling.denoise(model, LONG, Recipe((64, 64), steps=2, guidance=5.0), PLAIN)
        torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-4)
        assert (plain - drawn).abs().max() > 1e-2
    said = header(data)
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.implementation"].endswith("generative-models")
    assert (said["ss_v2"], said["ss_clip_skip"]) == ("False", "None")
    assert "xl" in describe(made).family


def test_captions_that_change_are_encoded_in_the_step_alike(xl):
    still, _ = train(xl, lora_dropout=0, cpu_threads=1)
    base = build(xl, {"train_text_encoder": True, "mixed_precision": "no"})
    family, state = place(Path(xl["base_model"]), CPU, torch.float32)
    model = model_of(state, family, Path(xl["base_model"]), device=CPU, hashes=lambda: None)
    frozen = [model.text.read(caption) for caption in (LONG, "dogs under trees, " * 30)]
    ids = torch.stack([model.text.tokens(caption)["ids"] for caption in (LONG, "dogs under trees, " * 30)])
    with open_segment(base, model, None) as segment:
        said = segment.network.encode(ids)
    torch.testing.assert_close(said.context, torch.cat([f.context for f in frozen]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.pooled, torch.cat([f.pooled for f in frozen]), rtol=1e-4, atol=1e-5)
    live, _ = train(xl, lora_dropout=0, cpu_threads=1, train_text_encoder=True)
    assert of(live, StepDone)[0].loss == pytest.approx(of(still, StepDone)[0].loss, rel=1e-5)


def test_sizes_and_the_pooled_vector_are_heard(xl, base):
    model = open_model(base, CPU)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    said = model.text.read("a cat")

    def out(pooled, sizes):
        told = {"text_embeds": pooled, "time_ids": torch.tensor([sizes])}
        with torch.no_grad():
            return model.unet(x, t, encoder_hidden_states=said.context, added_cond_kwargs=told).sample

    answers = [
        out(p, s) for p in (said.pooled, -said.pooled) for s in ([64.0, 32, 0, 0, 64, 64], [32.0, 64, 0, 0, 64, 64])
    ]
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(answers))


def test_the_resolution_is_1024_unless_told(xl, monkeypatch):
    del xl["resolution"]
    asked = []
    from lora_trainer.training import data

    monkeypatch.setattr(data, "sizes_of", lambda config, side: asked.append(side) or original(config, 64))
    from lora_trainer.dataset.crops import sizes_of as original

    train(xl)
    assert asked == [1024]


def test_files_of_other_families_are_refused(settings, xl, checkpoint, base, tmp_path):
    _, data = train(xl, learning_rate=0.01)
    other = tmp_path / "xl.safetensors"
    other.write_bytes(data)
    with pytest.raises(ModelError, match="made for another base model"):
        sampling.apply_lora(open_model(checkpoint, CPU), other)
    _, data = train({**settings, "epochs": 1}, learning_rate=0.01, train_text_encoder=True)
    other.write_bytes(data)
    with pytest.raises(ModelError, match=r"lora_te_text_model"):
        sampling.apply_lora(open_model(base, CPU), other)


def test_a_part_of_a_packed_attention_is_filled_up_with_nothing(base):
    some = Factors(torch.ones(4, 16), torch.ones(16, 4), 4.0)
    given = {"layers.0.self_attn.q_proj": some, "layers.0.mlp.fc1": Factors(torch.ones(4, 16), torch.ones(64, 4), 4.0)}
    whole = whole_attention(given)
    assert whole.keys() == given.keys() | {f"layers.0.self_attn.{p}_proj" for p in ("k", "v", "out")}
    assert whole["layers.0.self_attn.q_proj"] is some
    assert not whole["layers.0.self_attn.out_proj"].up.any()
    model = open_model(base, CPU)
    assert [part.packed for part in parts_of(model).values()] == [False, False, True]
    assert model.unet.config.attention_head_dim == UNET["attention_head_dim"]


def test_drift_is_measured_with_all_that_it_is_told(xl):
    changes = {"measure_drift": True, "validation_split": 0.4, "learning_rate": 0.02, "epochs": 2}
    events, _ = train(xl, **changes)
    assert all(math.isfinite(one.likeness) and math.isfinite(one.drift) for one in of(events, Compared))
    assert of(events, Compared)[-1].drift > 0
