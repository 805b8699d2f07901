"""A job as HTML. All text is escaped; everything comes from one immutable view."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from lora_trainer.ui.chart import curve, finite, smooth
from lora_trainer.ui.judgement import comparison, judgement
from lora_trainer.ui.sweep import sweep
from lora_trainer.ui.words import advice, duration, lines, memory, problem, safe, step_time

if TYPE_CHECKING:
    from lora_trainer.jobs.view import JobView
    from lora_trainer.ui.ports import Checkpoint

RUNNING = ("preparing", "training", "paused", "saving")
LOG_LINES = 200
STATES = {
    "queued": "Waiting",
    "preparing": "Preparing",
    "training": "Training",
    "paused": "Paused",
    "saving": "Saving",
    "done": "Done",
    "stopped": "Stopped",
    "failed": "Failed",
}


def is_active(job: JobView) -> bool:
    """Whether something about the job may still change."""
    return job.state == "queued" or job.state in RUNNING


def can_pause(job: JobView) -> bool:
    return is_active(job) and job.state != "paused"


def can_go_on(job: JobView) -> bool:
    """Paused, or ended before it was done."""
    return job.state in ("paused", "stopped", "failed")


def title(job: JobView) -> str:
    return f"learning rate for {job.name}" if job.kind == "find-lr" else job.name


def checkpoint(found: Checkpoint | None) -> str:
    """The line that names what will be trained on."""
    if found is None:
        return (
            '<div class="lt-checkpoint"><span class="lt-warning">No checkpoint is loaded yet. '
            "Choose one at the top left and let it load.</span></div>"
        )
    warnings = "".join(f'<div class="lt-warning">{safe(text)}</div>' for text in found.warnings)
    return f'<div class="lt-checkpoint">Trains on <b>{safe(found.title)}</b>{warnings}</div>'


def panel(job: JobView | None, *, stopping: Collection[str] = ()) -> str:
    """Where the job stands: state, bar, curve, numbers, and what went wrong."""
    if job is None:
        return '<div class="lt-panel lt-empty">Name a folder of pictures and press Train.<br>Progress shows here.</div>'
    parts = [
        _head(job, stopping),
        _bar(job, stopping),
        _error(job),
        _curve(job),
        sweep(job),
        judgement(job.validations),
        comparison(job),
        _numbers(job),
    ]
    return f'<div class="lt-panel">{"".join(parts)}</div>'


def refusal(text: str, head: str = "Not started.") -> str:
    """Why a click did nothing, every line of it."""
    rows = "".join(f"<li>{problem(line)}</li>" for line in lines(text))
    return (
        f'<div class="lt-error" role="alert"><b>{safe(head)}</b> Please mend this and try again:<ul>{rows}</ul></div>'
    )


def note(text: str, skipped: Sequence[str] = ()) -> str:
    """A quiet line, with what was left out."""
    rows = "".join(f"<li>{safe(line)}</li>" for line in skipped[:LOG_LINES])
    rows += f"<li>… and {len(skipped) - LOG_LINES:,} more</li>" if len(skipped) > LOG_LINES else ""
    left_out = f"<details><summary>{len(skipped)} left out</summary><ul>{rows}</ul></details>" if rows else ""
    return f'<div class="lt-note">{safe(text)}{left_out}</div>'


def log(job: JobView | None) -> str:
    """The last lines, newest first in the source: the page shows them bottom-up and so stays at the end."""
    if job is None or not job.log:
        return ""
    rows = "".join(f"<div>{safe(line)}</div>" for line in reversed(job.log[-LOG_LINES:]))
    return f'<div class="lt-log" tabindex="0" aria-label="Log">{rows}</div>'


def job_list(jobs: Iterable[JobView], shown: JobView | None, *, stopping: Collection[str] = ()) -> str:
    """The jobs, newest first; a click on one shows it, on its cross stops it (javascript/lora_trainer.js)."""
    rows = "".join(_row(job, shown is not None and job.id == shown.id, stopping) for job in jobs)
    return f'<div class="lt-jobs"><div class="lt-title">Jobs</div>{rows}</div>' if rows else ""


def _row(job: JobView, current: bool, stopping: Collection[str]) -> str:
    name, id = safe(title(job)), safe(job.id)
    progress = f"{round(100 * _share(job))} %" if job.state in RUNNING and job.step else ""
    cross = (
        f'<button type="button" class="lt-cross" data-lora-trainer-stop="{id}" title="Stop {name}" '
        f'aria-label="Stop {name}">✕</button>'
        if is_active(job) and job.id not in stopping
        else ""
    )
    return (
        f'<div class="lt-job{" lt-current" if current else ""}">'
        f'<button type="button" class="lt-show" data-lora-trainer-show="{id}">{_chip(job, stopping)}'
        f'<span class="lt-name">{name}</span><span class="lt-progress">{progress}</span></button>{cross}</div>'
    )


def _chip(job: JobView, stopping: Collection[str]) -> str:
    if is_active(job) and job.id in stopping:
        return '<span class="lt-chip lt-stopping">Stopping</span>'
    word = "Searching" if job.kind == "find-lr" and job.state == "training" else STATES.get(job.state, job.state)
    return f'<span class="lt-chip lt-{safe(job.state)}">{safe(word)}</span>'


def _share(job: JobView) -> float:
    if job.state == "done":
        return 1.0
    return min(1.0, job.step / job.steps) if job.steps else 0.0


def _head(job: JobView, stopping: Collection[str]) -> str:
    stage = job.stage if is_active(job) and job.stage.lower() != STATES.get(job.state, "").lower() else ""
    if is_active(job) and job.id in stopping:
        end = "judges what it has seen" if job.kind == "find-lr" else "saves what it has learned"
        stage = f"ends after this step and {end}" if job.step else "ends before the first step"
    return (
        f'<div class="lt-head" aria-live="polite">{_chip(job, stopping)}<span class="lt-name">{safe(title(job))}</span>'
        f'<span class="lt-stage">{safe(stage)}</span></div>'
    )


def _bar(job: JobView, stopping: Collection[str]) -> str:
    if not job.step and job.state not in RUNNING:
        return ""
    percent = 100 * _share(job)
    # Before the first step nobody knows the share.
    waiting = " lt-waiting" if job.state == "preparing" and not job.step else ""
    steps = f"Step {job.step:,}" + (f" of {job.steps:,}" if job.steps else "") if job.step else ""
    # Under "Stop after steps" the last epoch is never reached.
    known = job.epochs and not job.settings.get("max_train_steps")
    epochs = f"epoch {job.epoch}" + (f" of {job.epochs}" if known else "") if job.epoch else ""
    goes_on = job.state == "training" and job.id not in stopping
    left = f"{duration(job.eta)} left" if job.eta is not None and goes_on else ""
    words = " · ".join(word for word in (steps, epochs) if word)
    return (
        f'<div class="lt-bar{waiting}" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><div class="lt-fill lt-{safe(job.state)}" style="width:{percent:.1f}%"></div>'
        f'</div><div class="lt-under"><span>{words}</span><span>{left}</span></div>'
    )


def _error(job: JobView) -> str:
    if not job.error:
        return ""
    rows = "".join(f"<li>{problem(line)}</li>" for line in lines(job.error))
    what_to_do = f'<div class="lt-advice">{safe(advice(job.error))}</div>'
    details = ""
    if job.details:
        details = f"<details><summary>Details for an issue</summary><pre>{safe(job.details)}</pre></details>"
    return f'<div class="lt-error" role="alert"><ul>{rows}</ul>{what_to_do}{details}</div>'


def _curve(job: JobView) -> str:
    svg = curve(job.losses)
    if not svg:
        return ""
    legend = '<span class="lt-key lt-key-trend">loss, smoothed</span>'
    return f'<div class="lt-chart">{svg}</div><div class="lt-legend">{legend}</div>'


def _numbers(job: JobView) -> str:
    tiles = []
    losses = finite(job.losses)
    if losses:
        tiles.append(("Loss", f"{smooth(losses)[-1][1]:.4f}"))
    if job.validations:
        tiles.append(("Held-out loss", f"{job.validations[-1].lora:.4f}"))
    if job.seconds_per_step is not None:
        tiles.append(("A step takes", step_time(job.seconds_per_step)))
    if job.learning_rate is not None:
        tiles.append(("Learning rate", f"{job.learning_rate:.2g}"))
    if job.memory is not None:
        tiles.append(("Memory", memory(job.memory, job.available)))
    if job.started is not None and job.finished is not None:
        tiles.append(("Took", duration(job.finished - job.started)))
    cells = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="lt-numbers">{cells}</dl>' if cells else ""
