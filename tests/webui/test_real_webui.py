"""In a real WebUI: the loaded checkpoint is trained on, given back as it was, and the LoRA works in the next prompt.

Runs where WEBUI_DIR names an AUTOMATIC1111 1.10.1 with its venv.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.webui.server import DEMO, TINY, Refused
from tests.webui.snippets import DIGEST, SHARED, UNTIL_DRAWING, WAITED, applied, paced

LORA = "<lora:first:1>"


@pytest.fixture(scope="module")
def trained(webui):
    """A finished job, whose LoRA is called `first`."""
    job = webui.submit(
        output_name="first",
        max_train_steps=12,
        learning_rate=1e-3,
        trigger_words="twemoji emoji",
        save_steps=5,
        sample_prompts=["twemoji emoji of red apple"],
        sample_steps=4,
        sample_guidance=4.0,
        seed=7,
    )
    job = webui.until(job["id"])
    assert job["state"] == "done", (job["error"], webui.log()[-3000:])
    return job


@pytest.fixture(scope="module")
def clean(webui, trained):
    """Digest and picture of the untouched model, and the losses of an undisturbed job."""
    picture = webui.picture()
    digest = webui.run(DIGEST)
    job = webui.until(webui.submit(output_name="plain", max_train_steps=25)["id"])
    assert job["state"] == "done", job["error"]
    return {"picture": picture, "digest": digest, "losses": job["losses"]}


def as_before(webui, clean) -> bool:
    return webui.run(DIGEST) == clean["digest"] and webui.picture() == clean["picture"]


def test_every_tensor_is_shared_and_the_view_is_quick(webui):
    seen = webui.run(SHARED)
    print(seen)
    assert seen["unet"] == [684, 684]
    assert seen["vae"] == [176, 176]
    assert seen["seconds"] < 0.5


def test_only_the_finished_lora_is_among_the_users(webui, trained):
    folder = webui.data / "models" / "Lora"
    assert trained["output"][0] == str(folder / "first.safetensors")
    assert sorted(path.name for path in folder.glob("first*")) == ["first.json", "first.png", "first.safetensors"]
    runs = webui.data / "lora_trainer" / "runs"
    assert [path.name for path in runs.rglob("*step*.safetensors")] == [
        "first-step00000005.safetensors",
        "first-step00000010.safetensors",
    ]
    card = json.loads((folder / "first.json").read_text())
    assert (card["activation text"], card["preferred weight"]) == ("twemoji emoji", 0.8)
    with safe_open(folder / "first.safetensors", "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "emoji-world.safetensors"
    names = [lora["name"] for lora in webui.get("/sdapi/v1/loras")]
    assert names.count("first") == 1
    assert any("192 of 192 modules" in line for line in trained["log"])


def test_it_really_applies(webui, trained):
    seen = webui.run(applied("first"))
    print(seen)
    assert seen["apart"] < 1e-4
    assert seen["effect"] > 10 * 1e-4
    assert seen["effect on the text"] == 0
    assert seen["restored"]
    assert webui.picture(f"noto emoji of red apple {LORA}") != webui.picture("noto emoji of red apple")


def test_a_trained_text_encoder_applies_too_and_is_given_back(webui):
    before = webui.run(DIGEST)
    job = webui.submit(output_name="words", max_train_steps=12, learning_rate=1e-3, train_text_encoder=True)
    job = webui.until(job["id"])
    assert job["state"] == "done", job["error"]
    # The demo's text encoder has three layers.
    assert any("210 of 210 modules" in line for line in job["log"])
    assert webui.run(DIGEST) == before
    seen = webui.run(applied("words"))
    print(seen)
    assert seen["apart"] < 1e-4
    assert seen["effect on the text"] > 10 * 1e-4
    assert seen["restored"]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "ia3", "oft"])
def test_every_kind_of_adapter_applies_with_convolutions_and_text_encoder(webui, kind):
    changes = {"target_modules": ["default", "conv"], "train_text_encoder": True, "save_precision": "fp32"}
    job = webui.submit(output_name=f"kind-{kind}", max_train_steps=6, learning_rate=2e-3, adapter=kind, **changes)
    job = webui.until(job["id"])
    assert job["state"] == "done", job["error"]
    assert any("295 of 295 modules" in line for line in job["log"]), job["log"]
    seen = webui.run(applied(f"kind-{kind}"))
    print(kind, seen)
    assert seen["apart"] < 1e-4
    assert seen["effect"] > 10 * 1e-4
    assert seen["effect on the text"] > 10 * 1e-4
    assert seen["restored"]


def test_a_preview_is_the_users_own_txt2img_from_the_saved_file(webui, trained):
    (preview,) = (webui.data / "lora_trainer" / "runs").rglob("first-step00000012-1.png")
    drawn = webui.picture(f"twemoji emoji of red apple {LORA}")
    assert Image.open(preview).convert("RGB").tobytes() == drawn
    assert drawn != webui.picture("twemoji emoji of red apple")
    # Nothing of it reached the user's outputs, prompt history or networks.
    assert "lora-trainer-preview" not in (webui.data / "params.txt").read_text()
    known = webui.run(
        "import sys; n = sys.modules['networks']; result = [*n.available_networks, *n.networks_in_memory]"
    )
    assert not [name for name in known if "preview" in name]


def test_saved_steps_are_compared_in_a_grid(webui, trained):
    infotext = webui.run(
        "from lora_trainer.hosts.webui.extension import extension\n"
        f"result = extension().grid(extension().jobs.job({trained['id']!r}))"
    )
    assert "X/Y/Z plot" in infotext
    tags = [f"<lora:first-step{step:08}:1>" for step in (5, 10)]
    assert all(tag.replace(":1>", ":0.8>") in infotext for tag in tags)
    drawn = {webui.picture(f"noto emoji of red apple {tag}") for tag in ("", *tags, LORA)}
    assert len(drawn) == 4


def test_a_finished_job_leaves_the_model_as_it_was(webui, clean):
    assert as_before(webui, clean)


def test_a_stopped_job_saves_and_leaves_the_model_as_it_was(webui, clean):
    job = webui.submit(output_name="stopped", max_train_steps=500)
    webui.until(job["id"], step=3)
    webui.post(f"/lora-trainer/v1/jobs/{job['id']}/stop")
    job = webui.until(job["id"])
    assert job["state"] == "stopped"
    assert Path(job["output"][0]).name == "stopped.safetensors"
    assert as_before(webui, clean)


def test_interrupt_stops_and_saves(webui, clean):
    job = webui.submit(output_name="interrupted", max_train_steps=500)
    webui.until(job["id"], step=3)
    webui.post("/sdapi/v1/interrupt")
    job = webui.until(job["id"])
    assert job["state"] == "stopped"
    assert 3 <= job["step"] < 500
    assert as_before(webui, clean)


def test_a_job_that_raises_leaves_the_model_as_it_was(webui, clean):
    webui.run(paced(raise_at=4))
    job = webui.until(webui.submit(output_name="raised", max_train_steps=20)["id"])
    webui.run(paced())
    assert job["state"] == "failed"
    assert "raised by the test" in job["error"]
    assert as_before(webui, clean)
    assert webui.until(webui.submit(output_name="after", max_train_steps=2)["id"])["state"] == "done"


def test_a_merged_lora_is_taken_out_first(webui, clean):
    webui.picture(f"noto emoji of red apple {LORA}")
    assert webui.run(DIGEST) != clean["digest"]
    job = webui.until(webui.submit(output_name="merged", max_train_steps=25)["id"])
    assert job["losses"] == clean["losses"]
    assert webui.run(DIGEST) == clean["digest"]
    assert as_before(webui, clean)


INTERLEAVED = {
    "plain": {},
    "lora": {"prompt": f"noto emoji of taco {LORA}"},
    "embedding": {"prompt": "noto emoji of inky"},
    "refiner": {"refiner_checkpoint": "other", "refiner_switch_at": 0.5},
    "override": {"override_settings": {"sd_model_checkpoint": "other"}},
}


def test_five_generations_in_between_change_nothing(webui, clean):
    alone = {name: webui.picture(**settings) for name, settings in INTERLEAVED.items()}
    assert len(set(alone.values())) == 5
    webui.picture()
    webui.run(paced(seconds=0.05))
    job = webui.submit(output_name="interleaved", max_train_steps=25)
    webui.until(job["id"], step=2)
    steps, drawn = {}, {}
    for name, settings in INTERLEAVED.items():
        drawn[name] = webui.picture(**settings)
        steps[name] = webui.job(job["id"])["step"]
    job = webui.until(job["id"])
    webui.run(paced())
    assert job["state"] == "done", job["error"]
    print(steps)
    assert all(2 <= step < 25 for step in steps.values()), "the generations came after the training"
    assert job["losses"] == clean["losses"]
    assert drawn == alone
    assert as_before(webui, clean)


def test_interrupting_a_generation_is_not_interrupting_the_job(webui, clean):
    webui.run(paced(seconds=0.05))
    job = webui.submit(output_name="spared", max_train_steps=25)
    webui.until(job["id"], step=2)
    thread = threading.Thread(target=lambda: webui.picture(steps=120))
    thread.start()
    assert webui.run(UNTIL_DRAWING) > 3
    webui.post("/sdapi/v1/interrupt")
    thread.join()
    job = webui.until(job["id"])
    webui.run(paced())
    assert (job["state"], job["losses"]) == ("done", clean["losses"])


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, 5000), (1.0, 200)])
def test_who_waits_gets_in_at_the_first_boundary(webui, seconds, steps):
    webui.run(paced(seconds=seconds))
    job = webui.submit(output_name="polite", max_train_steps=steps, batch_size=1, resolution=64)
    webui.until(job["id"], step=1)
    # The update at hand may end while the lock changes hands; never a second one.
    waited = [webui.run(WAITED) for _ in range(50)]
    webui.post(f"/lora-trainer/v1/jobs/{job['id']}/stop")
    job = webui.until(job["id"])
    webui.run(paced())
    print(seconds, waited)
    assert job["state"] == "stopped"
    assert sum(updates <= 1 for updates in waited) == 50


def test_a_second_job_queues_and_another_checkpoint_is_given_back_at_the_end(webui, clean):
    webui.run(paced(seconds=0.05))
    first = webui.submit(output_name="one", max_train_steps=25)
    second = webui.submit(output_name="two", max_train_steps=2)
    webui.until(first["id"], step=2)
    assert webui.job(second["id"])["state"] == "queued"
    # The user chooses another checkpoint: loaded now or later, it is what is there when all is done.
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "other.safetensors"})
    first, second = webui.until(first["id"]), webui.until(second["id"])
    webui.run(paced())
    assert (first["state"], second["state"]) == ("done", "done")
    assert first["losses"] == clean["losses"]
    name = "from modules import sd_models; result = sd_models.model_data.sd_model.sd_checkpoint_info.model_name"
    assert webui.run(name) == "other"
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "emoji-world.safetensors"})
    assert as_before(webui, clean)


def test_clip_skip_and_caption_syntax(webui):
    losses = {}
    for name, settings in {
        "plain": {},
        "skipped": {"clip_skip": 2},
        "webui": {"caption_syntax": "webui"},
    }.items():
        job = webui.until(webui.submit(output_name=f"syntax-{name}", max_train_steps=3, **settings)["id"])
        assert job["state"] == "done", job["error"]
        losses[name] = [loss for _, loss in job["losses"]]
    # The demo's captions have no syntax: the two readings agree, up to the rounding of another encoder.
    assert losses["webui"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["skipped"] != pytest.approx(losses["plain"], abs=1e-4)


def test_reserved_and_taken_names(webui, trained):
    for name in ("none", "Addams", "a:b"):
        try:
            job = webui.until(webui.submit(output_name=name, max_train_steps=1)["id"])
            assert job["state"] == "failed", name
            assert "output_name" in job["error"]
        except Refused as refused:
            assert refused.args[0] == 400
            assert "output_name" in refused.args[1]
    job = webui.until(webui.submit(output_name="first", max_train_steps=1, overwrite=False)["id"])
    assert Path(job["output"][0]).name == "first-2.safetensors"


def test_a_file_that_the_loader_does_not_know_stays_out(webui):
    before = set((webui.data / "models" / "Lora").iterdir())
    webui.run(
        "from lora_trainer.adapters import naming\n"
        "from lora_trainer.adapters import parts\n"
        "KEPT['kohya'] = parts.to_kohya\n"
        "parts.to_kohya = lambda prefix, factors, **k: naming.to_kohya('lora_wrong', factors, **k)\n"
        "result = None"
    )
    job = webui.until(webui.submit(output_name="wrong", max_train_steps=1)["id"])
    webui.run("from lora_trainer.adapters import parts; parts.to_kohya = KEPT['kohya']; result = None")
    assert job["state"] == "failed"
    assert "0 of its 192 modules" in job["error"]
    assert set((webui.data / "models" / "Lora").iterdir()) == before


def test_reload_ui_keeps_the_job(webui, clean):
    webui.run(paced(seconds=0.05))
    job = webui.submit(output_name="reloaded", max_train_steps=25)
    webui.until(job["id"], step=2)
    webui.run("from modules import shared; shared.state.request_restart(); result = None")
    webui.ready()
    seen = webui.job(job["id"])
    assert seen["step"] >= 2
    job = webui.until(job["id"])
    webui.run(paced())
    assert (job["state"], job["losses"]) == ("done", clean["losses"])


def test_access(launch):
    guarded = launch("--api", "--api-auth", "ann:secret", "--listen", "--gradio-auth", "eve:hidden")
    # The caption editor's pass comes with the tab, and so only to who has logged in.
    known = guarded.run("from lora_trainer.hosts.webui.extension import extension; result = extension().editor_pass")
    assert all(known not in guarded.page(path) for path in ("/", "/config"))
    assert known in guarded.page("/config", login=("eve", "hidden"))
    with pytest.raises(Refused, match="403"):
        guarded.post("/lora-trainer/editor/look", {"folder": str(guarded.data)})
    with pytest.raises(Refused, match="401"):
        guarded.get("/lora-trainer/v1/jobs")
    guarded.headers = {"Authorization": "Basic YW5uOnNlY3JldA=="}
    assert guarded.get("/lora-trainer/v1/jobs") == {"jobs": []}
    outside = Path("/etc")
    with pytest.raises(Refused, match="400") as refused:
        guarded.submit(train_data_dir=str(outside))
    print(refused.value)
    inside = guarded.data / "pictures"
    shutil.copytree(DEMO / "twemoji", inside)
    assert guarded.until(guarded.submit(train_data_dir=str(inside), max_train_steps=1)["id"])["state"] == "done"
    guarded.close()
    opened = launch("--api", "--listen")
    with pytest.raises(Refused, match="403") as refused:
        opened.get("/lora-trainer/v1/jobs")
    print(refused.value)
    assert opened.post("/sdapi/v1/txt2img", TINY | {"prompt": "noto emoji of taco"})["images"]
    opened.close()
