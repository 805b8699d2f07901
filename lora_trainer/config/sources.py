"""Where settings come from: files, LoRA headers and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_trainer.config.header import read_json_header
from lora_trainer.config.options import options
from lora_trainer.config.presets import preset_keys
from lora_trainer.config.schema import TRUSTED
from lora_trainer.config.yaml_text import YamlProblem, parse_yaml
from lora_trainer.errors import ConfigError

# Where SDXL checkpoints keep their two text encoders, and what begins Stable Diffusion 3's blocks.
SDXL, SD3 = "conditioner.embedders.", "model.diffusion_model.joint_blocks."
HEADER_KEY = "lora_trainer_config"
# Of more than this, reading YAML takes seconds.
MAX_FILE_BYTES = 64 * 1024


def read_file(path: Path) -> Mapping[str, object]:
    """The settings of a .yaml, .yml or .json file, or of a LoRA's header. Raises ConfigError."""
    if path.suffix.lower() == ".safetensors":
        return _header_config(path)
    try:
        data = _read(path)
        text = data.decode("utf-8-sig")
        loaded = json.loads(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}"]
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}, line {error.lineno}: not valid JSON: {error.msg}"]) from None
    except YamlProblem as error:
        line = f", line {error.line}" if error.line else ""
        raise ConfigError([f"{path}{line}: not valid YAML: {error}"]) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError([f"{path}: not valid: {error}"]) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError([f"{path}: expected lines of `key: value`, found {type(loaded).__name__}"])
    return loaded


def parse_overrides(arguments: Sequence[str]) -> Mapping[str, object]:
    """`key=value`, `--key value`, `--key=value` and `--switch` from a command line. Raises ConfigError."""
    found: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        dashed = argument.startswith("--")
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_") if dashed else key
        option = options().get(key)
        if not dashed and not equals:
            raise ConfigError([f"{argument}: expected key=value or --key value"])
        if equals:
            found[key] = _value(value)
        elif option is not None and option.kind is bool and not (rest and _is_boolean(rest[0])):
            found[key] = True
        elif rest:
            found[key] = _value(rest.pop(0))
        else:
            raise ConfigError([f"--{key}: expected a value after it"])
    return found


def family_of(*sources: Mapping[str, object]) -> str:
    """The family of their base_model, of `presets.FAMILIES`, by the names in its header; sd15, which is SD2's too,
    also where none can be read, of which the training then says why."""
    path = next((source["base_model"] for source in reversed(sources) if source.get("base_model")), None)
    readable = isinstance(path, str) and path.lower().endswith(".safetensors")
    try:
        names = read_json_header(Path(path)) if readable else {}
    except (OSError, ValueError):
        names = {}
    marks = {"sdxl": SDXL, "sd3": SD3}
    return next((family for family, mark in marks.items() if any(name.startswith(mark) for name in names)), "sd15")


def _value(text: str) -> Any:
    """A shell word as YAML would read it; what is no scalar or list stays text."""
    try:
        value = parse_yaml(text)
    except YamlProblem:
        return text
    return value if isinstance(value, (bool, int, float, list)) or text.strip() in ("null", "~") else text


def _is_boolean(text: str) -> bool:
    return text.lower() in ("true", "false", "yes", "no", "on", "off")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; expected a .yaml, .json or .safetensors file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: expected settings of at most {MAX_FILE_BYTES // 1024} KiB, found more"])
    return data


def _header_config(path: Path) -> Mapping[str, object]:
    try:
        metadata = read_json_header(path).get("__metadata__")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError(
            [f"{path}: expected a .safetensors file, found something else or a truncated one ({error})"]
        ) from None
    if not isinstance(metadata, dict) or HEADER_KEY not in metadata:
        raise ConfigError([f"{path}: expected a LoRA made by LoRA Trainer, found no settings in its header"])
    try:
        settings = json.loads(metadata[HEADER_KEY])
    except (ValueError, TypeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError([f"{path}: the settings in its header are damaged"])
    # Whoever repeats a file's run must say for himself what code it runs.
    given = {key: value for key, value in settings.items() if key not in TRUSTED}
    # A header is of a whole config, whose preset only says where it began: what is left out is at its default.
    return {key: options()[key].default for key in preset_keys()} | given
