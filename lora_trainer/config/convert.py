"""One value of a source to one field's type, or a problem in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from lora_trainer.config.options import Option, options, options_of
from lora_trainer.config.yaml_text import YamlProblem, parse_yaml
from lora_trainer.errors import printable, shown

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class Problem(ValueError):
    """One line about one key."""


def convert(option: Option, value: object) -> Any:
    """`value` as the option's type. Raises Problem, which names key, expectation and value."""
    if option.struct and isinstance(value, (list, tuple)):
        return [_entry(option, number, entry) for number, entry in enumerate(value, start=1)]
    if option.struct:
        return [_entry(option, 1, value)]
    try:
        prepared = _prepare(option, value)
        result = msgspec.convert(prepared, option.type, strict=False)
    except (msgspec.ValidationError, ValueError, OverflowError):
        found = "nothing" if value is None else shown(value)
        raise Problem(f"{option.key}: expected {option.expected}, found {found}{_meant(option, value)}") from None
    if isinstance(result, float) and not math.isfinite(result):
        raise Problem(f"{option.key}: expected {option.expected}, found {shown(value)}")
    return result


def _meant(option: Option, value: object) -> str:
    """The choices that are written nearly like that."""
    word = value.lower() if isinstance(value, str) and len(value) < 100 else ""
    near = get_close_matches(word, option.choices, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _entry(option: Option, number: int, value: object) -> msgspec.Struct:
    """One struct of a list: a mapping, or a text with its first field or with {a mapping}. Raises Problem."""
    assert option.struct is not None
    fields, where = options_of(option.struct), f"{option.key}, entry {number}"
    first, *others = fields
    if isinstance(value, str):
        try:
            value = parse_yaml(value) if value.lstrip().startswith("{") else {first: value}
        except YamlProblem as problem:
            raise Problem(f"{where}: expected {{{first}: …}}, found {shown(value)} ({problem})") from None
    if isinstance(value, option.struct):
        value = msgspec.to_builtins(value)
    if not isinstance(value, Mapping):
        raise Problem(f"{option.key}: expected {option.expected}, found {shown(value)}")
    strange = [key for key in value if key not in fields]
    if strange:
        raise Problem(f"{where}: expected {', '.join([first, *others])}, found {shown(strange[0])}")
    if first not in value:
        raise Problem(f"{where}: expected a {first}, found none")
    try:
        return option.struct(**{key: convert(fields[key], given) for key, given in value.items()})
    except Problem as problem:
        raise Problem(f"{where}, {problem}") from None


def unknown(key: str) -> str:
    """The problem of a key that does not exist."""
    near = get_close_matches(key, options(), n=1, cutoff=0.6) if len(key) < 100 else []
    hint = f"; did you mean {near[0]}?" if near else "; `lora-trainer options` lists all"
    return f"{printable(key, 100)}: no such option{hint}"


def _prepare(option: Option, value: object) -> object:
    """What YAML and the shell blur, by the field's type. Raises ValueError."""
    if value is None:
        return None
    if option.kind is Literal:
        # YAML reads a bare `no` as False; other trainers write AdamW8bit.
        word = value.lower() if isinstance(value, str) else "no" if value is False else value
        return word if word in option.choices else value
    if option.kind is bool:
        return _boolean(value)
    if isinstance(value, bool):
        raise ValueError
    if option.kind is list:
        if option.numbers and isinstance(value, str):
            value = value.replace(",", " ").split()
        each = _whole if option.numbers else _text
        return [each(entry) for entry in value] if isinstance(value, (list, tuple)) else [each(value)]
    if option.kind is str:
        return _text(value)
    if option.kind is int:
        return _whole(value)
    return float(value) if isinstance(value, (str, int, float)) else value


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else None
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError


def _whole(value: object) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    text = str(value)
    text.encode()  # half of a surrogate pair is a ValueError: neither a file nor a page could hold it
    return text
