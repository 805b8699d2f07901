"""The declaration, read back: one Option a field."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from lora_trainer.config.schema import Config

_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """A setting as users meet it. `kind` is its plain type: bool, int, float, str, list or Literal; `struct` what a
    list holds where that is no text."""

    key: str
    type: Any
    kind: Any
    choices: tuple[str, ...]
    meta: Meta
    default: Any
    required: bool
    optional: bool
    struct: type[msgspec.Struct] | None = None
    entry: Meta | None = None

    @property
    def numbers(self) -> bool:
        """Whether it is a list of whole numbers, within the bounds of `entry`."""
        return self.entry is not None

    @property
    def help(self) -> str:
        return self.meta.description

    @property
    def group(self) -> str:
        return self.meta.extra["group"]

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            words = (
                " or ".join([", ".join(self.choices[:-1]), self.choices[-1]]) if self.choices[1:] else self.choices[0]
            )
        elif self.numbers:
            words = " ".join(["a list of whole numbers", *_bounds(self.entry)])
        elif self.struct:
            first, *others = options_of(self.struct)
            words = f"a list of {first}s or of {{{', '.join([first, *others])}}}"
        elif self.kind is list:
            words = "a list of texts" if not self.meta.min_length else "a list of at least one text"
        else:
            words = " ".join([_NOUNS[self.kind], *_bounds(self.meta)])
        return words + (" or nothing" if self.optional else "")


def options() -> dict[str, Option]:
    """Every option of a training by its key, in the order of the declaration."""
    return options_of(Config)


@cache
def options_of(declaration: type[msgspec.Struct]) -> dict[str, Option]:
    """Every option that a declaration holds, by its key."""
    hints = get_type_hints(declaration, include_extras=True)
    return {field.name: _option(field, hints[field.name]) for field in msgspec.structs.fields(declaration)}


def _option(field: msgspec.structs.FieldInfo, hint: Any) -> Option:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    annotated = next(part for part in parts if get_origin(part) is Annotated)
    inner, meta = get_args(annotated)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    held = get_args(inner)[0] if get_origin(inner) is list else None
    entry = get_args(held)[1] if get_origin(held) is Annotated else None
    default = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    return Option(
        key=field.name,
        type=hint,
        kind=Literal if choices else get_origin(inner) or inner,
        choices=choices,
        meta=meta,
        default=None if default is msgspec.NODEFAULT else default,
        required=field.required,
        optional=len(parts) > 1,
        struct=held if isinstance(held, type) and issubclass(held, msgspec.Struct) else None,
        entry=entry,
    )


def _bounds(m: Meta) -> Iterator[str]:
    low = f"{_number(m.ge)}" if m.ge is not None else f"more than {_number(m.gt)}" if m.gt is not None else None
    high = f"{_number(m.le)}" if m.le is not None else f"less than {_number(m.lt)}" if m.lt is not None else None
    if low and high:
        yield f"from {low} to {high}"
    elif low:
        yield low if m.gt is not None else f"of at least {low}"
    if m.multiple_of is not None:
        yield f"in steps of {m.multiple_of}"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
