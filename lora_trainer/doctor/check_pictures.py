"""Findings about what single pictures show, and at what size.

The thresholds were measured on 23 photographs (the samples of scikit-image, scikit-learn, matplotlib and gradio) and
on the 120 flat icons of the demo.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.dataset.buckets import MAX_ASPECT, Placement, place
from lora_trainer.doctor.findings import Finding
from lora_trainer.doctor.subject import Subject

# Sharp photographs have 153 and more, icons 400 and more; blurred by a radius of 2 px at 512 px, none has over 36.
BLURRY = 50.0
# Grey levels. The faintest photograph has 8; one color saved as JPEG has under 1.
BLANK = 2.0
# Up to 4:1 pictures have buckets, and lose at most a tenth to the nearest at 512 px; those of 5:1 lose a fifth.
MUCH_LOST = 0.15
# 511 × 511 is trained at 448 × 448, 77 % of the pixels, which is no harm.
MUCH_SMALLER = 0.7
_DELETE = "or delete it with its caption."
# A folder of fewer says nothing about how it was made.
MANY = 10


def sizes(subject: Subject) -> Iterator[Finding]:
    for file, where in subject.placed.items():
        if isinstance(where, str):
            yield Finding("tiny", "error", (file,), where.split(";")[0], f"Get it larger, {_DELETE}")
            continue
        bucket, (width, height) = where.bucket, where.original
        full = place(where.original, subject.wanted.resolution, allow_upscaling=True).bucket
        if bucket.area < MUCH_SMALLER * full.area:
            size = f"{width}×{height}, so it is trained at {bucket.width}×{bucket.height}"
            reason = f"{size} instead of {full.width}×{full.height}: coarse and soft in what is drawn"
            yield Finding("small", "warning", (file,), reason, "Get it larger; enlarging adds nothing to learn from.")
        elif max(width, height) > MAX_ASPECT * min(width, height) and (lost := _lost(where)) >= MUCH_LOST:
            reason = f"{width}×{height}: {lost:.0%} of it is cut off at both ends"
            mend = "Crop it to what matters, between 1:4 and 4:1, or cut it into several pictures."
            yield Finding("aspect", "warning", (file,), reason, mend)


def _lost(where: Placement) -> float:
    """Which share of the picture is outside its bucket."""
    return 1 - where.bucket.area / (where.resized[0] * where.resized[1])


def looks(subject: Subject) -> Iterator[Finding]:
    for file, measures in subject.measured():
        if measures.spread < BLANK:
            yield Finding("blank", "warning", (file,), "it is all one color", f"Get it anew, {_DELETE}")
        elif measures.sharpness is not None and measures.sharpness < BLURRY:
            reason = f"sharpness {measures.sharpness:.0f}; sharp pictures have {3 * BLURRY:.0f} and more"
            mend = "Leave it out unless softness is the style; an enlarged picture: use the original."
            yield Finding("blurry", "warning", (file,), reason, mend)
        if measures.bars and measures.spread >= BLANK:
            reason = f"bars of one color take {measures.bars:.0%} of it; the LoRA would draw them too"
            yield Finding("bars", "warning", (file,), reason, "Crop them away.")


def square(subject: Subject) -> Iterator[Finding]:
    shapes = [where.original for where in subject.placed.values() if isinstance(where, Placement)]
    if len(shapes) >= MANY and all(width == height for width, height in shapes):
        reason = f"all {len(shapes)} pictures are square; any shape from 1:4 to 4:1 is trained as it is"
        mend = "If they were cropped for the training, use the originals."
        yield Finding("square", "advice", (), reason, mend)


CHECKS = (sizes, looks, square)
