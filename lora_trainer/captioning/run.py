"""A folder captioned, picture by picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_trainer.captioning.books import Book, open_book
from lora_trainer.captioning.journal import Journal
from lora_trainer.captioning.options import CaptionOptions
from lora_trainer.captioning.rules import compose
from lora_trainer.captioning.words import Captioner
from lora_trainer.dataset.captions import MAX_CAPTION
from lora_trainer.dataset.images import ImageError, load_image
from lora_trainer.events import EventSink, Notice, Progress

STAGE = "captioning"
# What a killed process loses at most.
PUBLISH_PICTURES, PUBLISH_SECONDS = 20, 5.0


@dataclass
class Result:
    """What a run did; `kept` had a caption already or were done by an earlier run. Names are relative to the folder."""

    place: Path
    state: Literal["done", "stopped"] = "done"
    written: int = 0
    kept: int = 0
    unreadable: list[str] = field(default_factory=list)
    wordless: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For machines; keys are only ever added."""
        return {
            "state": self.state,
            "output": str(self.place),
            "written": self.written,
            "kept": self.kept,
            "unreadable": self.unreadable,
            "wordless": self.wordless,
            "refused": self.refused,
        }

    def summary(self) -> str:
        """One line for a person."""
        left = {
            "had a caption": self.kept,
            "could not be read": len(self.unreadable),
            "got no words": len(self.wordless),
            "could not be written": len(self.refused),
        }
        rest = "".join(f", {count:,} {what}" for what, count in left.items() if count)
        end = "" if self.state == "done" else "; stopped, run it again for the rest"
        return f"{self.written:,} captions written to {self.place}{rest}{end}"


def run(
    folder: Path,
    captioner: Captioner,
    options: CaptionOptions,
    *,
    output: Path | None = None,
    sink: EventSink = lambda event: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """Caption the pictures of `folder` as training reads it, into `output` (.csv or .jsonl), else where its captions
    are, else into .txt files. `stopping` is asked before each picture; what was done is on disk whatever happens.

    Raises UserError: a folder or caption file that training could not read either, a captioner that cannot be used,
    an output that cannot be written.
    """
    book, notes = open_book(folder, output, overwrites=options.existing != "skip")
    for note in notes:
        sink(Notice(text=note))
    journal = Journal(book.place, captioner.name, options)
    names = {image: image.relative_to(folder).as_posix() for image in book.images}
    done = {image for image, name in names.items() if name in journal.done}
    if options.existing == "skip":
        done = {image for image in book.images if book.before(image)}
    todo = [image for image in book.images if image not in done]
    result = Result(book.place, kept=len(done))
    desk, publishing = _Desk(captioner, options, book, result, sink), _Publishing(book, journal)
    began = time.monotonic()
    try:
        for number, image in enumerate(todo, start=1):
            if stopping():
                result.state = "stopped"
                break
            desk.caption(image, names[image])
            journal.done.add(names[image])
            publishing.tick()
            eta = (time.monotonic() - began) / number * (len(todo) - number)
            sink(Progress(stage=STAGE, done=number, total=len(todo), eta=eta))
    finally:
        try:
            publishing.now()
        finally:
            captioner.rest()
    if result.state == "done":
        journal.close()
    return result


@dataclass(frozen=True)
class _Desk:
    captioner: Captioner
    options: CaptionOptions
    book: Book
    result: Result
    sink: EventSink

    def caption(self, image: Path, name: str) -> None:
        """Caption one picture, or say why not."""
        refusal = self.book.refusal(image)
        if refusal is not None:
            self._left(self.result.refused, name, f"left as it is: {refusal}")
            return
        try:
            picture = load_image(image)
        except ImageError as error:
            self._left(self.result.unreadable, name, error.why)
            return
        before = self.book.before(image)
        caption = compose(self.captioner.caption(picture), before, self.options)
        if not caption:
            self._left(self.result.wordless, name, f"left without a caption: {self.captioner.name} has no words for it")
        elif len(caption) > MAX_CAPTION:
            # No training reads such a file again.
            wrong = f"its caption would have {len(caption):,} characters, expected at most {MAX_CAPTION:,}"
            self._left(self.result.refused, name, f"left as it is: {wrong}; raise the threshold")
        elif caption == before:
            self.result.kept += 1
        else:
            self.book.put(image, caption)
            self.result.written += 1

    def _left(self, names: list[str], name: str, why: str) -> None:
        names.append(name)
        self.sink(Notice(text=f"{name}: {why}", level="warning"))


class _Publishing:
    """Every few pictures, and at the end: captions first, then the journal that calls them done."""

    def __init__(self, book: Book, journal: Journal) -> None:
        self._book, self._journal = book, journal
        self._count, self._at = 0, time.monotonic()

    def tick(self) -> None:
        self._count += 1
        if self._count >= PUBLISH_PICTURES or time.monotonic() - self._at >= PUBLISH_SECONDS:
            self.now()

    def now(self) -> None:
        self._book.publish()
        self._journal.publish()
        self._count, self._at = 0, time.monotonic()
