"""A report as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_trainer.doctor.findings import KINDS, LEVELS, Finding, Report, few
from lora_trainer.errors import printable

SHOWN = 5


def lines(report: Report) -> Iterator[str]:
    """Counts first, then each kind of finding with its files and what mends it."""
    yield printable(summary(report))
    for kind in report.grouped():
        yield ""
        yield heading(kind)
        for findings in kind:
            for finding in findings[:SHOWN]:
                yield printable(f"  {described(report, finding)}")
            if len(findings) > SHOWN:
                yield f"  … and {len(findings) - SHOWN:,} more"
            yield f"  → {findings[0].mend}"


def summary(report: Report) -> str:
    """How many pictures there are, and how many findings of each level."""
    found = ", ".join(_many(report.count(level), level) for level in LEVELS if report.count(level))
    looked = f", {report.looked_at:,} looked at" if report.looked_at < len(report.pictures) else ""
    pictures = f"{_many(len(report.pictures), 'picture')}{looked}, {report.usable:,} can be trained on"
    return f"{report.folder}: {pictures} at {report.resolution} px; {found or 'nothing to mend'}"


def heading(kind: Sequence[Sequence[Finding]]) -> str:
    """Over the findings of one kind."""
    first, total = kind[0][0], sum(map(len, kind))
    return f"{first.level}: {KINDS[first.kind]}" + (f" ({total:,})" if total > 1 else "")


def described(report: Report, finding: Finding) -> str:
    """One finding with its files."""
    files = few([report.name(file) for file in finding.files], SHOWN)
    return f"{files}: {finding.reason}" if files else finding.reason


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1 and word != 'advice')}"
