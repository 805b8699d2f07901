"""What happens on a click: from the page's values to the host, and back to one new screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lora_trainer.config.options import options
from lora_trainer.errors import UserError
from lora_trainer.ui import doctor, fields, live
from lora_trainer.ui.screen import Screen, look, shown_job
from lora_trainer.ui.uploads import Received, Upload, receive

if TYPE_CHECKING:
    from lora_trainer.ui.ports import TabHost


class Handlers:
    """The tab's events over `host`. `update` makes gradio's changes to a component."""

    # The components that every event answers for, in this order.
    SCREEN = (
        *("checkpoint", "panel", "log", "jobs", "stop", "pause"),
        *("result", "file", "prompt", "compare", "grid", "use_rate", "beat", "seen"),
    )

    def __init__(self, host: TabHost, update: Callable[..., Any]) -> None:
        self.host, self.update = host, update
        # A job's view does not say that it was told to stop.
        self.stopping: set[str] = set()

    def look(self, picked: str, seen: str) -> list[Any]:
        """The screen now, showing the job `picked`; `seen` is the result that the page shows already."""
        return self._answer(look(self.host, picked, self.stopping), seen)

    def stop(self, picked: str, seen: str) -> list[Any]:
        """Stop the job on show, and go back to the one that runs."""
        job = shown_job(self.host, picked)
        if job is not None and live.is_active(job):
            self.host.jobs.stop(job.id)
            self.stopping.add(job.id)
        return ["", *self.look("", seen)]

    def pause(self, picked: str, seen: str) -> list[Any]:
        """Pause the job on show, or let it go on: one button, which says which."""
        job = shown_job(self.host, picked)
        if job is not None and live.can_pause(job):
            self.host.jobs.pause(job.id)
        elif job is not None and live.can_go_on(job):
            self.stopping.discard(job.id)
            self.host.jobs.go_on(job.id)
        return self.look(picked, seen)

    def submit(self, keys: Sequence[str], *, trial: bool = False, find: bool = False) -> Callable[..., list[Any]]:
        """The event of a button that trains with the values of the controls `keys`, or has a learning rate found."""

        def click(seen: str, picked: str, *values: object) -> list[Any]:
            settings = fields.settings(dict(zip(keys, values, strict=True)))
            queue = self.host.find_rate if find else self.host.submit
            try:
                # Without the button a preset decides.
                queue({**settings, **({"trial": True} if trial else {})})
            except UserError as error:
                return [_answered(live.refusal(str(error))), self.update(), *self.look(picked, seen)]
            return [_answered(""), "", *self.look("", seen)]

        return click

    def use_rate(self, picked: str) -> list[Any]:
        """(what was done, the learning rate's control) with what the job on show suggests."""
        job = shown_job(self.host, picked)
        if job is None or job.suggested is None:
            return [_answered(""), self.update()]
        where = f"{fields.label('learning_rate')} is now {job.suggested:g}, under {options()['learning_rate'].group}."
        return [_answered(live.note(where)), self.update(value=job.suggested)]

    def check(self, keys: Sequence[str]) -> Callable[..., str]:
        """The event of the button that looks at the pictures which the controls `keys` name."""

        def click(*values: object) -> str:
            try:
                return doctor.findings(self.host.check(fields.settings(dict(zip(keys, values, strict=True)))))
            except UserError as error:
                return live.refusal(str(error), head="Not looked at.")

        return click

    def receive(self, files: Sequence[Any] | None) -> list[Any]:
        """Unpack an upload: (the folder's path, what arrived). A refused one leaves the path as it is."""
        try:
            received = receive([_upload(file) for file in files or ()], self.host.upload_folder())
        except UserError as error:
            return [self.update(), _answered(live.refusal(str(error), head="Not uploaded."))]
        return [str(received.folder), _answered(live.note(_arrived(received), received.skipped))]

    def _answer(self, screen: Screen, seen: str) -> list[Any]:
        """The components' new values. The result is sent only when it is another one: its prompt may be edited."""
        result = screen.result
        key = repr(result)
        fresh = {"result": {"visible": result is not None}}
        if result is not None:
            fresh["file"] = {"value": result.file}
            fresh["prompt"] = {"value": result.prompt}
            fresh["compare"] = {"visible": bool(result.grid)}
            fresh["grid"] = {"value": result.grid}
        changes = fresh if key != seen else {}
        beat = f'<span data-active="{int(screen.active)}" data-beat="{time.time():.3f}"></span>'
        values = {
            "checkpoint": screen.checkpoint,
            "panel": screen.panel,
            "log": screen.log,
            "jobs": screen.jobs,
            "stop": self.update(interactive=screen.stoppable),
            "pause": self.update(
                value="Continue" if screen.resumable else "Pause", interactive=screen.resumable or screen.pausable
            ),
            "use_rate": self.update(value=screen.offer or "Use it", visible=bool(screen.offer)),
            "beat": beat,
            "seen": key,
        }
        return [values[name] if name in values else self.update(**changes.get(name, {})) for name in self.SCREEN]


def _answered(html: str) -> str:
    """Marked with the time: the page's script knows by it that its click was answered, be it in the same words."""
    return f'{html}<span data-at="{time.time():.3f}"></span>'


def _upload(file: Any) -> Upload:
    """A file as gradio 3 (a wrapper with the browser's name) or gradio 4 (a path) gives it."""
    path = getattr(file, "name", file)
    return Upload(PurePath(getattr(file, "orig_name", None) or path).name, Path(path))


def _arrived(received: Received) -> str:
    captions = f", {received.captions} caption file{'s' * (received.captions != 1)}" if received.captions else ""
    return f"{received.pictures} picture{'s' * (received.pictures != 1)}{captions} received."
