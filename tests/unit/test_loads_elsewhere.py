"""The file as others read it: diffusers' `load_lora_weights` draws the trainer's own picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import USE_PEFT_BACKEND

from lora_trainer.cli import main
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.latents import latent_shape
from lora_trainer.models.text import TOKENIZER_FOLDER
from lora_trainer.sampling import Recipe, apply_lora, denoise, generate, scheduler, start
from lora_trainer.training.precision import Precision

CPU = torch.device("cpu")
PROMPT = "a picture of nothing"
RECIPE = Recipe((64, 64), steps=4, guidance=3.0, seed=1)


@pytest.fixture(params=[False, True], ids=["unet", "both networks"])
def lora(settings, capsys, request) -> dict[str, Path]:
    """A LoRA strong enough to see, in both forms."""
    changes = {"learning_rate": 0.1, "epochs": 8, "lora_dropout": 0, "output_format": "both", "lora_alpha": 3}
    changes["train_text_encoder"] = request.param
    assert main(["train", *(f"{k}={v}" for k, v in {**settings, **changes}.items()), "--json"]) == 0
    webui, diffusers = json.loads(capsys.readouterr().out)["output"]
    return {"webui": Path(webui), "diffusers": Path(diffusers)}


def pipeline(model) -> StableDiffusionPipeline:
    from transformers import CLIPTokenizer

    return StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text.module,
        tokenizer=CLIPTokenizer.from_pretrained(str(TOKENIZER_FOLDER)),
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(scheduler(model.noise).config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="these diffusers and transformers have no PEFT backend")
@pytest.mark.parametrize("form", ["webui", "diffusers"])
def test_diffusers_draws_the_same_picture(settings, lora, form, caplog, request):
    base, precision = Path(settings["base_model"]), Precision(CPU, torch.float32)
    mine = open_model(base, CPU)
    plain = denoise(mine, PROMPT, RECIPE, precision)
    apply_lora(mine, lora["webui"])
    styled = denoise(mine, PROMPT, RECIPE, precision)

    theirs = open_model(base, CPU)
    pipe = pipeline(theirs)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora[form].parent), weight_name=lora[form].name)
    assert not any("unexpected keys" in record.message for record in caplog.records)
    found = [len([m for m in net.modules() if hasattr(m, "lora_A")]) for net in (theirs.unet, theirs.text.module)]
    assert found == [48, 6 if "both" in request.node.name else 0]
    latents = pipe(
        PROMPT,
        width=64,
        height=64,
        latents=start(RECIPE, latent_shape(theirs.vae, 64, 64)),
        num_inference_steps=RECIPE.steps,
        guidance_scale=RECIPE.guidance,
        output_type="latent",
    ).images
    assert (latents - styled).abs().max() < 1e-3
    assert (styled - plain).abs().max() > 1e-2


def test_weight_zero_is_the_base_and_half_is_between(settings, lora):
    model = open_model(Path(settings["base_model"]), CPU)
    precision = Precision(CPU, torch.float32)
    (plain,) = generate(model, [PROMPT], RECIPE, precision)
    adapter = apply_lora(model, lora["webui"])
    (full,) = generate(model, [PROMPT], RECIPE, precision)
    with adapter.weight(0.0):
        (zero,) = generate(model, [PROMPT], RECIPE, precision)
    with adapter.weight(0.5):
        (half,) = generate(model, [PROMPT], RECIPE, precision)
    (again,) = generate(model, [PROMPT], RECIPE, precision)
    assert zero.tobytes() == plain.tobytes()
    assert again.tobytes() == full.tobytes()
    assert len({plain.tobytes(), half.tobytes(), full.tobytes()}) == 3
