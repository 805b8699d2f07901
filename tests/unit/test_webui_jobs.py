"""Whole jobs on a stand-in for the WebUI: what they leave behind, and what others do meanwhile."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_trainer.config import build
from lora_trainer.events import Finished, Notice, Progress, Saved, StepDone
from lora_trainer.training.control import StopOnly
from tests.fake_webui.loras import add_lora

STYLE = "a cat <lora:style:0.7>"
RUNS = itertools.count(1)


@pytest.fixture
def ui(fake_webui):
    """With a LoRA `style` and a VAE `sharp`."""
    add_lora(fake_webui.loras, "style")
    fake_webui.model  # noqa: B018
    return fake_webui


@pytest.fixture
def webui_settings(settings, tmp_path) -> dict:
    """Three steps over four square pictures."""
    return settings | {
        "base_model": "tiny",
        "output_dir": str(tmp_path / "webui" / "lora_trainer" / "runs" / "1"),
        "resolution": 64,
        "epochs": 1,
        "learning_rate": 1e-3,
    }


def train(ui, settings, *, at=None, stop=lambda: False, **changes) -> list:
    """The events of a job. `at(kind, number)` is called on the training's thread, while it holds the queue: after each
    "image" is encoded, and at the end of each "step"."""
    from lora_trainer.training.step import Update

    # Each job has a folder of its own, else one would go on with the one before.
    run = Path(settings["output_dir"]).parent / str(next(RUNS))
    events: list = []
    update, steps = Update.__call__, itertools.count(1)

    def sink(event) -> None:
        events.append(event)
        if at is not None and isinstance(event, Progress) and event.stage == "encoding images":
            at("image", event.done)

    def watched(self) -> None:
        update(self)
        if at is not None:
            at("step", next(steps))

    with patch.object(Update, "__call__", watched):
        finished = ui.host("train").train(build(settings, {"output_dir": str(run)}, changes), sink, StopOnly(stop))
    assert finished == events[-1]
    assert not ui.lock._lock.locked()
    return events


def of(events, kind) -> list:
    return [event for event in events if isinstance(event, kind)]


def losses(events) -> list[float]:
    return [event.loss for event in of(events, StepDone)]


def queued(ui, action) -> threading.Thread:
    """`action` in a thread that waits in the queue now."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not ui.lock._pending_threads:
        assert time.monotonic() < deadline, "it does not wait"
        time.sleep(0.0005)
    return thread


class Meanwhile:
    """One action after another waits in the queue: the first during the encoding, the others during each step."""

    def __init__(self, ui, *actions) -> None:
        self.ui, self.actions = ui, list(actions)
        self.results, self.threads = [], []

    def __call__(self, kind, number) -> None:
        if self.actions and (kind == "step" or number == 2):
            action = self.actions.pop(0)
            self.threads.append(queued(self.ui, lambda: self.results.append(action())))

    def wait(self) -> list:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        return self.results


