"""Findings about files: what cannot be read, and what is passed over in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_trainer.dataset.captions import MAX_FILE_BYTES
from lora_trainer.dataset.images import is_picture
from lora_trainer.dataset.items import METADATA_NAMES, OTHER_PICTURES, SIDECARS, sidecars
from lora_trainer.doctor.findings import Finding
from lora_trainer.doctor.kinds import PICTURES, READ, kind_of
from lora_trainer.doctor.subject import Subject

# The most EXIF that fits into a JPEG's one segment for it; cameras write 5 to 60 KiB.
MUCH_EXIF = 65_536
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_SAVE_AGAIN = "Save it as PNG or JPEG in a picture editor; if that fails, get it anew, or delete it with its caption."


def problems(subject: Subject) -> Iterator[Finding]:
    """What stops a training before it looks at pictures."""
    for place, text in subject.problems:
        reason = text.removeprefix(str(place)).lstrip(":, ")
        if place == subject.folder and not subject.contents.images:
            yield Finding("no-pictures", "error", (), reason, "Name the folder that the pictures are in.")
        elif place.is_dir():
            yield Finding("folder", "error", (place,), reason, "Give yourself the right to read it, or move it away.")
        else:
            mend = "Mend what it names, in a text editor or a spreadsheet; save it as UTF-8."
            yield Finding("caption-file", "error", (place,), reason, mend)


def unreadable(subject: Subject) -> Iterator[Finding]:
    for picture in subject.pictures:
        if picture.error is None:
            continue
        kind = kind_of(picture.path)
        reason = f"{picture.error}; its content is {kind}" if kind and kind not in READ else picture.error
        yield Finding("unreadable", "error", (picture.path,), reason, _SAVE_AGAIN)


def mistyped(subject: Subject) -> Iterator[Finding]:
    """Training reads the content, whatever the name says; other programs do not."""
    for picture in subject.readable:
        assert picture.facts is not None
        suffixes = _SUFFIXES[picture.facts.format]
        if picture.path.suffix.lower() not in suffixes:
            reason = f"its content is {picture.facts.format}; training reads it, other programs may not"
            mend = f"Rename it to end in {suffixes[0]}."
            yield Finding("mistyped", "advice", (picture.path,), reason, mend)


def not_read(subject: Subject) -> Iterator[Finding]:
    """Pictures that training does not see."""
    for file in subject.contents.others:
        suffix = file.suffix.lower()
        if suffix in OTHER_PICTURES:
            yield Finding("not-read", "warning", (file,), f"{suffix} pictures are not read", "Save it as PNG or JPEG.")
        elif (kind := kind_of(file)) in PICTURES:
            reason = f"a {kind} picture whose name does not say so is not read"
            yield Finding("not-read", "warning", (file,), reason, "Rename it to end in its format, such as .jpg.")
    for place in subject.contents.deeper:
        if any(map(is_picture, _inside(place))):
            reason = "only the folder and its direct sub-folders are read"
            yield Finding("not-read", "warning", (place,), reason, "Move its pictures up.")
    for name in subject.contents.unnamed:
        reason = f"{name}: the file's name is not Unicode"
        yield Finding("not-read", "warning", (), reason, "Rename it.")


def _inside(place: Path) -> list[Path]:
    try:
        return [entry for entry in place.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def orphans(subject: Subject) -> Iterator[Finding]:
    """Text files that no picture's name fits; a read-me is none of them."""
    images = subject.contents.images
    expected = {place for image in images for place in sidecars(image)}
    texts = [file for file in subject.contents.others if file.suffix.lower() in SIDECARS and file not in expected]
    # Of a folder without any sidecar, one text is notes.
    uses_sidecars = any(file in expected for file in subject.contents.others)
    for file in texts:
        if uses_sidecars and file.name not in METADATA_NAMES and file.stat().st_size <= MAX_FILE_BYTES:
            mend = "Give it the name of its picture, or delete it."
            yield Finding("caption-orphan", "warning", (file,), "no picture has this name", mend)


def left_out(subject: Subject) -> Iterator[Finding]:
    """What training leaves out of readable files."""
    for picture in subject.readable:
        assert picture.facts is not None
        if picture.facts.animated:
            reason = "only its first frame is trained on"
            yield Finding("animated", "advice", (picture.path,), reason, "Save the frame that you want as PNG.")
        elif picture.facts.transparent and not subject.wanted.masked:
            reason = "what is transparent becomes white"
            mend = "Lay it on the background that you want, and save it without transparency."
            yield Finding("transparent", "advice", (picture.path,), reason, mend)
        if picture.facts.exif > MUCH_EXIF:
            reason = f"{picture.facts.exif / 1024:,.0f} KiB of EXIF beside the picture, which training ignores"
            yield Finding("exif", "advice", (picture.path,), reason, "Save it again without EXIF.")


CHECKS = (problems, unreadable, mistyped, not_read, orphans, left_out)
