"""The settings as JSON Schema, from their declaration."""

from __future__ import annotations

from typing import Any

import msgspec

from lora_trainer.config.options import Option, options
from lora_trainer.config.schema import GROUPS, TRUSTED, Config

FILLED_BY_HOST = frozenset({"base_model", "output_dir", "cache_dir"})


def settings_schema() -> dict[str, Any]:
    """An object schema whose properties also carry their group."""
    declared = msgspec.json.schema(Config)["$defs"]["Config"]["properties"]
    for key, option in options().items():
        if option.struct:
            declared[key]["items"] = _entry(option.struct)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of a LoRA Trainer job",
        "type": "object",
        "groups": list(GROUPS),
        "properties": {
            key: _property(declared[key], option) for key, option in options().items() if key not in TRUSTED
        },
        "required": [key for key, option in options().items() if option.required and key not in FILLED_BY_HOST],
        "additionalProperties": False,
    }


def _entry(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """What a list of structs takes: their objects, or a text with the first field."""
    return {"anyOf": [{"type": "string"}, msgspec.json.schema(struct)["$defs"][struct.__name__]]}


def _property(declared: dict[str, Any], option: Option) -> dict[str, Any]:
    """What msgspec leaves out: the help where null is allowed too, a list's default, and the group."""
    default = {} if option.required else {"default": option.default}
    return {**declared, **default, "description": option.help, "group": option.group}
