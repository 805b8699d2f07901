"""The tab where the extension cannot work: it says why and what to do. Needs nothing that may be missing."""

from __future__ import annotations

from typing import Any


def build(html: str) -> Any:
    """A gradio.Blocks."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.HTML(f'<div class="lt-absent">{html}</div>')
    return blocks
