"""SDXL, its relatives and Stable Diffusion 2.x as they are lent, and what is refused, on a stand-in for the WebUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_trainer.config import build
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.models.families import REFINER, SD2, SD2_V, SDXL
from lora_trainer.models.stored import dense
from lora_trainer.training.control import StopOnly
from tests.fake_webui.checkpoints import write_families
from tests.fake_webui.install import installed

ON = "Zero Terminal SNR"
PLAIN = ["a cat", "", "a cat on a mat " * 20]
SYNTAX = ["a (cat:1.5), [mat] BREAK dog"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return write_families(tmp_path_factory.mktemp("families") / "checkpoints")


@pytest.fixture
def ui(checkpoints, tmp_path):
    """A started WebUI whose checkpoints a test may change; none is loaded yet."""
    models = tmp_path / "webui" / "models" / "Stable-diffusion"
    models.mkdir(parents=True)
    for path in checkpoints.iterdir():
        (models / path.name).symlink_to(path)
    with installed(tmp_path / "webui") as webui:
        webui.models = models
        yield webui


@pytest.fixture(params=["xl", "ssd", "refiner", "two"])
def loaded(request, ui):
    ui.choose(request.param)
    assert ui.model.sd_checkpoint_info.name == f"{request.param}.safetensors"
    return ui


def lent(ui, **settings):
    config = build({"base_model": ui.model.sd_checkpoint_info.name, "train_data_dir": "x"}, settings)
    return ui.host("loaded").LoadedModel(config, lambda event: None)


def said(ui, caption: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the WebUI makes of it."""
    embedders = ui.host("tensors").embedders_of(ui.model).values()
    answers = [embedder([caption]) for embedder in embedders]
    hidden = torch.cat([one[0] if isinstance(one, tuple) else one for one in answers], -1)
    return hidden, next((one[1] for one in answers if isinstance(one, tuple)), None)


# --- what is lent


def test_every_tensor_is_shared(loaded):
    state = loaded.host("tensors").state_of(loaded.model)
    with lent(loaded).borrow() as model:
        networks = [model.unet, model.vae, *model.text.modules]
        mine = [p for network in networks for p in network.parameters()]
    assert {p.data_ptr() for p in (*model.unet.parameters(), *model.vae.parameters())} == {
        t.data_ptr() for name, t in state.items() if name.startswith(("model.", "first_stage_model."))
    }
    theirs = {t.untyped_storage().data_ptr(): name for name, t in state.items() if t.is_floating_point()}
    assert {p.untyped_storage().data_ptr() for p in mine} <= theirs.keys()
    unused = set(theirs.values()) - {theirs[p.untyped_storage().data_ptr()] for p in mine}
    assert {name.rpartition(".")[2] for name in unused} <= {"logit_scale", "text_projection"}
    # Stable Diffusion 2's encoder has no use for its projection.
    assert any(name.endswith("text_projection") for name in unused) == (model.facts.family is SD2)


def test_captions_mean_what_they_mean_in_prompts(loaded):
    with lent(loaded).borrow() as literal, lent(loaded, caption_syntax="webui").borrow() as prompts:
        for caption in PLAIN + SYNTAX:
            expected, pooled = said(loaded, caption)
            for model in (literal, prompts) if caption in PLAIN else (prompts,):
                found = model.text.read(caption)
                assert torch.equal(found.context, expected)
                assert (found.pooled is None) == (pooled is None)
                assert pooled is None or torch.equal(found.pooled, pooled)
        for caption in PLAIN:
            viewed = literal.text.conditions(literal.text.tokenize(caption))
            torch.testing.assert_close(viewed.context, said(loaded, caption)[0], rtol=0, atol=1e-5)
        assert literal.text.embed("a BREAK dog").shape[1] == 77


@pytest.mark.parametrize("emphasis", ["Original", "No norm", "None"])
def test_captions_encoded_in_the_step_mean_the_same(loaded, emphasis):
    from lora_trainer.training.segment import open_segment

    loaded("shared").opts.emphasis = emphasis
    models = lent(loaded, caption_syntax="webui", train_text_encoder=True, mixed_precision="no")
    with models.borrow() as model, open_segment(models.config, model, None) as segment:
        for caption in PLAIN + SYNTAX:
            told = {name: tensor[None] for name, tensor in model.text.tokens(caption).items()}
            found = segment.network.encode(told["ids"], told["emphasis"])
            expected, pooled = said(loaded, caption)
            # "Original" multiplies by a quotient of means, where rounding shows.
            torch.testing.assert_close(found.context, expected, rtol=1e-4, atol=1e-5)
            if pooled is not None:
                torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-5)


