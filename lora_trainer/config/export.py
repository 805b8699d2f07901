"""A config's ways out: the file header, the YAML beside the output, the template and the table of options."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

import msgspec
import yaml

from lora_trainer.config.adapting import LORA
from lora_trainer.config.modes import Modes
from lora_trainer.config.options import Option, options
from lora_trainer.config.presets import FAMILIES, PRESETS, Preset
from lora_trainer.config.schema import GROUPS, PATHS, TRUSTED, Config

PRIVATE = ("sample_prompts", "sample_negative_prompt")
TEXT_ENCODER = ("train_text_encoder", "text_encoder_rank", "text_encoder_alpha", "text_encoder_lr", "text_encoder_2_lr")
# What an ordinary LoRA says of itself; of the other settings of what is trained only those that were made.
PLAIN = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "train_text_encoder", "text_encoder_lr")
MODE = tuple(Modes.__struct_fields__)
TABLE_START, TABLE_END = "<!-- options:start -->", "<!-- options:end -->"
PRESETS_START, PRESETS_END = "<!-- presets:start -->", "<!-- presets:end -->"


def to_yaml(config: Config) -> str:
    """The whole config; reading it back gives an equal one."""
    return dump(msgspec.to_builtins(config))


def dump(settings: dict[str, object]) -> str:
    """Settings as YAML, in their order."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML folds a text at its line breaks, and loses those of Unicode when it is read again."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def to_header(config: Config) -> str:
    """JSON for the file's header: absolute paths and previews are left out unless `metadata_private`, and the settings
    of a text encoder that is not trained and of modes that are not used, what makes a LoRA no ordinary one and was not
    asked for, and always what names code."""
    values = {key: value for key, value in msgspec.to_builtins(config).items() if key not in TRUSTED}
    usual = {o.key: o.default for o in _of(LORA) if o.key not in PLAIN}
    values = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    if not config.train_text_encoder:
        values = {key: value for key, value in values.items() if key not in TEXT_ENCODER}
    if config.mode == "images":
        values = {key: value for key, value in values.items() if key not in MODE}
    if not config.metadata_private:
        values = {key: value for key, value in values.items() if key not in PRIVATE and not _reveals(key, value)}
        values["concepts"] = [
            {key: _inside(text) if key in ("folder", "regularization") else text for key, text in concept.items()}
            for concept in values["concepts"]
        ]
        if "sample_prompts" not in values:
            values.pop("sample_every")
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


def _reveals(key: str, value: object) -> bool:
    """Absolute paths, and those that climb out of the current folder, say where somebody keeps things."""
    return key in PATHS and isinstance(value, str) and _is_elsewhere(value)


def _inside(folder: str) -> str:
    """Of a concept's folder what tells nothing: its name."""
    return PureWindowsPath(folder).name or "." if _is_elsewhere(folder) else folder


def _is_elsewhere(value: str) -> bool:
    return value[:1] in "/\\~" or value[1:2] == ":" or ".." in value.replace("\\", "/").split("/")


def template() -> str:
    """configs/lora_default.yaml: every option with its default, help and bounds."""
    lines = ["# Every option of LoRA Trainer with its default. Made from the declaration: do not edit.", ""]
    for group in GROUPS:
        lines += [f"# --- {group} ---", ""]
        for option in _of(group):
            lines += [f"# {option.help}", f"# Values: {option.expected}."]
            lines += [_template_line(option), ""]
    return "\n".join(lines).rstrip() + "\n"


def table() -> str:
    """The options as Markdown."""
    lines = []
    for group in GROUPS:
        lines += [f"**{group}**", "", "| key | what it does | values | default |", "|---|---|---|---|"]
        lines += [_row(f"`{o.key}`", o.help, o.expected, _default(o)) for o in _of(group)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def preset_table() -> str:
    """The presets as Markdown."""
    rows = [_row(f"`{name}`", preset.why, preset_text(preset)) for name, preset in PRESETS.items()]
    return "\n".join(["| preset | why | sets |", "|---|---|---|", *rows]) + "\n"


def preset_text(preset: Preset) -> str:
    """What a preset sets: for every family, then what it adds for each."""
    parts = [("", preset.values), *((name, getattr(preset, family)) for family, name in FAMILIES.items())]
    return "; ".join(f"{f'{name}: ' * bool(name)}{_settings(values)}" for name, values in parts if values)


def _settings(values: Mapping[str, object]) -> str:
    return " ".join(f"`{key}={json.dumps(value).strip(chr(34))}`" for key, value in values.items())


def with_tables(readme: str) -> str:
    """A README with the tables of presets and of options between their markers."""
    for start, made, end in ((PRESETS_START, preset_table(), PRESETS_END), (TABLE_START, table(), TABLE_END)):
        before, _, rest = readme.partition(start)
        _, _, after = rest.partition(end)
        readme = f"{before}{start}\n{made}{end}{after}"
    return readme


def _row(*cells: str) -> str:
    """Of a table. A bar in a cell would end it."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _of(group: str) -> Iterator[Option]:
    return (option for option in options().values() if option.group == group)


def _template_line(option: Option) -> str:
    if option.required:
        example = {"base_model": "./models/Stable-diffusion/v1-5-pruned.safetensors"}
        return f'{option.key}: "{example.get(option.key, "./data/style_train")}"'
    if option.default is None:
        return f"# {option.key}:"
    return f"{option.key}: {json.dumps(option.default)}"


def _default(option: Option) -> str:
    if option.required:
        return "required"
    if option.default is None:
        return ""
    return f"`{json.dumps(option.default)}`"


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    (root / "configs" / "lora_default.yaml").write_text(template(), encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
