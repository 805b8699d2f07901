"""How the LoRA does on pictures that it does not train on, as HTML: a chart, when it was best, a warning in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_trainer.curve import Comparison, Point, best, warning
from lora_trainer.ui.chart import judged
from lora_trainer.ui.words import safe

if TYPE_CHECKING:
    from lora_trainer.jobs.view import JobView

# Rows of the table.
ROWS = 6


def judgement(curve: Sequence[Point]) -> str:
    """Empty until two steps are measured."""
    curve = [point for point in curve if point.base and math.isfinite(share(point.lora, point.base))]
    least = best(curve)
    held_out = [(point.step, share(point.lora, point.base)) for point in curve]
    train = [(point.step, share(point.train, point.train_base)) for point in curve if point.train and point.train_base]
    if least is None or len(curve) < 2:
        return ""
    mark = (least.step, share(least.lora, least.base))
    svg = judged(held_out, train, mark)
    now = curve[-1]
    where = "now" if least.step == now.step else f"at step {least.step:,}"
    words = f"Best <b>{where}</b>: error {_change(mark[1])} than without the LoRA"
    if least.step != now.step:
        words += f"; at step {now.step:,} {_change(share(now.lora, now.base))}"
    told = warning(curve)
    warned = f'<div class="lt-warning">{safe(told[0].upper() + told[1:])}.</div>' if told else ""
    legend = '<span class="lt-key lt-key-held-out">pictures held out</span>'
    if len(train) > 1:
        legend += '<span class="lt-key lt-key-watched">training pictures</span>'
    return (
        f'<div class="lt-judged"><div class="lt-title">On pictures it does not train on</div>'
        f'<div class="lt-verdict">{words}.</div>{warned}<div class="lt-chart">{svg}</div>'
        f'<div class="lt-legend">{legend}<span class="lt-key-best">best: step {least.step:,}</span></div></div>'
    )


def comparison(job: JobView) -> str:
    """A table of how near drawings are to the pictures, how much other prompts have changed, and the score of both, the
    best step boldly; with a CLIP model also its scores, the base's for comparison. Empty until a step is measured."""
    rows = [Comparison(*row) for row in job.comparisons]
    measured = [row for row in rows if row.step > 0]
    if not measured:
        return ""
    every = -(-len(measured) // ROWS)
    least = best(job.validations)
    near = None if least is None else min(measured, key=lambda row: abs(row.step - least.step)).step
    shown = [row for at, row in enumerate(reversed(measured)) if at % every == 0 or row.step == near][::-1]
    clip = any(row.clip_image is not None for row in rows)
    heads = ["Step", "Like the training pictures", "Other prompts changed", "Score"]
    note = "0 % is as without the LoRA. Good is much likeness and little change; the score is one number of both"
    note += " and of the pictures held out." if job.validations else "."
    if clip:
        heads += ["CLIP: like the pictures", "CLIP: like the prompts"]
        base = next((row for row in rows if row.step == 0), None)
        note += f" CLIP without the LoRA: {_score(base.clip_image)} and {_score(base.clip_text)}." if base else ""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(_row(row, marked=row.step == near, clip=clip) for row in shown)
    return (
        f'<table class="lt-compared"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'<div class="lt-note">{note}</div>'
    )


def _row(row: Comparison, *, marked: bool, clip: bool) -> str:
    kind = ' class="lt-marked"' if marked else ""
    bar = f'<span class="lt-likeness"><span style="width:{min(max(row.likeness, 0.0), 1.0):.0%}"></span></span>'
    scores = f"<td>{_score(row.clip_image)}</td><td>{_score(row.clip_text)}</td>" if clip else ""
    numbers = f"<td>{bar}{row.likeness:.0%}</td><td>{row.drift:.1%}</td><td>{row.score:.2f}</td>"
    return f"<tr{kind}><td>{row.step:,}</td>{numbers}{scores}</tr>"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def share(loss: float, base: float) -> float:
    """How far `loss` is above (or below) that of the base, as a share of it."""
    return loss / base - 1


def _change(change: float) -> str:
    return f"{abs(change):.0%} {'lower' if change <= 0 else 'higher'}"
