"""A folder to a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_trainer.config.schema import Concept
from lora_trainer.dataset.items import read_folder
from lora_trainer.doctor import check_balance, check_captions, check_files, check_likeness, check_pictures
from lora_trainer.doctor.findings import Finding, Report, ordered
from lora_trainer.doctor.pictures import Picture, look
from lora_trainer.doctor.subject import Subject, Wanted
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Progress

MAX_WORKERS = 8
CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    *check_files.CHECKS,
    *check_captions.CHECKS,
    *check_pictures.CHECKS,
    *check_likeness.CHECKS,
    *check_balance.CHECKS,
)


def examine(
    folder: Path,
    *,
    metadata: Path | None = None,
    concepts: Sequence[Concept] = (),
    wanted: Wanted | None = None,
    sink: EventSink = lambda event: None,
    most_seconds: float = float("inf"),
) -> Report:
    """Everything that is wrong with `folder`, as training with these settings would read it.

    After `most_seconds` no more pictures are opened; the report says how many were. Raises DataError when there is no
    such folder.
    """
    wanted = wanted or Wanted()
    problems: list[tuple[Path, str]] = []

    def complain(place: Path, problem: DataError) -> None:
        problems.append((place, str(problem)))

    contents = read_folder(folder, metadata=metadata, concepts=concepts, complain=complain)
    pictures = tuple(_pictures(contents.images, sink, most_seconds))
    subject = Subject(folder, contents, tuple(problems), pictures, wanted)
    findings = ordered(finding for check in CHECKS for finding in check(subject))
    return Report(folder, wanted.resolution, contents.images, len(pictures), subject.usable, findings)


def _pictures(paths: tuple[Path, ...], sink: EventSink, most_seconds: float) -> Iterator[Picture]:
    end = time.monotonic() + most_seconds
    for done, picture in enumerate(look(paths, min(MAX_WORKERS, os.cpu_count() or 1)), start=1):
        sink(Progress(stage="looking at pictures", done=done, total=len(paths)))
        yield picture
        if time.monotonic() > end:
            return
