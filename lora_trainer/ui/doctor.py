"""What the doctor found, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from lora_trainer.doctor.findings import KINDS, Finding, Report
from lora_trainer.doctor.text import described, summary
from lora_trainer.errors import printable
from lora_trainer.ui.words import safe

SHOWN = 20
HELP = "Looks for files that cannot be read, duplicates, blur, weak captions and more, before you train."


def findings(report: Report) -> str:
    """The counts, then each kind of finding, folded unless it is an error."""
    rest = report.looked_at < len(report.pictures)
    command = "Only a part was looked at in time; lora-trainer check looks at all." if rest else ""
    kinds = "".join(_kind(report, kind) for kind in report.grouped())
    return (
        f'<div class="lt-findings" role="status"><div class="lt-note">{safe(printable(summary(report)))}</div>'
        f'<div class="lt-note">{safe(command)}</div>{kinds}</div>'
    )


def _kind(report: Report, kind: Sequence[Sequence[Finding]]) -> str:
    first, total = kind[0][0], sum(map(len, kind))
    count = f" ({total:,})" if total > 1 else ""
    parts = "".join(_same_mend(report, found) for found in kind)
    return (
        f'<details class="lt-finding"{" open" if first.level == "error" else ""}><summary>'
        f'<span class="lt-chip lt-level-{safe(first.level)}">{safe(first.level)}</span> '
        f"{safe(KINDS[first.kind])}{count}</summary>{parts}</details>"
    )


def _same_mend(report: Report, found: Sequence[Finding]) -> str:
    rows = "".join(f"<li>{safe(printable(described(report, finding)))}</li>" for finding in found[:SHOWN])
    more = f"<li>… and {len(found) - SHOWN:,} more</li>" if len(found) > SHOWN else ""
    return f'<ul>{rows}{more}</ul><div class="lt-advice">{safe(found[0].mend)}</div>'