def test_a_finished_job(ui, webui_settings):
    before, picture = ui.digest(), ui.picture()
    events = train(ui, webui_settings, save_steps=2, trigger_words="tiny thing")
    assert ui.digest() == before
    assert ui.picture() == picture
    assert of(events, Finished)[0].output == [str(ui.loras / "tiny.safetensors")]
    assert sorted(p.name for p in ui.loras.iterdir()) == [
        "style.safetensors",
        "tiny.json",
        "tiny.png",
        "tiny.safetensors",
    ]
    (run,) = Path(webui_settings["output_dir"]).parent.iterdir()
    assert sorted(p.name for p in run.iterdir()) == ["logs", "state", "tiny-step00000002.safetensors", "tiny.yaml"]
    assert json.loads((ui.loras / "tiny.json").read_text(encoding="utf-8"))["activation text"] == "tiny thing"
    assert any("192 of 192 modules" in notice.text for notice in of(events, Notice))
    with safe_open(ui.loras / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_sd_model_name"] == "tiny.safetensors"
    assert metadata["ss_new_sd_model_hash"] == ui.info("tiny").sha256
    # The next prompt can use it.
    assert ui.networks.available_networks["tiny"].filename == str(ui.loras / "tiny.safetensors")
    assert ui.picture("a cat <lora:tiny:1>") != picture


def test_it_trains_on_what_the_webui_has_loaded_as_on_the_file(ui, webui_settings, webui_checkpoints, tmp_path):
    from lora_trainer.hosts import standalone

    here = train(ui, webui_settings)
    alone: list = []
    settings = webui_settings | {"base_model": str(webui_checkpoints / "tiny.safetensors"), "device": "cpu"}
    standalone.train(build(settings | {"output_dir": str(tmp_path / "alone")}), alone.append)
    assert len(losses(here)) == 3
    assert losses(here) == losses(alone)


def test_a_stopped_job_saves_and_leaves_the_model_as_it_was(ui, webui_settings):
    before, seen = ui.digest(), []
    events = train(
        ui, webui_settings, epochs=50, at=lambda *moment: seen.append(moment), stop=lambda: ("step", 2) in seen
    )
    finished = of(events, Finished)[0]
    assert (finished.state, finished.steps, len(losses(events))) == ("stopped", 2, 2)
    assert (ui.loras / "tiny.safetensors").is_file()
    assert ui.digest() == before


def test_a_job_that_raises_leaves_the_model_as_it_was(ui, webui_settings):
    before = ui.digest()

    def second(kind, number) -> None:
        if (kind, number) == ("step", 2):
            raise RuntimeError("by the test")

    with pytest.raises(RuntimeError, match="by the test"):
        train(ui, webui_settings, at=second)
    assert ui.digest() == before
    assert not ui.lock._lock.locked()
    assert (ui.state.job, ui.state.job_count) == ("", 0)
    assert [p.name for p in ui.loras.iterdir()] == ["style.safetensors"]
    assert of(train(ui, webui_settings), Finished)[0].state == "done"


def test_a_lora_of_the_last_prompt_is_taken_out_first(ui, webui_settings):
    before, plain = ui.digest(), losses(train(ui, webui_settings))
    styled = ui.picture(STYLE)
    assert ui.digest() != before
    events = train(ui, webui_settings)
    assert losses(events) == plain
    assert any("taken out" in notice.text for notice in of(events, Notice))
    assert ui.digest() == before
    assert ui.picture(STYLE) == styled


DISTURBANCES = {
    "plain": lambda ui: ui.picture("a dog"),
    "lora": lambda ui: ui.picture(STYLE),
    "other, and back": lambda ui: (ui.choose("other"), ui.choose("tiny")),
    "other for one picture": lambda ui: ui.picture(override_settings={"sd_model_checkpoint": "other"}),
    "other with a lora": lambda ui: ui.picture(STYLE, override_settings={"sd_model_checkpoint": "other"}),
    "refined by other": lambda ui: ui.picture(refiner_checkpoint="other", refiner_switch_at=0.5),
}


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_what_others_do_in_between_changes_no_loss(ui, webui_settings, kind):
    before, undisturbed = ui.digest(), train(ui, webui_settings)
    expected = DISTURBANCES[kind](ui)
    ui.picture()
    meanwhile = Meanwhile(ui, *[lambda: DISTURBANCES[kind](ui)] * 3)
    disturbed = train(ui, webui_settings, at=meanwhile)
    assert meanwhile.wait() == [expected] * 3
    assert losses(disturbed) == losses(undisturbed)
    # The next prompt without a LoRA, and with the chosen checkpoint.
    ui.picture()
    assert ui.digest() == before


def test_another_checkpoint_that_the_user_leaves_there_is_there_in_the_end(ui, webui_settings):
    before, undisturbed = ui.digest(), train(ui, webui_settings)
    meanwhile = Meanwhile(ui, lambda: ui.choose("other"))
    disturbed = train(ui, webui_settings, at=meanwhile)
    meanwhile.wait()
    assert losses(disturbed) == losses(undisturbed)
    assert any("tiny.safetensors is loaded again" in notice.text for notice in of(disturbed, Notice))
    with safe_open(ui.loras / "tiny-2.safetensors", "pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "tiny.safetensors"
    assert ui.model.sd_checkpoint_info.name == "other.safetensors"
    assert ui("shared").opts.sd_model_checkpoint == ui.info("other").title
    ui.choose("tiny")
    assert ui.digest() == before


def test_with_two_checkpoints_kept_the_other_is_another_module(ui, webui_settings):
    undisturbed = train(ui, webui_settings)
    ui("shared").opts.sd_checkpoints_limit = 2
    before, tiny = ui.digest(), ui.model
    meanwhile = Meanwhile(ui, *[lambda: ui.choose("other")] * 3)
    disturbed = train(ui, webui_settings, at=meanwhile)
    meanwhile.wait()
    assert losses(disturbed) == losses(undisturbed)
    assert ui.model is not tiny
    ui.choose("tiny")
    assert ui.model is tiny
    assert ui.digest() == before


def test_interrupting_a_generation_in_between_spares_the_job(ui, webui_settings):
    undisturbed = train(ui, webui_settings)
    drawn = []

    def interrupted() -> None:
        callbacks = ui("script_callbacks")
        callbacks.on_cfg_denoiser(lambda params: ui.state.interrupt() if params.sampling_step == 1 else None)
        ui.draw(steps=4)
        drawn.append(ui.state.sampling_step)
        callbacks.callback_map["callbacks_cfg_denoiser"].clear()

    meanwhile = Meanwhile(ui, interrupted)
    disturbed = train(ui, webui_settings, at=meanwhile)
    meanwhile.wait()
    assert of(disturbed, Finished)[0].state == "done"
    assert losses(disturbed) == losses(undisturbed)


def test_interrupting_the_job_stops_and_saves(ui, webui_settings):
    before = ui.digest()

    def second(kind, number) -> None:
        if (kind, number) == ("step", 2):
            ui.state.interrupt()

    events = train(ui, webui_settings, epochs=50, at=second)
    finished = of(events, Finished)[0]
    assert (finished.state, finished.steps) == ("stopped", 2)
    assert finished.output == [str(ui.loras / "tiny.safetensors")]
    assert ui.digest() == before
    # It was the job's: the next picture is whole.
    assert ui.draw() is not None


def test_reload_ui_is_no_interrupt(ui, webui_settings):
    ui.host("interrupt").watch_reloads()

    def second(kind, number) -> None:
        if (kind, number) == ("step", 2):
            ui.state.request_restart()

    events = train(ui, webui_settings, at=second)
    assert of(events, Finished)[0].state == "done"
    assert ui.state.server_command == "restart"


def test_the_progress_bar_shows_the_job_again_after_others(ui, webui_settings, monkeypatch):
    monkeypatch.setattr("lora_trainer.training.results.READ_EVERY_SECONDS", 60)
    shown = []

    def look(kind, number) -> None:
        shown.append((ui.state.job, ui.state.job_no, ui.state.job_count, ui.state.textinfo))
        meanwhile(kind, number)

    meanwhile = Meanwhile(ui, *[lambda: ui.picture(STYLE)] * 3)
    train(ui, webui_settings, at=look)
    meanwhile.wait()
    # The bar is told of an image when it is encoded; what it showed, it shows again after the pictures.
    assert shown[1:] == [("LoRA training", min(n, 6), 6, "encoding images") for n in range(1, 9)]


def test_previews_are_the_users_own_pictures_from_the_file(ui, webui_settings):
    before = ui.digest()
    ui.picture(STYLE)
    sampling = {"sample_prompts": ["a cat", "a dog"], "sample_every": 2, "sample_steps": 2, "sample_guidance": 4.0}
    events = train(ui, webui_settings, seed=5, **sampling)
    assert ui.digest() == before
    pictures = {
        Path(e.path).name: Image.open(e.path).convert("L").tobytes() for e in of(events, Saved) if e.kind == "sample"
    }
    assert sorted(pictures) == [f"tiny-step{step:08}-{n}.png" for step in (2, 3) for n in (1, 2)]
    assert len(set(pictures.values())) == 4
    from_file = ui.picture("a cat <lora:tiny:1>", seed=5, cfg_scale=4.0)
    assert pictures["tiny-step00000003-1.png"] == from_file
    assert (ui.data / "params.txt").read_text() == "a cat <lora:tiny:1>"
    assert not [
        name for name in (*ui.networks.available_networks, *ui.networks.networks_in_memory) if "preview" in name
    ]
    assert losses(events) == losses(train(ui, webui_settings, seed=5))


@pytest.mark.parametrize("syntax", ["literal", "webui"])
def test_a_trained_text_encoder_is_given_back_as_it_was(ui, webui_settings, syntax):
    def made() -> list:
        """The host's modules, with what hangs on each."""
        return [(type(m), sorted(vars(m)), [*m._forward_hooks], [*m._backward_hooks]) for m in ui.model.modules()]

    before, picture = ui.digest(), ui.picture()
    ui.picture(STYLE)
    as_made = made()
    text = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "caption_syntax": syntax}
    sampling = {"sample_prompts": ["a cat"], "sample_every": 2, "sample_steps": 2, "sample_guidance": 4.0}
    meanwhile = Meanwhile(ui, *[lambda: ui.picture(STYLE)] * 3)
    events = train(ui, webui_settings, seed=5, at=meanwhile, **text, **sampling)
    meanwhile.wait()
    assert ui.digest() == before
    assert ui.picture() == picture
    assert any("198 of 198 modules" in notice.text for notice in of(events, Notice))
    assert made() == as_made
    assert not any(p.requires_grad or p.grad is not None for p in ui.model.cond_stage_model.parameters())
    previews = [Image.open(e.path).convert("L").tobytes() for e in of(events, Saved) if e.kind == "sample"]
    assert previews[-1] == ui.picture("a cat <lora:tiny:1>", seed=5, cfg_scale=4.0)
    assert losses(events) == losses(train(ui, webui_settings, seed=5, **text))
    # Without what the text encoder learned the picture is another.
    lora = load_file(ui.loras / "tiny.safetensors")
    unet = {name: tensor for name, tensor in lora.items() if not name.startswith("lora_te_")}
    save_file(unet, ui.loras / "unet.safetensors")
    assert ui.picture("a cat <lora:unet:1>", seed=5, cfg_scale=4.0) != previews[-1]


@pytest.mark.parametrize("syntax", ["literal", "webui"])
def test_captions_that_are_shuffled_are_encoded_in_the_step_while_others_draw(ui, webui_settings, syntax):
    tags = "(alpha, beta:1.3), gamma, [delta], epsilon, zeta BREAK eta, theta, iota"
    folder = Path(webui_settings["train_data_dir"])
    (folder / "metadata.csv").write_text("".join(f'p{n}.png,"{tags}"\n' for n in range(6)), encoding="utf-8")
    before = ui.digest()
    captions = {"shuffle_captions": True, "caption_dropout": 0.2, "caption_syntax": syntax}
    meanwhile = Meanwhile(ui, *[lambda: ui.picture(STYLE)] * 3)
    events = train(ui, webui_settings, at=meanwhile, **captions)
    meanwhile.wait()
    assert ui.digest() == before
    assert any("so the text encoder runs in each step" in notice.text for notice in of(events, Notice))
    assert not any(p.grad is not None for p in ui.model.cond_stage_model.parameters())
    assert losses(events) == losses(train(ui, webui_settings, **captions))
    assert losses(events) != losses(train(ui, webui_settings, **{**captions, "seed": 7}))
