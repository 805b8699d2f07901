"""A host of the tab and of the API that anybody can reach: real jobs, real path rules, no training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from lora_trainer.config import build
from lora_trainer.hosts.roots import Roots
from lora_trainer.jobs.service import JobService
from lora_trainer.jobs.view import JobView
from lora_trainer.ui.ports import Checkpoint
from tests.fuzz.watch import ARENA

USER, PASSWORD = "ann", "correct-horse-battery"
JOBS = ARENA.inside / "jobs"


class Host:
    """`credentials` and `non_local` as with --listen --api-auth."""

    credentials: Mapping[str, str] = {USER: PASSWORD}
    non_local = True
    editor_pass = "open"

    def __init__(self, work=None) -> None:
        shutil.rmtree(JOBS, ignore_errors=True)
        self.jobs = JobService(JOBS, work or (lambda *_: SimpleNamespace(state="done")))

    def submit(self, settings: Mapping[str, object]) -> JobView:
        given = Roots([ARENA.inside], True).settings({k: v for k, v in settings.items() if v is not None})
        return self.jobs.submit(build({"base_model": "loaded", "output_dir": str(ARENA.inside / "run")}, given))

    def checkpoint(self) -> Checkpoint | None:
        return Checkpoint("tiny", ())

    def upload_folder(self) -> Path:
        folder = ARENA.inside / "upload"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def prompt(self, job: JobView, weight: float = 0.8) -> str:
        return f"<lora:{job.name}:{weight:g}>"

    def grid(self, job: JobView) -> str | None:
        return None

    def send_to_txt2img(self, button: object, text: object) -> None: ...


_HOSTS: list[Host] = []


def host() -> Host:
    """One host for many cases, made anew before its jobs are too many to list quickly."""
    if not _HOSTS or len(_HOSTS[-1].jobs.jobs()) > 30:
        for old in _HOSTS:
            old.jobs.close()
        _HOSTS[:] = [Host()]
    return _HOSTS[-1]
