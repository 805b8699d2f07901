"""Numbers and errors in words, and text made safe for the page."""

from __future__ import annotations

import re
from html import escape

from lora_trainer.config.options import options
from lora_trainer.ui.fields import label

_ADVICE = (
    (r"out of memory|alloc", "Lower the batch size to 2 or 1, or switch on gradient checkpointing; then train again."),
    (r"not finite|\bnan\b", "Lower the learning rate to a quarter; then train again."),
)


def safe(text: object) -> str:
    """`text` as it stands, whatever it holds."""
    return escape(str(text), quote=True)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def duration(seconds: float) -> str:
    """A length of time as one would say it."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s" if whole < 600 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def step_time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def memory(size: int, available: int | None = None) -> str:
    if available is not None:
        return f"{size / 1024**3:.1f} of {available / 1024**3:.1f} GiB"
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / 1024**2:.0f} MiB"


def advice(error: str) -> str:
    """What to do about an error that does not say so itself."""
    known = (text for pattern, text in _ADVICE if re.search(pattern, error, re.IGNORECASE))
    return next(known, "Mend what it names, then press Continue, or train again.")


def problem(line: str) -> str:
    """One line of an error as HTML; a setting it begins with also gets the words of its control."""
    key, colon, rest = line.partition(":")
    if colon and key in options():
        return f"<b>{safe(label(key))}</b> <code>{safe(key)}</code>:{safe(rest)}"
    return safe(line)
