"""What an issue about a failed run needs: versions, GPU, settings, the last words."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import PurePath

from lora_trainer import __version__
from lora_trainer.config.options import options
from lora_trainer.config.schema import PATHS

PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "gradio", "triton", "bitsandbytes")
LAST = 20


def report(error: BaseException, settings: Mapping[str, object] = {}, log: Sequence[str] = ()) -> str:
    """Plain text. Of paths only the last part is told, and no prompts; `log` may be long."""
    return "\n".join(
        [
            f"LoRA Trainer {__version__}, Python {platform.python_version()}, {platform.platform()}",
            "packages: " + ", ".join(_packages()),
            f"GPU: {_gpu()}",
            "",
            f"error: {type(error).__name__}: {error}",
            "",
            *_section("settings that are not the default", _changed(settings)),
            *_section("last events", list(log)[-LAST:]),
            *_section("traceback", _trace(error)),
        ]
    )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines), ""] if lines else []


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _gpu() -> str:
    """What torch sees, if it is loaded: asking must not load it, nor start a GPU that is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "none in use"
    if not torch.cuda.is_initialized():
        return f"{torch.cuda.device_count()} there, none in use"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1024**3:.1f} of {total / 1024**3:.1f} GiB free"


def _changed(settings: Mapping[str, object]) -> list[str]:
    told = []
    for key, value in settings.items():
        option = options().get(key)
        if option is None or value == option.default or "prompt" in key:
            continue
        told.append(f"{key}: {PurePath(str(value)).name if key in PATHS and value else _shown(key, value)}")
    return told


def _shown(key: str, value: object) -> str:
    if key == "concepts" and isinstance(value, list):
        return repr([{**concept, "folder": PurePath(str(concept.get("folder"))).name} for concept in value])
    return repr(value)


def _trace(error: BaseException) -> list[str]:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return text.rstrip().splitlines()
