"""The fold "Caption the pictures": what a click asks for, and a run as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lora_trainer.captioning.options import build, caption_options
from lora_trainer.captioning.service import CaptionView
from lora_trainer.errors import DataError
from lora_trainer.ui import captioning
from lora_trainer.ui.captioning import CAPTIONERS, FOLDER, LABELS, SHARED, Handlers, status
from tests.unit.test_ui import EVIL, FakeHost, Wellformed, changes


@dataclass
class FakeCaptioning:
    view: CaptionView = field(default_factory=CaptionView)
    asked: list[dict[str, object]] = field(default_factory=list)
    missing: tuple[str, ...] = ()
    stopped: int = 0

    def caption(self, settings: dict[str, object]) -> None:
        if not settings["train_data_dir"]:
            raise DataError(f"{EVIL}: no such folder")
        self.asked.append(settings)
        self.view = CaptionView(state="running")

    def downloads(self, captioner: str) -> list[str]:
        return [*self.missing] if captioner == "blip" else []

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def host() -> FakeHost:
    found = FakeHost()
    found.captioning = FakeCaptioning()
    return found


DEFAULTS = [caption_options()[key].default for key in LABELS]
BLIP, BOORU, _ = CAPTIONERS


def test_a_click_captions_what_the_tab_names(host):
    handlers = Handlers(host, changes)
    _, html, begin, stop = handlers.begin(BOORU, "", True, *DEFAULTS, ' "C:\\my pictures" ', "", "sks")
    assert 'data-active="1"' in html
    assert (begin, stop) == ({"interactive": False}, {"interactive": True})
    (asked,) = host.captioning.asked
    assert asked["captioner"] == "deepbooru"
    assert (asked["train_data_dir"], asked["metadata_path"], asked["trigger_words"]) == ("C:\\my pictures", "", "sks")
    assert set(asked) == {*LABELS, *SHARED, "captioner"}
    # What the controls send untouched is what the declaration says.
    options = build({key: value for key, value in asked.items() if key not in ("train_data_dir", "metadata_path")})
    assert [getattr(options, key) for key in LABELS] == DEFAULTS
    handlers.begin(FOLDER, ' "/taggers/wd" ', False, *DEFAULTS, "/pictures", "/pictures/x.csv", "sks")
    asked = host.captioning.asked[-1]
    assert (asked["captioner"], asked["trigger_words"], asked["metadata_path"]) == (
        "/taggers/wd",
        "",
        "/pictures/x.csv",
    )


def test_a_refusal_stays_while_the_tab_looks_again(host):
    handlers = Handlers(host, changes)
    message, html, begin, _ = handlers.begin(BLIP, "", False, *DEFAULTS, "", "", "")
    assert "Not captioned." in message
    assert "img" not in Wellformed(message).seen
    assert "Not captioned." not in html
    assert begin == {"interactive": True}
    assert len(handlers.look()) == len([html, begin, begin])


def test_stop_and_what_a_choice_needs(host):
    handlers = Handlers(host, changes)
    handlers.stop()
    assert host.captioning.stopped == 1
    host.captioning.missing = ("model.pth (about 0.9 GB)",)
    note, folder = handlers.chosen(BLIP)
    assert "Not here yet: model.pth (about 0.9 GB)" in note
    assert folder == {"visible": False}
    note, folder = handlers.chosen(FOLDER)
    assert "Not here" not in note
    assert folder == {"visible": True}


@pytest.mark.parametrize("state", ["running", "stopping", "done", "stopped", "failed"])
def test_a_run_in_every_state_is_escaped_and_well_formed(state):
    view = CaptionView(state, done=30, total=120, eta=90.0, log=(EVIL,) * 9, end=EVIL)
    html = status(view)
    assert "img" not in Wellformed(html).seen
    assert html.count("<li>") == captioning.SHOWN
    assert "30 of 120 pictures" in html
    assert ("1 min 30 s left" in html) == (state == "running")
    assert f'data-active="{int(view.active)}"' in html
    assert ("width:25.0%" in html) == view.active


def test_before_a_run_and_while_it_waits():
    assert captioning.HELP in status(CaptionView())
    assert "waiting for its turn" in status(CaptionView("running"))


def test_every_option_has_a_control_or_a_reason():
    assert set(caption_options()) - set(LABELS) == {"captioner", "trigger_words", "character_threshold", "device"}


def test_the_blocks_have_the_fold_and_ask_the_host_nothing():
    pytest.importorskip("gradio")
    from lora_trainer.ui.tab import build as build_tab

    # Without a captioning: it is not asked.
    blocks = build_tab(FakeHost())
    made = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    for key in LABELS:
        control = made[f"lora_trainer_caption_{key}"]
        assert (control.label, control.value) == (LABELS[key], caption_options()[key].default)
    assert {"lora_trainer_caption_begin", "lora_trainer_caption_stop", "lora_trainer_captions"} <= set(made)
