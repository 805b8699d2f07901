"""What the API answers, before it becomes a framework's response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import msgspec


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(content: object) -> Answer:
    """`content` as JSON; numbers that are not finite become null."""
    return Answer(200, msgspec.json.encode(content, enc_hook=_plain))


def problem(status: int, *lines: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, msgspec.json.encode({"errors": lines}), headers or {})


def _plain(value: Any) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
