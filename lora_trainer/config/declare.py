"""How a setting is declared: its group, its help and its bounds."""

from __future__ import annotations

from typing import Any

from msgspec import Meta


def about(group: str, text: str, **bounds: Any) -> Meta:
    """What stands beside a field's type."""
    return Meta(description=text, extra={"group": group}, **bounds)
