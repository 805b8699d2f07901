"""The YAML beside a checkpoint (CompVis' inference configs): the few facts that tensor shapes do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_trainer.config.yaml_text import YamlProblem, parse_yaml
from lora_trainer.errors import ModelError, shown

T = TypeVar("T", int, float, str)

# The largest of Stability's configs has 5 KB.
MAX_FILE_BYTES = 256 * 1024


@dataclass(frozen=True)
class LdmConfig:
    """What a YAML may say; None where it does not."""

    num_heads: int | None = None
    head_channels: int | None = None
    scale_factor: float | None = None
    linear_start: float | None = None
    linear_end: float | None = None
    timesteps: int | None = None
    parameterization: str | None = None
    text_folder: Path | None = None


def read_beside(checkpoint: Path) -> LdmConfig:
    """The config of `NAME.yaml` beside `NAME.safetensors`, or an empty one. Raises ModelError."""
    path = checkpoint.with_suffix(".yaml")
    if not path.is_file():
        return LdmConfig()
    try:
        params = parse_yaml(_read(path))["model"]["params"]
        # CompVis' name, and that of Stability's generative-models.
        unet = _params(params, "unet_config") or _params(params, "network_config")
        return LdmConfig(
            num_heads=_heads(unet, "num_heads"),
            head_channels=_heads(unet, "num_head_channels"),
            scale_factor=_typed(params, "scale_factor", float),
            linear_start=_typed(params, "linear_start", float),
            linear_end=_typed(params, "linear_end", float),
            timesteps=_typed(params, "timesteps", int),
            parameterization=_typed(params, "parameterization", str) or _scaling(params),
            text_folder=_folder(path.parent, _params(params, "cond_stage_config").get("version")),
        )
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (YamlProblem, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: expected a Stable Diffusion config with model.params, found: {error!r}") from error


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(f"{path}: expected a config of at most {MAX_FILE_BYTES // 1024} KiB, found more")
    return data.decode("utf-8")


def _typed(params: Mapping, key: str, kind: type[T]) -> T | None:
    """The value of `key`, or None. Raises TypeError."""
    value = params.get(key)
    if kind is float and isinstance(value, int):
        value = float(value)
    if value is not None and (type(value) is not kind or (kind is not str and not 0 < value < 1e6)):
        wanted = "words" if kind is str else "a number above 0"
        raise TypeError(f"expected {wanted} for {key}, found {shown(value)}")
    return value


def _scaling(params: Mapping) -> str | None:
    """What is predicted, as Stability's generative-models say it."""
    target = (_params(params, "denoiser_config").get("scaling_config") or {}).get("target")
    return {"VScaling": "v", "EpsScaling": "eps"}.get(str(target).rpartition(".")[2])


def _heads(params: Mapping, key: str) -> int | None:
    """-1 is Stability's word for: by the other one."""
    return None if params.get(key) == -1 else _typed(params, key, int)


def _params(params: Mapping, key: str) -> Mapping:
    return (params.get(key) or {}).get("params") or {}


def _folder(beside: Path, version: object) -> Path | None:
    """`version` names a hub repository or a local folder; only a folder that exists counts."""
    if not isinstance(version, str):
        return None
    folder = beside / version
    return folder if (folder / "config.json").is_file() else None
