"""One gradio component for an option."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_trainer.config.options import Option
from lora_trainer.ui import fields

if TYPE_CHECKING:
    from gradio.components import Component


def make(option: Option, *, min_width: int = 160) -> Component:
    """The control of `option`. Bounds are left to `config.build`, which names every problem at once, where
    gradio would stop at the first with a passing message."""
    import gradio as gr

    shared = {
        "label": fields.label(option.key),
        "info": fields.info(option),
        "value": fields.initial(option),
        "elem_id": f"lora_trainer_{option.key}",
        "interactive": True,
        "min_width": min_width,
    }
    kind = fields.control(option)
    if kind == "checkbox":
        return gr.Checkbox(**shared)
    if kind == "dropdown":
        return gr.Dropdown(choices=list(option.choices), **shared)
    if kind == "number":
        return gr.Number(step=fields.stride(option), **shared)
    size = {"lines": 1, "max_lines": 1}
    if kind == "lines":
        # Wide enough for a row of its own.
        size = {"lines": 3, "max_lines": 12, "min_width": 600}
    return gr.Textbox(placeholder=fields.placeholder(option), **{**shared, **size})
