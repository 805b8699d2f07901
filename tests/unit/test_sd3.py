"""Stable Diffusion 3 from a file: its network beside diffusers', its conditioning beside transformers', training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from benchmarks.ldm import mmdit_state
from benchmarks.models import MEDIUM
from lora_trainer import sampling
from lora_trainer.adapters.forms import told_family
from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.parts import parts_of
from lora_trainer.config import build
from lora_trainer.config.presets import PRESETS
from lora_trainer.config.sources import family_of
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.events import Notice, Started
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.bridge import mmdit_view
from lora_trainer.models.detection import detect
from lora_trainer.models.families import SD3
from lora_trainer.models.latents import Moments, decode, sampled
from lora_trainer.models.mmdit import MMDiT, Sizes
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.text import END
from lora_trainer.models.unet_names import LDM_PREFIX
from lora_trainer.sampling import Recipe, conditions
from lora_trainer.tools.outline import outline
from lora_trainer.training.checkpointing import checkpointed
from lora_trainer.training.precision import Precision
from lora_trainer.training.segment import open_segment
from lora_trainer.training.suits import require_suited
from tests.tiny_sd3 import CLIP, DEPTH, FIRST, NETWORK, SECOND, WIDTHS, tiny_sd3_checkpoint, tiny_sd3_state
from tests.unit.test_run import of, train

CPU = torch.device("cpu")
LONG = "a cat, sitting " * 30
RECIPE = Recipe((64, 96), steps=3, seed=1)
PLAIN = Precision(CPU, torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_sd3_checkpoint(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def sd3(settings, base) -> dict:
    return {**settings, "base_model": str(base), "resolution": 64, "epochs": 1}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- the views


def test_the_full_size_network_shares_all_491_tensors():
    state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in mmdit_state(MEDIUM).items()}
    view = mmdit_view(state)
    mine = {name: tensor.data_ptr() for name, tensor in view.state_dict().items()}
    assert mine == {name.removeprefix(LDM_PREFIX): tensor.data_ptr() for name, tensor in state.items()}
    assert len(mine) == len(list(view.parameters())) == 491
    assert sum(p.numel() for p in view.parameters()) == 2_084_951_104


def test_every_tensor_is_the_checkpoints_own(base):
    family, state = place(base, CPU, torch.float32)
    assert family is SD3
    model = model_of(state, family, base, device=CPU, hashes=lambda: None)
    # CLIP-L is heard before its projection.
    theirs = {t.data_ptr() for name, t in state.items() if name != f"{FIRST}text_projection.weight"}
    mine = [p for part in (model.unet, model.vae, *model.text.modules) for p in part.parameters()]
    assert {p.data_ptr() for p in mine} == theirs
    assert not any(p.requires_grad for p in mine)


def test_the_network_answers_as_diffusers_does(base):
    state = {name.removeprefix(LDM_PREFIX): t.clone() for name, t in tiny_sd3_state().items() if LDM_PREFIX in name}
    theirs = SD3Transformer2DModel(
        sample_size=32,
        in_channels=16,
        num_layers=DEPTH,
        attention_head_dim=64,
        num_attention_heads=DEPTH,
        joint_attention_dim=NETWORK.context,
        caption_projection_dim=64 * DEPTH,
        pooled_projection_dim=NETWORK.pooled,
        pos_embed_max_size=16,
    )
    theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(state, config=dict(theirs.config)))
    ours = open_model(base, CPU).unet
    x, context, pooled = random(2, 16, 8, 12), random(2, 154, 4096), random(2, NETWORK.pooled)
    t = torch.tensor([37.5, 900.0])
    with torch.no_grad():
        expected = theirs(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t, return_dict=False)[0]
        (found,) = ours(x, t, context, {"text_embeds": pooled})
        (alone,) = ours(x, t, context[:, :77, :192], {"text_embeds": pooled})
        silent = torch.nn.functional.pad(context[:, :77, :192], (0, 4096 - 192, 0, 77))
        (filled_up,) = ours(x, t, silent, {"text_embeds": pooled})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(alone, filled_up)
    assert (alone - found).abs().max() > 1e-3


def test_more_patches_than_places_are_named(base):
    unet = open_model(base, CPU).unet
    with pytest.raises(ModelError, match="8×17 patches; the base model has places for 16 a side"):
        unet(random(1, 16, 34, 16), torch.tensor(1.0), random(1, 77, 192), {"text_embeds": random(1, 192)})


def test_latents_are_shifted_before_they_are_scaled(base):
    vae = open_model(base, CPU).vae
    mean, std, noise = random(1, 16, 8, 8), random(1, 16, 8, 8).abs(), random(1, 16, 8, 8)
    latents = sampled(vae, Moments(mean, std), noise)
    torch.testing.assert_close(latents, (mean + std * noise - 0.0609) * 1.5305)
    with torch.no_grad():
        expected = vae.decode(latents / 1.5305 + 0.0609).sample
    torch.testing.assert_close(decode(vae, latents), expected)


# --- conditioning


def reference(state, prefix, ids, activation):
    """transformers' own model, copied."""
    width = WIDTHS[prefix]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    # By this id older and newer versions take the largest id for the end.
    config = CLIPTextConfig(**CLIP, **sizes, hidden_act=activation, projection_dim=width, eos_token_id=2)
    clip = CLIPTextModelWithProjection(config).eval()
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    clip.load_state_dict(part, strict=False)
    with torch.no_grad():
        said = clip(input_ids=ids, output_hidden_states=True)
        last = clip.text_model.final_layer_norm(said.hidden_states[-1])
    return said.hidden_states[-2], said.text_embeds, last[torch.arange(len(ids)), ids.argmax(-1)]


