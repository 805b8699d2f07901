"""In a real WebUI: each kind of adapter on each family is trained, saved, loaded by its own network code, and applied.

Runs where WEBUI_DIR names an AUTOMATIC1111 1.10.1 with its venv. `tests/unit/test_adapter_table.py` compares what it
recorded.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import cache

import pytest

from tests.webui.adapter_table import FAMILIES, KINDS, goldens, layout, made, record
from tests.webui.server import WORLD
from tests.webui.snippets import applied_to_any
from tests.webui.test_families import choose


def stem(family: str) -> str:
    return "table-" + "".join(c for c in family.lower() if c.isalnum())


@pytest.fixture(scope="module")
def ui(webui):
    """With the checkpoints of FAMILIES, and the demo's chosen again at the end."""
    models = webui.data / "models"
    # Heads of 64 channels, which our reader takes where no config says otherwise.
    clip = shutil.copytree(models / "clip", models / "clip-64")
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"num_attention_heads": 1}))
    for name, family in FAMILIES.items():
        family.write(models / "Stable-diffusion", stem(name), clip)
    webui.post("/sdapi/v1/refresh-checkpoints")
    yield webui
    choose(webui, WORLD)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return cache(lambda name: FAMILIES[name].checkpoint(tmp_path_factory.mktemp(stem(name))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_applies(ui, name, kind):
    choose(ui, stem(name))
    output = f"{stem(name)}-{KINDS[kind]['adapter']}{KINDS[kind].get('conv_rank', '')}"
    # Its torch multiplies no halves on a CPU: LoHa and LoKr of 16 bits do nothing there.
    rates = {"learning_rate": 2e-2, "text_encoder_lr": 2e-2, "ema_decay": 0.0, "save_precision": "fp32"}
    rates |= {"loraplus_lr_ratio": 1}
    job = ui.submit(output_name=output, max_train_steps=2, resolution=64, seed=7, **rates, **KINDS[kind])
    job = ui.until(job["id"])
    assert job["state"] == "done", (job["error"], ui.log()[-3000:])
    (checked,) = {line.partition("loader: ")[2] for line in job["log"] if "modules apply" in line}
    known, _, rest = checked.partition(" of ")
    assert rest.startswith(f"{known} modules")
    seen = ui.run(applied_to_any(output))
    print(f"{name}, {kind}: {known} modules, apart {seen['apart']:.1e}, effect {seen['effect']:.1e}")
    assert seen["apart"] < 1e-4
    assert seen["apart at half"] < 1e-4
    assert min(seen["effect"], seen["effect on the text"], seen["effect of the UNet"]) > 1e-3
    assert seen["restored"]
    # Where it cannot apply a module, it only counts that.
    errors = "import sys; result = sys.modules['networks'].extra_network_lora.errors"
    assert output not in ui.run(errors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_recorded_is_what_it_answers(ui, checkpoints, name, kind):
    choose(ui, stem(name))
    data, _ = made(checkpoints(name), kind)
    lora = f"made-{stem(name)}-{KINDS[kind]['adapter']}{KINDS[kind].get('conv_rank', '')}"
    (ui.data / "models" / "Lora" / f"{lora}.safetensors").write_bytes(data)
    seen = ui.run(applied_to_any(lora))
    assert seen["apart"] < 1e-4
    found = {"layout": layout(data), "answer": [round(value, 6) for value in seen["answer"]]}
    if os.environ.get("RECORD_GOLDENS"):
        record(name, kind, found)
    known = goldens()[name][kind]
    assert found["layout"] == known["layout"]
    assert found["answer"] == pytest.approx(known["answer"], abs=1e-5)
