"""What the tab shows at one moment: pure text, made from the host."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_trainer.errors import DataError
from lora_trainer.ui import live
from lora_trainer.ui.sweep import offer
from lora_trainer.ui.words import safe

if TYPE_CHECKING:
    from lora_trainer.jobs.view import JobView
    from lora_trainer.ui.ports import TabHost

JOBS_LISTED = 8


@dataclass(frozen=True)
class Result:
    """What a job left behind: its file as HTML, a prompt that shows it, and an infotext to compare its saves."""

    file: str
    prompt: str
    grid: str


@dataclass(frozen=True)
class Screen:
    """The changing parts of the tab. `offer`: the words of a button; `active` asks the page to look again soon."""

    checkpoint: str
    panel: str
    log: str
    jobs: str
    result: Result | None
    stoppable: bool
    pausable: bool
    resumable: bool
    offer: str
    active: bool


def look(host: TabHost, picked: str = "", stopping: Collection[str] = ()) -> Screen:
    """The tab now, showing the job `picked`, else the one that runs, waits first or ended last; the jobs `stopping`
    were told to."""
    jobs = host.jobs.jobs()
    job = shown_job(host, picked)
    return Screen(
        checkpoint=live.checkpoint(host.checkpoint()),
        panel=live.panel(job, stopping=stopping),
        log=live.log(job),
        jobs=live.job_list(jobs[:JOBS_LISTED], job, stopping=stopping),
        result=result_of(host, job) if job is not None else None,
        stoppable=job is not None and live.is_active(job) and job.id not in stopping,
        pausable=job is not None and live.can_pause(job) and job.id not in stopping,
        resumable=job is not None and live.can_go_on(job),
        offer=offer(job),
        active=any(live.is_active(one) for one in jobs),
    )


def shown_job(host: TabHost, picked: str = "") -> JobView | None:
    """The job `picked`, else the one that runs, waits first or ended last."""
    if picked:
        try:
            return host.jobs.job(picked)
        except DataError:
            pass  # it was cleared away meanwhile
    jobs = host.jobs.jobs()
    running = [job for job in jobs if job.state in live.RUNNING]
    waiting = [job for job in reversed(jobs) if job.state == "queued"]
    ended = sorted(jobs, key=lambda job: job.finished or job.created, reverse=True)
    return next(iter((*running, *waiting, *ended)), None)


def result_of(host: TabHost, job: JobView) -> Result | None:
    """What there is to try, once the job has ended with a LoRA, or in a pause the LoRA as it is now."""
    files = [path for path in job.output if path.lower().endswith(".safetensors")]
    if (live.is_active(job) and job.state != "paused") or not files:
        return None
    shown = files[-1] if job.state == "paused" else files[0]
    return Result(_file_line(shown), host.prompt(job), host.grid(job) or "")


def _file_line(path: str) -> str:
    cut = max(path.rfind("/"), path.rfind("\\"))
    folder, name = path[: max(cut, 0)], path[cut + 1 :]
    return (
        f'<div class="lt-file"><span>Your LoRA</span><b>{safe(name)}</b><span class="lt-folder">{safe(folder)}</span>'
        "</div>"
    )
