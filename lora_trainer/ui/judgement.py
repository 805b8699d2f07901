"""How the LoRA does on pictures that it does not train on, as HTML: a chart, when it was best, a warning in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_trainer.curve import Point, best, warning
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
    """A table of how near drawings are to the pictures, and how much other prompts have changed, the best step boldly;
    empty until a step is measured."""
    measured = [row for row in job.comparisons if row[0] > 0]
    if not measured:
        return ""
    every = -(-len(measured) // ROWS)
    least = best(job.validations)
    near = None if least is None else min(measured, key=lambda row: abs(row[0] - least.step))[0]
    shown = [row for at, row in enumerate(reversed(measured)) if at % every == 0 or row[0] == near][::-1]
    rows = "".join(_row(*row, marked=row[0] == near) for row in shown)
    return (
        '<table class="lt-compared"><thead><tr><th>Step</th><th>Like the training pictures</th>'
        f"<th>Other prompts changed</th></tr></thead><tbody>{rows}</tbody></table>"
        '<div class="lt-note">0 % is as without the LoRA. Good is much on the left and little on the right.</div>'
    )


def _row(step: int, likeness: float, drift: float, *, marked: bool) -> str:
    kind = ' class="lt-marked"' if marked else ""
    bar = f'<span class="lt-likeness"><span style="width:{min(max(likeness, 0.0), 1.0):.0%}"></span></span>'
    return f"<tr{kind}><td>{step:,}</td><td>{bar}{likeness:.0%}</td><td>{drift:.1%}</td></tr>"


def share(loss: float, base: float) -> float:
    """How far `loss` is above (or below) that of the base, as a share of it."""
    return loss / base - 1


def _change(change: float) -> str:
    return f"{abs(change):.0%} {'lower' if change <= 0 else 'higher'}"
