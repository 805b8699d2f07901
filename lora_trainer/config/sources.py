"""Where settings come from: files, LoRA headers and the command line."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.config.options import options
from lora_trainer.errors import ConfigError

HEADER_KEY = "lora_trainer_config"
MAX_FILE_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands there twice", problem_mark=key.start_mark)
        seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else None)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_file(path: Path) -> Mapping[str, object]:
    """The settings of a .yaml, .yml or .json file, or of a LoRA's header. Raises ConfigError."""
    if path.suffix.lower() == ".safetensors":
        return _header_config(path)
    try:
        data = _read(path)
        text = data.decode("utf-8-sig")
        loaded = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}"]
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}, line {error.lineno}: not valid JSON: {error.msg}"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError([f"{path}, line {line}: not valid YAML: {error.problem}"]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([f"{path}: not valid: {str(error).splitlines()[0]}"]) from None
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


def _value(text: str) -> Any:
    """A shell word as YAML would read it; what is no scalar or list stays text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float, list)) or text.strip() in ("null", "~") else text


def _is_boolean(text: str) -> bool:
    return text.lower() in ("true", "false", "yes", "no", "on", "off")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: expected settings of at most 1 MiB, found {path.stat().st_size} bytes"])
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; expected a .yaml, .json or .safetensors file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None


def _header_config(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > MAX_HEADER_BYTES:
                raise ValueError
            metadata = json.loads(file.read(length)).get("__metadata__", {})
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, struct.error, AttributeError):
        raise ConfigError([f"{path}: expected a .safetensors file, found something else or a truncated one"]) from None
    if HEADER_KEY not in metadata:
        raise ConfigError([f"{path}: expected a LoRA made by LoRA Trainer, found no settings in its header"])
    try:
        return dict(json.loads(metadata[HEADER_KEY]))
    except (ValueError, TypeError):
        raise ConfigError([f"{path}: the settings in its header are damaged"]) from None
