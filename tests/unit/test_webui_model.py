"""The loaded checkpoint as it is lent, on a stand-in for the WebUI."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lora_trainer.config import build
from lora_trainer.errors import DataError, ModelError
from tests.fake_webui.loras import add_lora

STYLE = "a cat <lora:style:0.7>"


@pytest.fixture
def ui(fake_webui):
    add_lora(fake_webui.loras, "style")
    return fake_webui


@pytest.fixture
def fingerprint(ui):
    return lambda: ui.host("loaded").Fingerprint.of(ui.model)


def text_of(ui):
    return ui.model.cond_stage_model.wrapped.transformer


def lent(ui, **settings):
    config = build({"base_model": "tiny", "train_data_dir": "x"}, settings)
    return ui.host("loaded").LoadedModel(config, lambda event: None)


def test_the_fingerprint_of_an_untouched_model_stays(ui, fingerprint):
    before = fingerprint()
    ui.picture()
    assert fingerprint() == before
    ui.choose("other")
    ui.choose("tiny")
    assert fingerprint() == before


def test_the_fingerprint_notices_a_changed_value(ui, fingerprint):
    before = fingerprint()
    for parameter in (*ui.model.model.diffusion_model.parameters(), *text_of(ui).parameters()):
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        assert fingerprint() != before
        with torch.no_grad():
            parameter.copy_(saved)
    assert fingerprint() == before


def test_the_fingerprint_notices_a_moved_tensor(ui, fingerprint):
    for network in (ui.model.model.diffusion_model, text_of(ui)):
        before = fingerprint()
        parameter = next(network.parameters())
        parameter.data = parameter.data.clone()
        assert fingerprint() != before


def test_the_fingerprint_notices_another_checkpoint_in_the_same_tensors(ui, fingerprint):
    before = fingerprint()
    ui.choose("other")
    other = fingerprint()
    assert other.places == before.places
    assert other.values != before.values
    assert other != before


def test_the_fingerprint_notices_another_vae(ui, fingerprint):
    before, digest = fingerprint(), ui.digest()
    state = {name: tensor * 2 for name, tensor in ui.model.first_stage_model.state_dict().items()}
    vae = ui.data / "models" / "VAE" / "sharp.safetensors"
    vae.parent.mkdir()
    save_file(state, vae)
    ui("sd_vae").reload_vae_weights(vae_file=str(vae))
    assert fingerprint() != before
    ui("sd_vae").reload_vae_weights(vae_file=None)
    assert fingerprint() == before
    assert ui.digest() == digest


def test_the_fingerprint_notices_a_merged_lora(ui, fingerprint):
    before = fingerprint()
    ui.picture(STYLE)
    assert fingerprint() != before


def test_still_ours_after_each_kind_of_visit(ui):
    models = lent(ui)
    with models.borrow():
        assert models.still_ours()
        ui.picture()
        assert models.still_ours()
        ui.picture(STYLE)
        assert models.still_ours()
        ui.choose("other")
        assert not models.still_ours()
        ui.choose("tiny")
        assert models.still_ours()


def test_every_tensor_is_shared(ui):
    state = ui.host("tensors").state_of(ui.model)
    with lent(ui).borrow() as model:
        mine = {p.data_ptr() for part in (model.unet, model.vae, model.text.module) for p in part.parameters()}
    floats = {t.data_ptr() for t in state.values() if t.is_floating_point()}
    assert mine == floats
    assert len(mine) > 700


def in_fp8(sd_model):
    """As the WebUI's setting FP8 weight leaves it (`sd_models.load_model_weights`): all but the VAE."""
    parts = (sd_model.model.diffusion_model, sd_model.cond_stage_model.wrapped)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("settings", [{}, {"train_text_encoder": True, "conv_rank": 2}])