def test_the_first_encoder_is_heard_where_the_webui_hears_it(ui):
    ui.choose("xl")
    ui("shared").opts.sdxl_clip_l_skip = True
    for layer in (1, 3):
        ui("shared").opts.CLIP_stop_at_last_layers = layer
        with lent(ui).borrow() as model:
            assert [encoder.clip_skip for encoder in model.text.encoders] == [layer, 2]
            expected, _ = said(ui, "a cat")
            viewed = model.text.conditions(model.text.tokenize("a cat")).context
            torch.testing.assert_close(viewed, expected, rtol=0, atol=1e-5)


def test_a_clip_skip_is_refused_where_there_is_none(loaded):
    with pytest.raises(ConfigError, match="clip_skip: .* always takes layer 2"), lent(loaded, clip_skip=1).borrow():
        pass
    loaded("shared").opts.CLIP_stop_at_last_layers = 3
    with lent(loaded).borrow() as model:
        assert model.text.clip_skip == 2


def test_the_fingerprint_notices_a_changed_value_in_each_network(loaded):
    fingerprint = loaded.host("loaded").Fingerprint.of
    networks = loaded.host("tensors").networks_of(loaded.model)
    assert len(networks) == (3 if loaded.model.sd_checkpoint_info.name in ("xl.safetensors", "ssd.safetensors") else 2)
    before = fingerprint(loaded.model)
    for network in networks:
        parameter = list(network.parameters())[-2]
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1
            assert fingerprint(loaded.model) != before
            parameter.copy_(saved)
    assert fingerprint(loaded.model) == before


def test_blocks_that_a_file_lacks_are_left_out(ui):
    """Segmind Vega's is loaded into SSD-1B's blocks."""
    ui.choose("ssd")
    blocks = ui.model.model.diffusion_model.input_blocks._modules["7"]._modules["1"].transformer_blocks
    latent_diffusion = __import__("tests.fake_webui.latent_diffusion", fromlist=["tree"])
    own = {name: torch.zeros(tensor.shape) for name, tensor in blocks._modules["0"].state_dict().items()}
    blocks.add_module("4", latent_diffusion.tree(own, torch.nn.Module()))
    with lent(ui).borrow() as model:
        assert len(model.unet.down_blocks[2].attentions[0].transformer_blocks) == 4
        assert len(model.unet.up_blocks[0].attentions[2].transformer_blocks) == 10


def test_a_refiner_has_the_scores_of_the_webuis_settings(ui):
    ui.choose("refiner")
    with lent(ui).borrow() as model:
        assert (model.facts.family, model.noise.trained) == (REFINER, 200)
    ui("shared").opts.sdxl_refiner_high_aesthetic_score = 7
    with lent(ui).borrow() as model:
        assert model.facts.family.scores == (7.0, 2.5)
        assert any("aesthetic score 7" in notice for notice in model.facts.notices)


def test_8_bit_storage_is_lent_as_it_is(ui):
    ui.choose("xl")
    before = {name: t.clone() for name, t in ui.host("tensors").state_of(ui.model).items()}
    for module in ui.model.model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(torch.float8_e4m3fn)
    with lent(ui).borrow() as model:
        weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
        decoded = dense(weight)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(decoded, before[name].to(torch.float8_e4m3fn).to(decoded.dtype))


# --- what it predicts


def rewritten(ui, name: str, *keys: str) -> None:
    """Checkpoint `name` with `keys` in its file."""
    path = ui.models / f"{name}.safetensors"
    state = load_file(path)
    path.unlink()
    save_file(state | {key: torch.tensor([]) for key in keys}, path)
    ui.choose(name)


@pytest.mark.parametrize(
    ("keys", "yaml", "drawn", "setting", "prediction", "ends", "told"),
    [
        ((), False, "eps", "Default", "epsilon", False, []),
        ((), True, "v", "Default", "v", False, []),
        (("v_pred",), False, "eps", "Default", "v", False, ["its key v_pred"]),
        (("v_pred",), False, "v", "Default", "v", False, []),
        (("v_pred",), True, "eps", "Default", "epsilon", False, []),
        (("v_pred", "ztsnr"), True, "v", "Default", "v", True, ["its key ztsnr"]),
        (("v_pred", "ztsnr"), True, "v", ON, "v", True, []),
        (("v_pred", "ztsnr"), False, "eps", ON, "v", True, ["its key v_pred"]),
        ((), True, "v", ON, "v", True, []),
        ((), False, "eps", ON, "epsilon", False, ["not followed"]),
    ],
)
def test_what_it_predicts(ui, keys, yaml, drawn, setting, prediction, ends, told):
    rewritten(ui, "xl", *keys)
    if yaml:
        (ui.models / "xl.yaml").write_text("model: {}")
    ui.model.parameterization = drawn
    ui("shared").opts.sd_noise_schedule = setting
    with lent(ui).borrow() as model:
        assert model.noise.prediction == prediction
        assert (model.noise.alphas_cumprod[-1] == 0) == ends
        assert len(model.facts.notices) == len(told)
        assert all(words in notice for words, notice in zip(told, model.facts.notices, strict=True))


