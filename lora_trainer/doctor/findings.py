"""What the doctor says: findings, and the report that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["error", "warning", "advice"]
LEVELS: tuple[Level, ...] = ("error", "warning", "advice")

# Every kind of finding, in the order of a report, and its heading.
KINDS = {
    "no-pictures": "No pictures",
    "folder": "Folders that cannot be read",
    "unreadable": "Pictures that cannot be read",
    "tiny": "Pictures that are left out as too small",
    "caption-file": "Caption files with mistakes",
    "caption-missing": "Pictures without a caption",
    "caption-empty": "Empty captions",
    "not-read": "Files that are not read",
    "caption-orphan": "Captions without a picture",
    "blank": "Blank pictures",
    "duplicate": "The same picture twice",
    "near-duplicate": "Nearly the same picture",
    "small": "Small pictures",
    "blurry": "Blurry pictures",
    "aspect": "Pictures that lose their ends",
    "bars": "Bars or frames around pictures",
    "watermark": "The same mark on many pictures",
    "caption-name": "Captions made from file names",
    "caption-generic": "Captions that say nothing",
    "caption-identical": "One caption for many pictures",
    "trigger": "Trigger words",
    "imbalance": "Concepts of unequal size",
    "count": "How many pictures",
    "mistyped": "Names that tell another format",
    "animated": "Animations",
    "transparent": "Transparent pictures",
    "exif": "Much data beside the picture",
    "tag-once": "Tags that appear once",
    "square": "Everything is square",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: with which files, why that matters, and what mends it.

    An error stops a training or takes something out of it, a warning makes the LoRA worse, advice is worth a look.
    """

    kind: str
    level: Level
    files: tuple[Path, ...]
    reason: str
    mend: str


@dataclass(frozen=True)
class Report:
    """All findings about `folder`, the worst first. `looked_at` of its `pictures` were opened, `usable` of these can
    be trained on at `resolution`."""

    folder: Path
    resolution: int
    pictures: tuple[Path, ...]
    looked_at: int
    usable: int
    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """How many findings are of this level."""
        return Counter(finding.level for finding in self.findings)[level]

    def grouped(self) -> list[list[list[Finding]]]:
        """The findings of one level and kind together, in them those that the same mends."""
        kinds: dict[tuple[str, str], dict[str, list[Finding]]] = {}
        for finding in self.findings:
            kinds.setdefault((finding.level, finding.kind), {}).setdefault(finding.mend, []).append(finding)
        return [list(by_mend.values()) for by_mend in kinds.values()]

    def name(self, file: Path) -> str:
        """A file as the report calls it: relative to the folder where it is inside."""
        return file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else str(file)

    def as_dict(self) -> dict[str, object]:
        """For machines; keys are only ever added."""
        return {
            "folder": str(self.folder),
            "resolution": self.resolution,
            "pictures": len(self.pictures),
            "looked_at": self.looked_at,
            "usable": self.usable,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "advice": self.count("advice"),
            "findings": [
                {
                    "kind": finding.kind,
                    "level": finding.level,
                    "files": [self.name(file) for file in finding.files],
                    "reason": finding.reason,
                    "mend": finding.mend,
                }
                for finding in self.findings
            ],
        }


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, then by kind, then by file."""
    kinds = list(KINDS)
    return tuple(sorted(findings, key=lambda f: (LEVELS.index(f.level), kinds.index(f.kind), f.files[:1], f.reason)))


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
