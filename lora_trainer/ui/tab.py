"""The tab "Train LoRA" in gradio 3.41 and 4.40. It holds no state: every look asks the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_trainer.config.options import Option, options
from lora_trainer.ui import captioning, controls, doctor, fields, live, presets
from lora_trainer.ui.handlers import Handlers
from lora_trainer.ui.words import safe

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

    from lora_trainer.ui.ports import TabHost

# Short events that never wait in gradio's queue: they work with --no-gradio-queue and hold no stream open.
_SHORT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}

# The settings that say how pictures and captions are read.
_CHECKED = (
    *("train_data_dir", "concepts", "metadata_path", "trigger_words", "resolution", "allow_upscaling"),
    "masked_loss",
)


@dataclass(frozen=True)
class _Actions:
    """What starts something. The page's script writes the job that was clicked into `picked`, then clicks `tick`
    or, for its cross, `stop_picked`: a button of its own, since Stop is off while an ended job is on show."""

    train: gr.Button
    trial: gr.Button
    find: gr.Button
    pause: gr.Button
    stop: gr.Button
    tick: gr.Button
    stop_picked: gr.Button
    picked: gr.Textbox


def build(host: TabHost) -> gr.Blocks:
    """The tab. It asks the host nothing until a page does, so that start-up waits for no model."""
    # Only the tab needs gradio: everything else of this room works and is tested without it.
    import gradio as gr

    handlers = Handlers(host, gr.update)
    with gr.Blocks(analytics_enabled=False) as blocks, gr.Row(elem_id="lora_trainer", equal_height=False):
        with gr.Column(scale=5, min_width=320, elem_classes=["lt-left"]):
            screen: dict[str, Any] = {"checkpoint": gr.HTML("", elem_id="lora_trainer_checkpoint")}
            preset = presets.build()
            pictures, look, findings = _pictures(handlers)
            captions = captioning.build()
            inputs = {"preset": preset.preset} | pictures | _main()
            find, others = _groups()
            inputs |= others
        with gr.Column(scale=5, min_width=320, elem_classes=["lt-right"]):
            actions = _actions(find)
            message = gr.HTML("", elem_id="lora_trainer_message")
            screen |= _live(host) | {"stop": actions.stop, "pause": actions.pause}
        screen |= {"beat": gr.HTML("", elem_id="lora_trainer_beat", elem_classes=["lt-hidden"]), "seen": gr.State("")}
        _connect(handlers, actions, {"message": message, **screen}, inputs)
        presets.connect(preset, presets.Handlers(host, gr.update), inputs)
        captioning.connect(captions, captioning.Handlers(host, gr.update), inputs, actions.tick)
        asked = [inputs[key] for key in _CHECKED]
        look.click(handlers.check(_CHECKED), inputs=asked, outputs=[findings], **{**_SHORT, "show_progress": "full"})
    for block in blocks.blocks.values():
        # Else ui-config.json would freeze today's defaults.
        block.do_not_save_to_config = True
    return blocks


def _pictures(handlers: Handlers) -> tuple[dict[str, Component], gr.Button, gr.HTML]:
    """Name, pictures and trigger words; an upload fills in the folder, and the button looks at what is in it."""
    import gradio as gr

    name, folder = (controls.make(options()[key]) for key in ("output_name", "train_data_dir"))
    with gr.Column(elem_id="lora_trainer_drop"):
        # Not gr.File: in gradio 3 its upload is lost when any other event answers meanwhile, and ours always do.
        upload = gr.UploadButton(
            "Or drop pictures, captions, a folder or a zip here, or click to choose",
            file_count="multiple",
            elem_id="lora_trainer_upload",
        )
        received = gr.HTML("", elem_id="lora_trainer_received")
    with gr.Row(elem_classes=["lt-buttons"]):
        check = gr.Button("Check the pictures", elem_id="lora_trainer_check", min_width=140)
        # Its click is the page's own: javascript/lora_trainer_editor.js opens the editor over the tab.
        gr.Button("Edit the captions", elem_id="lora_trainer_edit", min_width=140)
    known = f'<span data-pass="{safe(handlers.host.editor_pass)}"></span>'
    gr.HTML(known, elem_id="lora_trainer_pass", elem_classes=["lt-hidden"])
    findings = gr.HTML(live.note(doctor.HELP), elem_id="lora_trainer_findings")
    upload.upload(handlers.receive, inputs=[upload], outputs=[folder, received], api_name=False)
    words = controls.make(options()["trigger_words"])
    return {"output_name": name, "train_data_dir": folder, "trigger_words": words}, check, findings


def _main() -> dict[str, Component]:
    """The few settings that matter."""
    import gradio as gr

    with gr.Row(elem_classes=["lt-main"]):
        return {key: controls.make(options()[key], min_width=120) for key in fields.MAIN}


def _groups() -> tuple[gr.Button, dict[str, Component]]:
    """Everything else, folded away; under the learning rate a button that has one found."""
    import gradio as gr

    made: dict[str, Component] = {}
    for group, members in fields.groups().items():
        with gr.Accordion(group, open=False, elem_classes=["lt-group"]):
            keys = [option.key for option in members]
            cut = keys.index("learning_rate") + 1 if "learning_rate" in keys else 0
            if cut:
                made |= _row(members[:cut])
                find = _finder()
            made |= _row(members[cut:])
    return find, made


def _row(members: Sequence[Option]) -> dict[str, Component]:
    import gradio as gr

    with gr.Row(elem_classes=["lt-main"]):
        return {option.key: controls.make(option, min_width=240) for option in members}


def _finder() -> gr.Button:
    import gradio as gr

    with gr.Row(elem_classes=["lt-buttons"]):
        find = gr.Button("Find a learning rate", elem_id="lora_trainer_find_rate", min_width=160)
    about = "A short run with these settings in which it rises, then a curve and a suggestion; nothing else is kept."
    gr.HTML(live.note(about), elem_id="lora_trainer_find_rate_help")
    return find


def _actions(find: gr.Button) -> _Actions:
    import gradio as gr

    with gr.Row(elem_classes=["lt-buttons"]):
        train = gr.Button("Train", variant="primary", elem_id="lora_trainer_train", scale=3, min_width=120)
        trial = gr.Button("Trial run", elem_id="lora_trainer_try_out", scale=1, min_width=90)
        pause = gr.Button("Pause", elem_id="lora_trainer_pause", scale=1, min_width=90, interactive=False)
        stop = gr.Button("Stop", elem_id="lora_trainer_stop", scale=1, min_width=90, interactive=False)
    with gr.Row(elem_classes=["lt-hidden"]):
        tick = gr.Button("Look", elem_id="lora_trainer_tick")
        stop_picked = gr.Button("Stop it", elem_id="lora_trainer_stop_picked")
        picked = gr.Textbox("", label="Job", elem_id="lora_trainer_picked")
    trial_run = "Trial run: a few steps on a few pictures, then how long the full run will take."
    gr.HTML(live.note(trial_run), elem_id="lora_trainer_trial_help")
    return _Actions(train, trial, find, pause, stop, tick, stop_picked, picked)


def _live(host: TabHost) -> dict[str, Any]:
    """The job, the button that takes the learning rate it found, its result, the other jobs and the log."""
    import gradio as gr

    panel = gr.HTML("", elem_id="lora_trainer_panel")
    use_rate = gr.Button("Use it", variant="primary", elem_id="lora_trainer_use_rate", visible=False)
    with gr.Column(visible=False, elem_classes=["lt-result"]) as result:
        file = gr.HTML("")
        prompt = gr.Textbox(label="Prompt", elem_id="lora_trainer_prompt", interactive=True, lines=1)
        with gr.Row(elem_classes=["lt-buttons"]):
            try_it = gr.Button("Try it", variant="primary", elem_id="lora_trainer_try_it", scale=3, min_width=120)
            compare = gr.Button("Compare the saved steps", elem_id="lora_trainer_compare", scale=2, min_width=200)
        with gr.Row(elem_classes=["lt-hidden"]):
            grid = gr.Textbox("", label="Grid", elem_id="lora_trainer_grid")
    host.send_to_txt2img(try_it, prompt)
    host.send_to_txt2img(compare, grid)
    jobs = gr.HTML("", elem_id="lora_trainer_jobs")
    log = gr.HTML("", elem_id="lora_trainer_log")
    shown = {"panel": panel, "result": result, "file": file, "prompt": prompt, "compare": compare, "grid": grid}
    return shown | {"use_rate": use_rate, "jobs": jobs, "log": log}


def _connect(handlers: Handlers, actions: _Actions, screen: Mapping[str, Any], inputs: Mapping[str, Component]) -> None:
    """Bind the events. Each answers with a whole new screen, so the page never waits for the next tick."""
    picked, seen = actions.picked, screen["seen"]
    outputs = [screen[name] for name in handlers.SCREEN]
    actions.tick.click(handlers.look, inputs=[picked, seen], outputs=outputs, **_SHORT)
    actions.pause.click(handlers.pause, inputs=[picked, seen], outputs=outputs, **_SHORT)
    for button in (actions.stop, actions.stop_picked):
        button.click(handlers.stop, inputs=[picked, seen], outputs=[picked, *outputs], **_SHORT)
    for button, how in ((actions.train, {}), (actions.trial, {"trial": True}), (actions.find, {"find": True})):
        button.click(
            handlers.submit(tuple(inputs), **how),
            inputs=[seen, picked, *inputs.values()],
            outputs=[screen["message"], picked, *outputs],
            **_SHORT,
        )
    taken = [screen["message"], inputs["learning_rate"]]
    screen["use_rate"].click(handlers.use_rate, inputs=[picked], outputs=taken, **_SHORT)