def test_an_fp8_base_is_lent_as_it_is_stored(ui, settings):
    """No weight is copied; what is computed is what copies of them compute."""
    from lora_trainer.models.stored import Stored, dense, stored_in
    from lora_trainer.training.segment import open_segment
    from tests.unit.test_fused import one_step

    in_fp8(ui.model)
    before, theirs = ui.digest(), ui.host("tensors").state_of(ui.model).values()
    addresses = {t.data_ptr() for t in theirs if t.dtype == torch.float8_e4m3fn and t.dim() > 1}
    found = []
    for decode in (False, True):
        models = lent(ui, mixed_precision="no", **settings)
        with models.borrow() as model:
            networks = (model.unet, model.text.module)
            stored = [weight for network in networks for weight in stored_in(network)]
            assert {weight.codes[0].data_ptr() for weight in stored} == addresses
            assert {weight.dtype for weight in stored} == {torch.float32}
            for module in (module for network in networks for module in network.modules() if decode):
                if isinstance(getattr(module, "weight", None), Stored):
                    module.weight = torch.nn.Parameter(dense(module.weight), requires_grad=False)
            with open_segment(models.config, model, None) as segment:
                if not settings:
                    found.append(one_step(segment))
                assert any("kept in fp8" in notice for notice in segment.notices) != decode
    if found:
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][1].any()
    assert ui.digest() == before


def test_unmerging_is_exact_and_the_next_prompt_merges_anew(ui):
    unmerge = ui.host("merged").unmerge
    before, plain = ui.digest(), ui.picture()
    styled = ui.picture(STYLE)
    merged = ui.digest()
    assert merged != before
    assert unmerge(ui.model)
    assert ui.digest() == before
    assert not unmerge(ui.model)
    assert ui.picture(STYLE) == styled
    # The text encoder's part too, once the encoder is asked again.
    ui.picture()
    assert ui.picture() == plain
    ui.picture(STYLE)
    assert ui.digest() == merged


def test_a_base_model_is_found_as_the_webui_names_it(ui, webui_checkpoints):
    info = ui.info("other")
    titles = ["other", "other.safetensors", info.title, "other.safetensors [0123456789]"]
    for wanted in titles:
        ui.choose("tiny")
        with lent(ui, base_model=wanted).borrow() as model:
            assert model.facts.name == "other.safetensors"
    ui.choose("tiny")
    with pytest.raises(ModelError, match="nowhere"), lent(ui, base_model="nowhere").borrow():
        pass


def test_the_users_choice_stays_chosen_while_another_is_lent(ui):
    tiny = ui.info("tiny").title
    models = lent(ui, base_model="other")
    with models.borrow():
        assert ui.model.sd_checkpoint_info.name == "other.safetensors"
    assert ui("shared").opts.sd_model_checkpoint == tiny
    models.give_back()
    assert ui.model.sd_checkpoint_info.name == "tiny.safetensors"


def test_no_checkpoint_at_all_is_an_error(ui, monkeypatch):
    data = ui("sd_models").model_data
    monkeypatch.setattr(data, "sd_model", None)
    monkeypatch.setattr(data, "was_loaded_at_least_once", True)
    models = lent(ui)
    with pytest.raises(ModelError, match="no checkpoint is loaded"), models.borrow():
        pass
    models.give_back()


def test_an_inpainting_checkpoint_is_lent_too(ui):
    unet = ui.model.model.diffusion_model
    first = unet.input_blocks._modules["0"]._modules["0"]
    first.weight = torch.nn.Parameter(torch.zeros(32, 9, 3, 3))
    with lent(ui).borrow() as model:
        assert model.unet.conv_in.weight.data_ptr() == first.weight.data_ptr()
        assert any("an inpainting checkpoint" in notice for notice in model.facts.notices)
        said = model.text.embed("a cat")
        assert model.unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), encoder_hidden_states=said).sample.shape[1] == 4


