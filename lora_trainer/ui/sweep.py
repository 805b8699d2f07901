"""A search for a learning rate as HTML: its curve, what is suggested, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_trainer.ui.chart import swept
from lora_trainer.ui.words import safe

if TYPE_CHECKING:
    from lora_trainer.jobs.view import JobView


def sweep(job: JobView) -> str:
    """Empty where nothing is measured, and for other kinds of jobs."""
    svg = swept(job.sweep, job.suggested) if job.sweep else ""
    if not svg:
        return verdict(job)
    legend = '<span class="lt-key lt-key-held-out">loss on the same pictures and noise</span>'
    if job.suggested is not None:
        legend += '<span class="lt-key lt-key-mark">suggested</span>'
    return (
        f'<div class="lt-judged"><div class="lt-title">While the learning rate rises</div>{verdict(job)}'
        f'<div class="lt-chart">{svg}</div><div class="lt-legend">{legend}</div></div>'
    )


def verdict(job: JobView) -> str:
    if job.why is None:
        return ""
    found = "No learning rate found" if job.suggested is None else f"Learning rate <b>{job.suggested:g}</b>"
    return f'<div class="lt-verdict">{found}: {safe(job.why)}.</div>'


def offer(job: JobView | None) -> str:
    """The words on the button that takes the suggestion; empty where there is none."""
    return "" if job is None or job.suggested is None else f"Use {job.suggested:g} as the learning rate"
