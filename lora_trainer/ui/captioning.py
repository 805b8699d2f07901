"""The fold "Caption the pictures": its controls from the declared options, a run as HTML, and the events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_trainer.captioning.options import caption_options
from lora_trainer.errors import UserError
from lora_trainer.ui import live
from lora_trainer.ui.words import duration, safe

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

    from lora_trainer.captioning.service import CaptionView
    from lora_trainer.ui.ports import TabHost

FOLDER = "A captioner or tagger in a folder"
CAPTIONERS = {
    "BLIP: a sentence for each picture": "blip",
    "DeepBooru: tags for drawings": "deepbooru",
    FOLDER: "",
}
# Option: the words on its control. The others have none: the captioner is chosen, the device is the host's.
LABELS = {
    "existing": "Pictures with a caption",
    "threshold": "Score of a tag",
    "blacklist": "Tags to leave out",
    "spaces": "Spaces for underscores",
    "escape": "Escape parentheses",
    "download": "Download",
}
# What the events need of the other controls.
SHARED = ("train_data_dir", "metadata_path", "trigger_words")
STATES = {
    "running": ("training", "Captioning"),
    "stopping": ("stopping", "Stopping"),
    "done": ("done", "Done"),
    "stopped": ("stopped", "Stopped"),
    "failed": ("failed", "Failed"),
}
SHOWN = 5
HELP = "Writes captions beside the pictures, or into their caption file. Those that are there stay, unless you say so."


class Handlers:
    """The fold's events over `host`. `update` makes gradio's changes to a component. A look answers with (status,
    button to begin, button to stop), the others with something before that."""

    def __init__(self, host: TabHost, update: Callable[..., Any]) -> None:
        self._host, self._update = host, update

    def look(self) -> list[Any]:
        """The fold now."""
        view = self._host.captioning.view
        return [status(view), self._update(interactive=not view.active), self._update(interactive=view.active)]

    def begin(self, captioner: str, folder: str, triggers: bool, *values: object) -> list[Any]:
        """With the values of the controls LABELS, then SHARED: (refusal, look)."""
        given = dict(zip((*LABELS, *SHARED), values, strict=True))
        paths = {key: _path(given[key]) for key in ("train_data_dir", "metadata_path")}
        words = given["trigger_words"] if triggers else ""
        settings = {**given, **paths, "trigger_words": words, "captioner": CAPTIONERS[captioner] or _path(folder)}
        try:
            self._host.captioning.caption(settings)
        except UserError as error:
            return [live.refusal(str(error), head="Not captioned."), *self.look()]
        return ["", *self.look()]

    def stop(self) -> list[Any]:
        self._host.captioning.stop()
        return self.look()

    def chosen(self, captioner: str) -> list[Any]:
        """(what must be known of the captioner, the folder's control)."""
        missing = self._host.captioning.downloads(CAPTIONERS[captioner])
        text = f"Not here yet: {' and '.join(missing)}. Tick Download to let the WebUI fetch this." if missing else ""
        return [live.note(text), self._update(visible=captioner == FOLDER)]


def status(view: CaptionView) -> str:
    """A run as HTML; its mark tells the page's script to look often."""
    if view.state == "idle":
        return live.note(HELP)
    color, word = STATES[view.state]
    count = f"{view.done:,} of {view.total:,} pictures" if view.total else "waiting for its turn" if view.active else ""
    left = f"{duration(view.eta)} left" if view.eta is not None and view.state == "running" else ""
    bar = ""
    if view.active:
        percent = 100 * view.done / view.total if view.total else 0
        bar = (
            f'<div class="lt-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent:.0f}"><div class="lt-fill lt-{color}" style="width:{percent:.1f}%"></div></div>'
        )
    rows = "".join(f"<li>{safe(line)}</li>" for line in view.log[-SHOWN:])
    return (
        f'<div class="lt-captions" role="status" data-active="{int(view.active)}">'
        f'<span class="lt-chip lt-{color}">{word}</span> {safe(view.end)}{bar}'
        f'<div class="lt-under"><span>{count}</span><span>{left}</span></div>'
        f"<ul>{rows}</ul></div>"
    )


def _path(text: object) -> str:
    """ "Copy as path" on Windows puts quotes around it."""
    return str(text or "").strip().strip('"').strip()


@dataclass(frozen=True)
class Fold:
    """The components. `values` are those of LABELS."""

    captioner: Component
    folder: Component
    triggers: Component
    values: Mapping[str, Component]
    about: gr.HTML
    begin: gr.Button
    stop: gr.Button
    status: gr.HTML


def build() -> Fold:
    import gradio as gr

    names = list(CAPTIONERS)
    with gr.Accordion("Caption the pictures", open=False, elem_id="lora_trainer_captioning", elem_classes=["lt-group"]):
        captioner = gr.Dropdown(names, value=names[0], label="Captioner", elem_id="lora_trainer_captioner")
        about = gr.HTML("", elem_id="lora_trainer_captioner_about")
        place = {"label": "Its folder", "elem_id": "lora_trainer_captioner_folder", "lines": 1, "visible": False}
        folder = gr.Textbox("", placeholder="/path/to/wd-vit-tagger-v3", **place)
        with gr.Row(elem_classes=["lt-main"]):
            values = {key: _control(key) for key in LABELS}
            triggers = gr.Checkbox(
                False,
                label="Trigger words",
                info="Write them too. A training puts them in front anyway.",
                elem_id="lora_trainer_caption_triggers",
            )
        with gr.Row(elem_classes=["lt-buttons"]):
            begin = gr.Button("Caption", elem_id="lora_trainer_caption_begin", scale=3, min_width=120)
            stop = gr.Button("Stop", elem_id="lora_trainer_caption_stop", scale=1, min_width=90, interactive=False)
        shown = gr.HTML(live.note(HELP), elem_id="lora_trainer_captions")
    return Fold(captioner, folder, triggers, values, about, begin, stop, shown)


def connect(fold: Fold, handlers: Handlers, inputs: Mapping[str, Component], tick: gr.Button) -> None:
    """Bind the events; the page's `tick` looks here too."""
    short: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}
    answer = [fold.status, fold.begin, fold.stop]
    asked = [fold.captioner, fold.folder, fold.triggers, *fold.values.values(), *(inputs[key] for key in SHARED)]
    fold.begin.click(handlers.begin, inputs=asked, outputs=[fold.about, *answer], **short)
    fold.stop.click(handlers.stop, inputs=[], outputs=answer, **short)
    tick.click(handlers.look, inputs=[], outputs=answer, **short)
    fold.captioner.change(handlers.chosen, inputs=[fold.captioner], outputs=[fold.about, fold.folder], **short)


def _control(key: str) -> Component:
    import gradio as gr

    option = caption_options()[key]
    shared = {"label": LABELS[key], "info": option.help, "elem_id": f"lora_trainer_caption_{key}", "min_width": 160}
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **shared)
    if option.kind is bool:
        return gr.Checkbox(option.default, **shared)
    if option.kind is float:
        return gr.Slider(option.meta.ge, option.meta.le, value=option.default, step=0.01, **shared)
    return gr.Textbox(option.default, lines=1, **shared)
