"""In a real WebUI: Stable Diffusion 3 is trained on and given back, and its LoRAs apply.

Runs where WEBUI_DIR names an AUTOMATIC1111 1.10.1 with its venv. Its text encoders and VAE have fixed sizes there, and
its tokenizers are downloaded: the test makes the former small and brings the latter along. All else is the WebUI's own.
"""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.tiny_sd3 import CLIP, FIRST, SECOND, WIDTHS, tiny_sd3_state
from tests.webui.server import WORLD
from tests.webui.snippets import DIGEST, VIEWED, applied_to_any, compared
from tests.webui.test_families import choose

NAME, PROMPT = "tiny-sd3", "twemoji emoji of red apple"
EMBEDDING = "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"
T5 = {"d_ff": 64, "d_model": 4096, "num_heads": 2, "num_layers": 1, "vocab_size": 64}

SMALL = """
from functools import partial
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, T5TokenizerFast
from modules import paths
from modules.models.sd3 import other_impls, sd3_cond, sd3_impls
class Clip:
    @staticmethod
    def from_pretrained(name):
        return CLIPTokenizer.from_pretrained(str(Path(paths.models_path) / "clip"))
class Letters:
    @staticmethod
    def from_pretrained(name):
        words = ["<pad>", "</s>", "<unk>", *"\u2581abcdefghijklmnopqrstuvwxyz,()"]
        inner = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return T5TokenizerFast(tokenizer_object=inner, extra_ids=0)
for module in (sd3_cond, other_impls):
    module.CLIPTokenizer, module.T5TokenizerFast = Clip, Letters
for config, width in ((sd3_cond.CLIPL_CONFIG, WIDTHS[0]), (sd3_cond.CLIPG_CONFIG, WIDTHS[1])):
    config.update(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
                  num_hidden_layers=LAYERS)
sd3_cond.T5_CONFIG.update(T5)
for half in ("VAEEncoder", "VAEDecoder"):
    small = partial(getattr(sd3_impls, half), ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    setattr(sd3_impls, half, small)
result = None
"""

# Its file holds one tensor of it, so the others are random.
SPEAK = """
import torch
from modules import sd_models
from modules.call_queue import queue_lock
with queue_lock, torch.no_grad():
    torch.manual_seed(0)
    t5 = sd_models.model_data.sd_model.text_encoders.t5xxl
    for parameter in t5.parameters():
        parameter.normal_(0, 0.05)
result = sum(p.numel() for p in t5.parameters())
"""

# What a step would be told of a caption that was not encoded ahead.
LIVE = VIEWED.replace(
    "SNIPPET",
    """
    try:
        result = str(view_of(sd_model, config()).text.tokens("a cat"))
    except Exception as error:
        result = str(error)
""",
)


@pytest.fixture(scope="module")
def ui(webui):
    """With a tiny Stable Diffusion 3 chosen, and the demo's again at the end."""
    embedding = torch.randn(T5["vocab_size"], T5["d_model"], generator=torch.Generator().manual_seed(1))
    models = webui.data / "models" / "Stable-diffusion"
    save_file(tiny_sd3_state() | {EMBEDDING: embedding}, models / f"{NAME}.safetensors")
    widths = repr([WIDTHS[FIRST], WIDTHS[SECOND]])
    small = SMALL.replace("WIDTHS", widths).replace("LAYERS", str(CLIP["num_hidden_layers"]))
    webui.run(small.replace("update(T5)", f"update({T5!r})"))
    webui.post("/sdapi/v1/refresh-checkpoints")
    webui.post("/sdapi/v1/options", {"show_progress_type": "Approx cheap"})
    choose(webui, NAME)
    yield webui
    choose(webui, WORLD)


def test_the_view_is_the_loaded_model(ui):
    seen = ui.run(compared())
    print(seen)
    for mine, all_of_them in seen["shared"].values():
        assert mine == all_of_them > 30
    assert seen["said apart"] == seen["pooled apart"] == 0
    assert seen["viewed apart"] < 1e-5
    assert seen["answered apart"] < 1e-5
    assert seen["answers"] > 1e-2
    assert (seen["family"], seen["prediction"]) == ("Stable Diffusion 3", "flow")


def test_training_on_it(ui):
    before, plain = ui.run(DIGEST), ui.picture(PROMPT)
    job = ui.submit(
        output_name="on-sd3",
        max_train_steps=6,
        learning_rate=1e-2,
        resolution=64,
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
    seen = ui.run(applied_to_any("on-sd3"))
    print(seen)
    assert seen["unmatched"] == []
    assert seen["apart"] < 1e-4 < seen["effect of the UNet"] / 10
    assert seen["effect on the text"] == 0
    assert seen["restored"]
    with safe_open(ui.data / "models" / "Lora" / "on-sd3.safetensors", "pt") as file:
        assert not any("alpha" in name for name in file.keys())  # noqa: SIM118 (not a mapping)
    card = json.loads((ui.data / "models" / "Lora" / "on-sd3.json").read_text())
    assert card["sd version"] == "Unknown"
    (preview,) = (ui.data / "lora_trainer" / "runs").rglob("on-sd3-step*-1.png")
    drawn = ui.picture(f"{PROMPT} <lora:on-sd3:1>", width=64, height=64)
    assert Image.open(preview).convert("RGB").tobytes() == drawn


def test_what_does_not_suit_it_is_refused(ui):
    job = ui.until(ui.submit(output_name="no", min_snr_gamma=5, train_text_encoder=True)["id"])
    assert job["state"] == "failed"
    assert "min_snr_gamma" in job["error"]
    assert "train_text_encoder" in job["error"]


def test_t5_is_heard_where_it_is_on(ui):
    ui.post("/sdapi/v1/options", {"sd3_enable_t5": True})
    try:
        choose(ui, WORLD)
        choose(ui, NAME)
        assert ui.run(SPEAK) > 0
        seen = ui.run(compared(views=False))
        print(seen)
        assert seen["said apart"] == seen["pooled apart"] == 0
        assert any("T5-XXL, which is on" in line for line in seen["notices"])
        job = ui.until(ui.submit(output_name="t5", max_train_steps=2, learning_rate=1e-2, resolution=64)["id"])
        assert job["state"] == "done", (job["error"], ui.log()[-3000:])
        assert "Enable T5: expected the WebUI's setting off" in ui.run(LIVE)
    finally:
        ui.post("/sdapi/v1/options", {"sd3_enable_t5": False})
        choose(ui, WORLD)
        choose(ui, NAME)
