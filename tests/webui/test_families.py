"""In a real WebUI: checkpoints of SDXL, its relatives and Stable Diffusion 2.x are trained on and given back, and their
LoRAs apply.

Runs where WEBUI_DIR names an AUTOMATIC1111 1.10.1 with its venv.
"""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors import safe_open

from tests.webui.families import UNET_SSD, UNET_VEGA, write_2, write_inpainting, write_refiner, write_xl
from tests.webui.server import WORLD
from tests.webui.snippets import DIGEST, IN_FP8, applied_to_any, compared, scored

# name: (family, prediction, version on the card)
CASES = {
    "tiny-xl": ("SDXL", "epsilon", "SDXL"),
    "tiny-xl-v": ("SDXL", "v", "SDXL"),
    "tiny-ssd": ("SSD-1B or Segmind Vega", "epsilon", "SDXL"),
    "tiny-vega": ("SSD-1B or Segmind Vega", "epsilon", "SDXL"),
    "tiny-refiner": ("SDXL refiner", "epsilon", "SDXL"),
    "tiny-2": ("Stable Diffusion 2.x", "epsilon", "SD2"),
    "tiny-2-v": ("Stable Diffusion 2.x", "v", "SD2"),
    "tiny-holes": ("Stable Diffusion 1.x", "epsilon", "SD1"),
}
PROMPT = "twemoji emoji of red apple"


@pytest.fixture(scope="module")
def ui(webui):
    """With the checkpoints of CASES, and the demo's chosen again at the end."""
    models, clip = webui.data / "models" / "Stable-diffusion", webui.data / "models" / "clip"
    write_xl(models, "tiny-xl", clip)
    write_xl(models, "tiny-xl-v", clip, v=True, keys=("v_pred", "ztsnr"))
    write_xl(models, "tiny-ssd", clip, unet=UNET_SSD)
    write_xl(models, "tiny-vega", clip, unet=UNET_VEGA)
    write_refiner(models, "tiny-refiner")
    write_2(models, "tiny-2")
    write_2(models, "tiny-2-v", v=True)
    write_inpainting(models, "tiny-holes", clip)
    webui.post("/sdapi/v1/refresh-checkpoints")
    # What it shows of a picture in the making needs a download for SDXL.
    webui.post("/sdapi/v1/options", {"show_progress_type": "Approx cheap"})
    yield webui
    choose(webui, WORLD)


def choose(ui, name: str, **settings: object) -> None:
    ui.post("/sdapi/v1/options", {"sd_model_checkpoint": f"{name}.safetensors", **settings})
    chosen = ui.run("from modules import sd_models; result = sd_models.model_data.sd_model.sd_checkpoint_info.name")
    assert chosen == f"{name}.safetensors", ui.log()[-3000:]


@pytest.mark.parametrize("name", CASES)
def test_the_view_is_the_loaded_model(ui, name):
    choose(ui, name)
    seen = ui.run(compared())
    print(seen)
    for mine, all_of_them in seen["shared"].values():
        assert mine == all_of_them > 50
    assert seen["said apart"] == seen["pooled apart"] == seen["told apart"] == 0
    # A view of OpenCLIP rounds otherwise than torch's packed attention.
    assert seen["viewed apart"] < 1e-5
    assert seen["answered apart"] < 1e-5
    assert seen["answers"] > 1e-2
    assert (seen["family"], seen["prediction"]) == CASES[name][:2]


def test_a_refiner_is_trained_with_the_scores_that_the_webui_draws_with(ui):
    choose(ui, "tiny-refiner", sdxl_refiner_high_aesthetic_score=7.5, sdxl_refiner_low_aesthetic_score=1.5)
    try:
        seen = ui.run(scored())
    finally:
        choose(ui, "tiny-refiner", sdxl_refiner_high_aesthetic_score=6.0, sdxl_refiner_low_aesthetic_score=2.5)
    assert seen == {"apart": [0, 0], "told": [[64, 128, 0, 0, 1.5], [64, 128, 0, 0, 7.5]], "limit": 200}


@pytest.mark.parametrize("name", CASES)
def test_training_on_it(ui, name):
    choose(ui, name)
    before, plain = ui.run(DIGEST), ui.picture(PROMPT)
    job = ui.submit(
        output_name=f"on-{name}",
        max_train_steps=6,
        learning_rate=1e-2,
        resolution=64,
        train_text_encoder=True,
        target_modules=["default", "conv"],
        trigger_words="twemoji emoji",
        sample_prompts=[PROMPT],
        sample_steps=4,
        sample_guidance=4.0,
        seed=7,
    )
    job = ui.until(job["id"])
    assert job["state"] == "done", (job["error"], ui.log()[-3000:])
    print([line for line in job["log"] if "modules apply" in line])
    assert ui.run(DIGEST) == before
    assert ui.picture(PROMPT) == plain
    seen = ui.run(applied_to_any(f"on-{name}"))
    print(seen)
    assert seen["apart"] < 1e-4
    assert min(seen["effect"], seen["effect on the text"], seen["effect of the UNet"]) > 10 * 1e-4
    assert (CASES[name][2] == "SDXL") == (seen["effect on the pooled"] > 1e-3)
    assert seen["restored"]
    assert seen["version"] == CASES[name][2]
    card = json.loads((ui.data / "models" / "Lora" / f"on-{name}.json").read_text())
    assert card["sd version"] == CASES[name][2]
    with safe_open(ui.data / "models" / "Lora" / f"on-{name}.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == CASES[name][1]
    (preview,) = (ui.data / "lora_trainer" / "runs").rglob(f"on-{name}-step*-1.png")
    drawn = ui.picture(f"{PROMPT} <lora:on-{name}:1>", width=64, height=64)
    assert Image.open(preview).convert("RGB").tobytes() == drawn


def test_a_base_that_the_webui_stores_in_fp8_is_trained_on_as_it_is_stored(ui):
    choose(ui, WORLD, fp8_storage="Enable")
    try:
        weights, read, stored = ui.run(IN_FP8)
        print(weights, read, stored)
        assert weights == read == stored > 200
        before, plain = ui.run(DIGEST), ui.picture(PROMPT)
        given = {"output_name": "on-fp8", "max_train_steps": 6, "resolution": 64}
        for trained in (False, True):
            job = ui.until(ui.submit(**given, learning_rate=1e-2, train_text_encoder=trained)["id"])
            assert job["state"] == "done", (job["error"], ui.log()[-3000:])
            assert any("kept in fp8" in line for line in job["log"])
            assert ui.run(DIGEST) == before
            assert ui.picture(PROMPT) == plain
            assert ui.picture(f"{PROMPT} <lora:on-fp8:1>") != plain
    finally:
        choose(ui, WORLD, fp8_storage="Disable")
