"""What comes out of another trainer's file: settings, and everything that did not become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lora_trainer.config.convert import Problem, convert
from lora_trainer.config.options import options

OFF = "switched off there, as here"


@dataclass(frozen=True)
class Left:
    """A value that did not become a setting, and why."""

    key: str
    value: object
    why: str


@dataclass
class Taken:
    """Settings as they are found; `remarks` say what is the same thing under another name or number."""

    settings: dict[str, Any] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def take(self, option: str, value: object, source: str) -> None:
        """`value` of the other trainer's key `source` as our `option`; left, where ours does not allow it."""
        if option not in options():
            self.leave(source, value, "no such option here")
            return
        try:
            converted = convert(options()[option], value)
        except Problem as problem:
            self.leave(source, value, str(problem))
            return
        before = self.settings.get(option, converted)
        if before != converted:
            self.leave(source, value, f"{option} is {before!r} already: it holds for the whole run")
        else:
            self.settings[option] = converted

    def leave(self, key: str, value: object, why: str) -> None:
        self.left.append(Left(key, value, why))

    def leave_all(self, values: Mapping[str, object], reasons: Mapping[str, str], prefix: str = "") -> None:
        """The rest: each with its reason, or as unknown; what is switched off there is no loss."""
        for key, value in values.items():
            why = OFF if _is_off(value) else reasons.get(key, "no such option here")
            self.leave(prefix + key, value, why)

    def plain(self) -> dict[str, Any]:
        """The settings as YAML can hold them."""
        return msgspec.to_builtins(self.settings)


def side_of(value: object) -> tuple[int, bool] | None:
    """(our resolution, whether it means the same) of 512, [512, 768] or "512,768", in pixels; None of anything else."""
    parts: Sequence[object] = value.split(",") if isinstance(value, str) else [value]
    if isinstance(value, (list, tuple)):
        parts = value
    try:
        sides = [int(part) for part in parts if not isinstance(part, bool)]  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    if len(sides) not in (1, 2) or len(sides) != len(parts) or not all(0 < side < 100_000 for side in sides):
        return None
    side = math.sqrt(sides[0] * sides[-1])
    rounded = max(64, round(side / 64) * 64)
    return rounded, side == rounded and sides[0] == sides[-1]


def _is_off(value: object) -> bool:
    return value in (None, False, 0, "", "none", "None") or value in ([], {})