@pytest.mark.parametrize(("name", "words"), [("xl", "VScaling"), ("two", 'parameterization: "v"')])
def test_it_is_said_how_the_webui_would_draw_it_rightly(ui, name, words):
    rewritten(ui, name, "v_pred")
    with lent(ui).borrow() as model:
        (notice,) = model.facts.notices
    assert f"{name}.yaml" in notice
    assert words in notice


def test_stable_diffusion_2_that_predicts_v_trains_at_its_size(ui):
    ui.choose("two")
    with lent(ui).borrow() as model:
        assert model.facts.family is SD2
    ui.model.parameterization = "v"
    with lent(ui).borrow() as model:
        assert (model.facts.family, model.facts.family.resolution) == (SD2_V, 768)


# --- jobs


def test_a_job_writes_what_the_webui_takes_for_its_own(loaded, settings, tmp_path):
    name = loaded.model.sd_checkpoint_info.name
    before, told = loaded.digest(), []
    changes = {"resolution": 64, "epochs": 1, "learning_rate": 1e-2, "train_text_encoder": True, "trial": False}
    config = build(settings | changes | {"base_model": name, "output_dir": str(tmp_path / "webui" / "run")})
    finished = loaded.host("train").train(config, told.append, StopOnly(lambda: False))
    assert loaded.digest() == before
    (lora,) = (Path(path) for path in finished.output if path.endswith(".safetensors"))
    assert lora.parent == loaded.loras
    modules = {key.rpartition(".lora_down")[0] for key in load_file(lora) if "lora_down" in key}
    prefixes = ("lora_te_", "lora_te1_", "lora_te2_", "0_model_transformer_resblocks_")
    texts = [sum(module.startswith(prefix) for module in modules) for prefix in prefixes]
    # The last layer of an encoder that is heard before it is not trained, but where it makes the pooled vector.
    two = [0, 2 * 6, 3 * 6, 0]
    counts = {"xl": two, "ssd": two, "refiner": [0, 0, 0, 3 * 6], "two": [2 * 6, 0, 0, 0]}
    assert texts == counts[Path(name).stem]
    assert any(f"{len(modules)} of {len(modules)} modules apply" in getattr(event, "text", "") for event in told)
    version = "SDXL" if loaded.model.is_sdxl else "SD2"
    assert json.loads(lora.with_suffix(".json").read_text())["sd version"] == version
    with safe_open(lora, "pt") as file:
        said = file.metadata()
    family = {"refiner": REFINER, "two": SD2}.get(Path(name).stem, SDXL)
    assert (said["ss_base_model_version"], said["ss_v2"]) == (family.base_version, str(family is SD2))


# --- what is refused


def as_koala(ui) -> None:
    del ui.model.model.diffusion_model.middle_block


def as_editing(ui) -> None:
    first = ui.model.model.diffusion_model.input_blocks._modules["0"]._modules["0"]
    first.weight = torch.nn.Parameter(torch.zeros(32, 8, 3, 3))


def as_sd3(ui) -> None:
    names = {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(192, 64)}
    latent_diffusion = __import__("tests.fake_webui.latent_diffusion", fromlist=["tree"])
    ui.model.model.diffusion_model = latent_diffusion.tree(names, torch.nn.Module())
    del ui.model.conditioner
    ui.model.cond_stage_model = torch.nn.Module()


def as_playground(ui) -> None:
    rewritten(ui, "xl", "edm_mean", "edm_std")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_koala, "KOALA"),
        (as_editing, "an editing checkpoint"),
        (as_sd3, "a Stable Diffusion 3 checkpoint"),
        (as_playground, "Playground"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is_spent(ui, settings, change, words):
    ui.choose("xl")
    change(ui)
    with pytest.raises(ModelError, match=words) as refused, lent(ui).borrow():
        pass
    assert len(str(refused.value).splitlines()) == 1
    extension = ui.host("extension").Extension()
    shown = extension.checkpoint()
    assert shown.warnings == (f"It cannot be trained on: {shown.refused}",)
    given = {"train_data_dir": settings["train_data_dir"], "base_model": None}
    with pytest.raises(ModelError, match=words):
        extension.submit({key: value for key, value in given.items() if value})
    assert extension.jobs.jobs() == []
    # Another one is looked at anew.
    ui("sd_models").model_data.set_sd_model(None)
    ui("sd_models").model_data.loaded_sd_models.clear()
    ui("sd_models").load_model(ui.info("tiny"))
    assert extension.checkpoint().refused is None
