"""Sources to one checked Config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lora_trainer.config.convert import Problem, convert, unknown
from lora_trainer.config.options import options
from lora_trainer.config.rules import FORBIDDEN, MAX_NAME_BYTES, problems
from lora_trainer.config.schema import Config
from lora_trainer.errors import MAX_LINES, ConfigError


def build(*sources: Mapping[str, object]) -> Config:
    """The config of `sources`, of which later ones win. Raises ConfigError with every problem at once."""
    merged = {key: value for source in sources for key, value in source.items()}
    strange = [key for key in merged if key not in options()]
    # Searching a near name takes its time, and ConfigError shows no more of them.
    found = [unknown(key) for key in strange[: MAX_LINES + 1]]
    values: dict[str, Any] = {}
    for key, option in options().items():
        if key not in merged:
            if option.required:
                found.append(f"{key}: missing; add {key}=… ({option.help.rstrip('.')})")
            continue
        try:
            values[key] = convert(option, merged[key])
        except Problem as problem:
            found.append(str(problem))
    if not found:
        config = Config(**values)
        found = problems(config)
    if found:
        raise ConfigError(found)
    return config


def replace(config: Config, **changes: object) -> Config:
    """`config` with `changes`, checked anew. Raises ConfigError."""
    return build(msgspec.to_builtins(config), changes)


def trigger_words_of(config: Config) -> str:
    """The words that call the LoRA: the run's, then those of its concepts."""
    return words_of(msgspec.to_builtins(config))


def words_of(settings: Mapping[str, Any]) -> str:
    """The same of a config's plain values, such as a job keeps."""
    concepts = settings.get("concepts") or ()
    words = [settings.get("trigger_words") or "", *(concept.get("trigger_words") or "" for concept in concepts)]
    return ", ".join(dict.fromkeys(text for word in words if (text := word.strip(" ,"))))


def output_name_of(config: Config) -> str:
    """The LoRA's name: the one given, else a readable one such as `style-train-r8-e10`."""
    if config.output_name is not None:
        return config.output_name
    folder = FORBIDDEN.sub("", Path(config.train_data_dir).resolve().name)
    slug = re.sub(r"[\s_]+", "-", folder).strip("-. ") or "lora"
    length = f"s{config.max_train_steps}" if config.max_train_steps else f"e{config.epochs}"
    kept = slug.encode()[: MAX_NAME_BYTES - 30].decode(errors="ignore")
    return f"{kept}-r{config.lora_rank}-{length}"
