"""What the tab shows at one moment: pure text, made from the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_trainer.errors import DataError
from lora_trainer.ui import live
from lora_trainer.ui.words import safe

if TYPE_CHECKING:
    from lora_trainer.jobs.view import JobView
    from lora_trainer.ui.ports import TabHost

JOBS_LISTED = 12
_TAG = re.compile(r"<lora:[^:>]+(:[^>]*)?>")


@dataclass(frozen=True)
class Result:
    """What a job left behind: its file as HTML, a prompt that shows it, and values for X/Y/Z's Prompt S/R."""

    file: str
    prompt: str
    grid: str


@dataclass(frozen=True)
class Screen:
    """The changing parts of the tab. `active` asks the page to look again soon."""

    checkpoint: str
    panel: str
    log: str
    jobs: str
    result: Result | None
    stoppable: bool
    active: bool


def look(host: TabHost, picked: str = "") -> Screen:
    """The tab now, showing the job `picked`, else the one that runs, waits first or ended last."""
    jobs = host.jobs.jobs()
    job = shown_job(host, picked)
    return Screen(
        checkpoint=live.checkpoint(host.checkpoint()),
        panel=live.panel(job),
        log=live.log(job),
        jobs=live.job_list(jobs[:JOBS_LISTED], job),
        result=result_of(host, job) if job is not None else None,
        stoppable=job is not None and live.is_active(job),
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
    """What there is to try, once the job has ended with a LoRA."""
    files = [path for path in job.output if path.lower().endswith(".safetensors")]
    if live.is_active(job) or not files:
        return None
    prompt = host.prompt(job)
    return Result(_file_line(files[0]), prompt, grid(prompt, [_stem(path) for path in files[1:]]))


def grid(prompt: str, names: list[str]) -> str:
    """X/Y/Z values for Prompt S/R: the prompt's own LoRA first, then each earlier save of it in order."""
    found = _TAG.search(prompt)
    if found is None:
        return ""
    own = found[0].removeprefix("<lora:").split(":")[0].rstrip(">")
    saves = sorted(name for name in set(names) if name.startswith(f"{own}-"))
    tags = [found[0], *(f"<lora:{name}{found[1] or ''}>" for name in saves)]
    return ", ".join(tags) if saves else ""


def _file_line(path: str) -> str:
    folder, name = _split(path)
    return (
        f'<div class="lt-file"><span>Your LoRA</span><b>{safe(name)}</b><span class="lt-folder">{safe(folder)}</span>'
        "</div>"
    )


def _stem(path: str) -> str:
    return _split(path)[1].removesuffix(".safetensors")


def _split(path: str) -> tuple[str, str]:
    """(folder, name) of a path of any system."""
    cut = max(path.rfind("/"), path.rfind("\\"))
    return path[: max(cut, 0)], path[cut + 1 :]