def test_captions_are_literal_or_prompts(ui):
    with lent(ui).borrow() as literal, lent(ui, caption_syntax="webui").borrow() as prompt:
        plain = "a cat, sitting"
        torch.testing.assert_close(literal.text.embed(plain), prompt.text.embed(plain))
        assert torch.equal(
            prompt.text.embed("a (cat:1.5) BREAK dog"), ui.model.cond_stage_model(["a (cat:1.5) BREAK dog"])
        )
        assert prompt.text.embed("a BREAK dog").shape[1] == 154
        assert literal.text.embed("a BREAK dog").shape[1] == 77
        assert not torch.equal(literal.text.embed("a (cat:1.5)"), prompt.text.embed("a (cat:1.5)"))


@pytest.mark.parametrize("syntax", ["literal", "webui"])
def test_another_layer_than_the_webuis_is_heard(ui, syntax):
    caption = "a cat, sitting" if syntax == "literal" else "a (cat:1.5) BREAK dog"
    ui("shared").opts.CLIP_stop_at_last_layers = 2
    expected = ui.model.cond_stage_model([caption])
    with lent(ui, caption_syntax=syntax).borrow() as model:
        assert torch.equal(model.text.embed(caption), expected)
    ui("shared").opts.CLIP_stop_at_last_layers = 1
    assert not torch.allclose(ui.model.cond_stage_model([caption]), expected, atol=1e-3)
    with lent(ui, caption_syntax=syntax, clip_skip=2).borrow() as model:
        torch.testing.assert_close(model.text.embed(caption), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_captions_encoded_in_the_step_are_what_the_webui_makes_of_them(ui, trained):
    from lora_trainer.training.segment import open_segment

    captions = ("a (cat:1.5), (sitting:0.7) BREAK dog", "cat " * 80 + "(dog:1.3)")
    text = {"caption_syntax": "webui", "train_text_encoder": trained, "mixed_precision": "no"}
    for emphasis in ("Original", "No norm", "Ignore", "None"):
        ui("shared").opts.emphasis = emphasis
        models = lent(ui, **text)
        with models.borrow() as model, open_segment(models.config, model, None) as segment:
            for caption in captions:
                told = {name: tensor[None] for name, tensor in model.text.tokens(caption).items()}
                got = segment.network.encode(told["ids"], told["emphasis"]).context
                torch.testing.assert_close(got, ui.model.cond_stage_model([caption]), rtol=0, atol=1e-5)


def test_an_embedding_in_a_caption_is_refused_where_a_step_encodes_it(ui, monkeypatch):
    from types import SimpleNamespace

    database = ui("sd_hijack").model_hijack.embedding_db
    found = (SimpleNamespace(name="inky", vectors=1), 1)
    monkeypatch.setattr(database, "find_embedding_at_position", lambda tokens, at: found if at == 1 else (None, None))
    with (
        lent(ui, caption_syntax="webui").borrow() as model,
        pytest.raises(DataError, match=r"caption_syntax: .*'a cat'.*'inky'"),
    ):
        model.text.tokens("a cat")


def test_with_medvram_the_parts_are_on_the_device_while_lent_and_not_afterwards(ui, monkeypatch):
    ui("shared").cmd_opts.medvram = True
    ui("sd_models").send_model_to_trash(ui.model)
    ui("sd_models").model_data.set_sd_model(None)
    ui("sd_hijack").model_hijack.clip = None
    ui("sd_models").load_model(ui.info("tiny"))
    assert ui.model.lowvram
    moved = []
    for name in ("model", "first_stage_model", "cond_stage_model"):
        part = getattr(ui.model, name)
        to = part.to
        monkeypatch.setattr(
            part, "to", lambda device, name=name, to=to: moved.append((name, str(device))) or to(device)
        )
    ui.picture()
    moved.clear()
    before = ui.digest()
    with lent(ui).borrow():
        assert {name for name, _ in moved} >= {"model", "first_stage_model", "cond_stage_model"}
        moved.clear()
    assert {name for name, _ in moved} == {"model", "first_stage_model", "cond_stage_model"}
    assert ui.digest() == before
