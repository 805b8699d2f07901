"""The YAML beside a checkpoint (CompVis' inference configs): the few facts that tensor shapes do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_trainer.errors import ModelError


@dataclass(frozen=True)
class LdmConfig:
    """What a YAML may say; None where it does not."""

    num_heads: int | None = None
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
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        unet = _params(params, "unet_config")
        return LdmConfig(
            num_heads=unet.get("num_heads"),
            scale_factor=params.get("scale_factor"),
            linear_start=params.get("linear_start"),
            linear_end=params.get("linear_end"),
            timesteps=params.get("timesteps"),
            parameterization=params.get("parameterization"),
            text_folder=_folder(path.parent, _params(params, "cond_stage_config").get("version")),
        )
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: expected a Stable Diffusion config with model.params, found: {error!r}") from error


def _params(params: Mapping, key: str) -> Mapping:
    return (params.get(key) or {}).get("params") or {}


def _folder(beside: Path, version: object) -> Path | None:
    """`version` names a hub repository or a local folder; only a folder that exists counts."""
    if not isinstance(version, str):
        return None
    folder = beside / version
    return folder if (folder / "config.json").is_file() else None
