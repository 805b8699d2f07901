"""Sources to one checked Config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lora_trainer.config.convert import Problem, convert, unknown
from lora_trainer.config.options import options
from lora_trainer.config.presets import preset_values
from lora_trainer.config.rules import FORBIDDEN, MAX_NAME_BYTES, problems
from lora_trainer.config.schema import Config
from lora_trainer.errors import MAX_LINES, ConfigError


def build(*sources: Mapping[str, object], family: str = "sd15") -> Config:
    """The config of `sources`, of which later ones win; the preset that they name comes before them all, with its
    values for a model of `family`. Raises ConfigError with every problem at once."""
    given = {key: value for source in sources for key, value in source.items()}
    preset = preset_values(given.get("preset"), family)
    merged = {**preset, **given}
    if str(merged.get("mode")).lower() == "slider":
        # It draws its own pictures where it is given none.
        merged.setdefault("train_data_dir", "")
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
        found = [*_swamped(sources, preset, config), *problems(config)]
    if found:
        raise ConfigError([f"{line}{_origin(line, preset, given)}" for line in found])
    return config


def _swamped(sources: Sequence[Mapping[str, object]], preset: Mapping[str, object], config: Config) -> Iterator[str]:
    """A preset that lends nothing but its name: on top of a file that gives all of its settings, as those do that we
    write, or in a copy of the template."""
    naming = max((number for number, source in enumerate(sources) if "preset" in source), default=0)
    before = {key: value for source in sources[:naming] for key, value in source.items()}
    beside = {key for source in sources[naming:] for key in source}
    same = {key for source in sources for key in source if getattr(config, key) == options()[key].default}
    lost = all(key in same or (key in before and key not in beside) for key in preset)
    if preset and lost and before.get("preset") != config.preset:
        yield (
            f"preset: {config.preset} changes nothing, since {', '.join(preset)} "
            f"{'are' if len(preset) > 1 else 'is'} given too; leave out the preset, or these settings"
        )


def _origin(line: str, preset: Mapping[str, object], given: Mapping[str, object]) -> str:
    """Where a setting of a problem comes from that the user did not write."""
    words = set(re.findall(r"\w+", line))
    own = [f"{key}={_plain(value)}" for key, value in preset.items() if key in words and key not in given]
    return f" (preset {given['preset']} gives {', '.join(own)})" if own else ""


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value


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
    learned = config.slider_positive if config.mode == "slider" else Path(config.train_data_dir).resolve().name
    slug = re.sub(r"[\s_]+", "-", FORBIDDEN.sub("", learned)).strip("-. ") or "lora"
    length = f"s{config.max_train_steps}" if config.max_train_steps else f"e{config.epochs}"
    kept = slug.encode()[: MAX_NAME_BYTES - 30].decode(errors="ignore")
    return f"{kept}-r{config.lora_rank}-{length}"