@pytest.mark.parametrize("caption", ["", "a cat", LONG])
def test_captions_are_heard_as_in_transformers(base, caption):
    model, state = open_model(base, CPU), tiny_sd3_state()
    ids = model.text.tokenize(caption)
    padded = ids.masked_fill(torch.arange(77) > (ids == END).int().argmax(-1, keepdim=True), 0)
    first, _, plain = reference(state, FIRST, ids, "quick_gelu")
    second, projected, _ = reference(state, SECOND, padded, "gelu")
    said = model.text.read(caption)
    torch.testing.assert_close(said.context, torch.cat([first, second], -1).flatten(0, 1)[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(said.pooled, torch.cat([plain[:1], projected[:1]], -1), rtol=0, atol=1e-5)


def test_captions_in_the_step_are_the_same(sd3, base):
    model = open_model(base, CPU)
    with open_segment(build(sd3), model, None) as segment:
        for caption in ("a cat", LONG):
            said, ahead = segment.network.encode(model.text.tokenize(caption)[None]), model.text.read(caption)
            torch.testing.assert_close(said.context, ahead.context, rtol=0, atol=1e-5)
            torch.testing.assert_close(said.pooled, ahead.pooled, rtol=0, atol=1e-5)


# --- training


def test_a_run_writes_what_the_webui_reads_and_draws_it(sd3, base, tmp_path):
    before = {name: t.clone() for name, t in open_model(base, CPU).unet.state_dict().items()}
    settings = {"learning_rate": 1e-2, "lora_rank": 2, "lora_alpha": 6.0, "save_precision": "fp32"}
    events, data = train(sd3, **settings, sample_prompts=["a cat"], sample_steps=2)
    assert of(events, Started)[0].modules == 10 * (DEPTH - 1) + 7
    assert any("T5-XXL stays silent" in event.text for event in of(events, Notice))
    tensors = load(data)
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight"}
    assert tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"].shape == (3 * 64 * DEPTH, 2)
    path = tmp_path / "made.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="a LoRA for Stable Diffusion 3; expected"):
        told_family(read_lora(path), "sd1")
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["ss_base_model_version"] == "sd3_medium"
    assert said["modelspec.architecture"] == "stable-diffusion-3-medium/lora"
    assert "modelspec.prediction_type" not in said
    assert json.loads(said["lora_trainer_config"])["lora_alpha"] == 6

    model = open_model(base, CPU)
    plain = sampling.denoise(model, "a cat", RECIPE, PLAIN)
    applied = sampling.apply_lora(model, path)
    drawn = sampling.denoise(model, "a cat", RECIPE, PLAIN)
    assert (drawn - plain).abs().max() > 0.1
    with applied.weight(0):
        assert torch.equal(sampling.denoise(model, "a cat", RECIPE, PLAIN), plain)
    fresh = open_model(base, CPU)
    for name, weight in fresh.unet.state_dict().items():
        assert torch.equal(weight, before[name])
        # As the WebUI adds it: up · down, whatever the alpha was.
        lora = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if name.endswith(".weight") and f"{lora}.lora_up.weight" in tensors:
            weight += tensors[f"{lora}.lora_up.weight"] @ tensors[f"{lora}.lora_down.weight"]
    torch.testing.assert_close(sampling.denoise(fresh, "a cat", RECIPE, PLAIN), drawn, rtol=0, atol=1e-4)


def test_what_is_learned_is_the_file_at_any_alpha(sd3, base):
    model = open_model(base, CPU)
    with open_segment(build(sd3, {"lora_rank": 4, "lora_alpha": 10.0}), model, None) as segment:
        segment.trainables.masters.normal_(0, 0.1)
        segment.working.refresh()
        factors = segment.factors()["unet"]
        tensors = parts_of(model)["unet"].to_kohya(factors)
    (name, learned), *_ = factors.items()
    lora = f"lora_unet_{name.replace('.', '_')}"
    product = tensors[f"{lora}.lora_up.weight"] @ tensors[f"{lora}.lora_down.weight"]
    torch.testing.assert_close(product, learned.up @ learned.down * 2.5)


def test_its_blocks_are_recomputed_all_or_all_but_a_quarter():
    with torch.device("meta"):
        network = MMDiT(Sizes(64, 8, 16, 2, 16, 64, 64))
    for every, count in ((True, 8), (False, 6)):
        with checkpointed(network, every=every) as blocks:
            assert blocks == count


def test_a_run_recomputes_its_blocks_and_another_goes_on_from_its_file(sd3, tmp_path):
    _, data = train(sd3, learning_rate=5e-3, max_train_steps=12, gradient_checkpointing=True)
    _, plain = train(sd3, learning_rate=5e-3, max_train_steps=12)
    one, other = load(data), load(plain)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    path = tmp_path / "first.safetensors"
    path.write_bytes(plain)
    _, more = train(sd3, learning_rate=1e-9, initial_lora=str(path), max_train_steps=1, output_name="second")
    again = load(more)
    for name in (n for n in other if n.endswith("lora_up.weight")):
        down = name.replace("lora_up", "lora_down")
        torch.testing.assert_close(
            again[name].float() @ again[down].float(), other[name].float() @ other[down].float(), rtol=0, atol=1e-3
        )


REFUSED = {
    "min_snr_gamma": {"min_snr_gamma": 5},
    "soft_min_snr_gamma": {"soft_min_snr_gamma": 4},
    "debiased_estimation_loss": {"debiased_estimation_loss": True},
    "scale_v_pred_loss_like_noise_pred": {"scale_v_pred_loss_like_noise_pred": True},
    "zero_terminal_snr": {"zero_terminal_snr": True},
    "noise_offset": {"noise_offset": 0.05},
    "multires_noise_iterations": {"multires_noise_iterations": 6},
    "huber_schedule": {"loss_type": "huber"},
    "adapter": {"adapter": "loha"},
    "train_text_encoder": {"train_text_encoder": True},
    "block_ranks": {"block_ranks": ["IN04=4"]},
    "conv_rank": {"conv_rank": 4},
    "output_format": {"output_format": "diffusers"},
    "measure_drift": {"measure_drift": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_suit_it_is_refused_by_name(sd3, key):
    with pytest.raises(ConfigError) as error:
        train(sd3, **REFUSED[key])
    (line,) = error.value.problems
    assert line.startswith(f"{key}: expected ")
    assert "Stable Diffusion 3" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "huber", "huber_schedule": "exponential"},
        {"loss_type": "smooth_l1", "huber_schedule": "constant"},
        {"timestep_sampling": "logit_normal", "ip_noise_gamma": 0.1},
        {"shuffle_captions": True, "tag_dropout": 0.5, "caption_dropout": 0.5},
        {"lora_dropout": 0.1, "rank_dropout": 0.1},
        {"target_modules": ["attn.qkv"], "exclude_modules": ["*.context_block.*"]},
        {"mode": "slider", "slider_positive": "old", "slider_negative": "young", "slider_target": "face"},
    ],
)
def test_what_does_suit_it_trains(sd3, changes):
    more = {"train_data_dir": "", "slider_pictures": 2} if "mode" in changes else {}
    _, data = train(sd3, max_train_steps=2, **changes, **more)
    assert load(data)


# --- what files are


def test_files_that_lack_something_say_what(base, tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_sd3_state().items()}
    assert detect(shapes, "x") is SD3
    without = {name: shape for name, shape in shapes.items() if not name.startswith("text_encoders.")}
    for some, words in (
        (without, r"without a text encoder text_encoders.clip_l.* and .*clip_g.*sd3_medium_incl_clips"),
        ({name.removeprefix(LDM_PREFIX): shape for name, shape in shapes.items()}, r"without model.diffusion_model"),
        (shapes | {f"{LDM_PREFIX}joint_blocks.0.x_block.attn.ln_q.weight": (64,)}, r"Stable Diffusion 3\.5"),
    ):
        with pytest.raises(ModelError, match=words):
            detect(some, "x")
    with pytest.raises(ModelError, match="Stable Diffusion 3 checkpoint; expected"):
        outline(base)


def test_a_preset_knows_it(base):
    assert family_of({"base_model": str(base)}) == "sd3"
    needed = {"base_model": str(base), "train_data_dir": "x"}
    for preset in PRESETS:
        require_suited(build(needed, {"preset": preset}, family="sd3"), SD3)


def test_t5_in_the_file_is_left_there(base, tmp_path):
    state = tiny_sd3_state() | {"text_encoders.t5xxl.transformer.shared.weight": torch.zeros(8, 4096)}
    save_file(state, tmp_path / "with-t5.safetensors")
    _, placed = place(tmp_path / "with-t5.safetensors", CPU, torch.float32)
    assert not any("t5xxl" in name for name in placed)
    model = open_model(tmp_path / "with-t5.safetensors", CPU)
    assert torch.equal(
        conditions(model, ["a cat"], (64, 64))["encoder_hidden_states"], open_model(base, CPU).text.embed("a cat")
    )


def test_clip_skip_is_no_choice_here(sd3, base):
    family, state = place(base, CPU, torch.float32)
    with pytest.raises(ConfigError, match="clip_skip: Stable Diffusion 3 always takes layer 2"):
        model_of(state, family, base, device=CPU, hashes=lambda: None, clip_skip=1)
