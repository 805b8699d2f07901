"""The choice of a preset above the form: it sets the controls, and what is changed by hand afterwards stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import Option, options
from lora_trainer.config.presets import preset_keys, preset_of, preset_values
from lora_trainer.ui import controls, fields, live

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

    from lora_trainer.ui.ports import TabHost

HELP = "A preset sets some of the controls below; change what you like afterwards. none: your own settings."


def touched() -> tuple[str, ...]:
    """The controls that a preset may set."""
    return tuple(key for key in preset_keys() if key not in fields.HIDDEN)


class Handlers:
    """`update` makes gradio's changes to a component."""

    def __init__(self, host: TabHost, update: Callable[..., Any]) -> None:
        self._host, self._update = host, update

    def choose(self, before: str, chosen: str, *values: object) -> list[Any]:
        """With the preset that was set before, and the values of the controls `touched`: (the preset that is set now,
        why it is so, the controls' new values). A control that still shows what the old preset gave goes back to its
        default."""
        loaded = self._host.checkpoint()
        family = loaded.family if loaded else "sd15"
        old, new = preset_values(before, family), preset_values(chosen, family)
        changes = []
        for key, value in zip(touched(), values, strict=True):
            option = options()[key]
            if key in new:
                changes.append(self._update(value=fields.as_shown(option, new[key])))
            elif key in old and _means(option, value, old[key]):
                changes.append(self._update(value=fields.initial(option)))
            else:
                changes.append(self._update())
        return [chosen, reason(chosen), *changes]


def reason(chosen: str) -> str:
    """Why the preset is as it is, as HTML."""
    preset = preset_of(chosen)
    return live.note(preset.why if preset else HELP)


def _means(option: Option, value: object, given: object) -> bool:
    """Whether the control's `value` stands for `given`."""
    try:
        return convert(option, fields.setting(option, value)) == convert(option, given)
    except Problem:
        return False


@dataclass(frozen=True)
class Choice:
    """The components; `current` keeps which preset the controls were set by."""

    preset: Component
    again: gr.Button
    why: gr.HTML
    current: gr.State


def build() -> Choice:
    import gradio as gr

    with gr.Row(elem_classes=["lt-buttons"], equal_height=False):
        preset = controls.make(options()["preset"])
        # Choosing in a list what is chosen already is no event in all versions of gradio.
        again = gr.Button("Set its values again", elem_id="lora_trainer_preset_again", scale=0, min_width=160)
    why = gr.HTML(reason(""), elem_id="lora_trainer_preset_why")
    return Choice(preset, again, why, gr.State(options()["preset"].default))


def connect(choice: Choice, handlers: Handlers, inputs: Mapping[str, Component]) -> None:
    """Bind the events; `inputs` are the controls by their options."""
    set_by = [inputs[key] for key in touched()]
    for event in (choice.preset.input, choice.again.click):
        event(
            handlers.choose,
            inputs=[choice.current, choice.preset, *set_by],
            outputs=[choice.current, choice.why, *set_by],
            **{"queue": False, "show_progress": "hidden", "api_name": False},
        )
