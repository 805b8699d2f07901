"""PEFT's own form of a LoRA: a folder for each network, with adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lora_trainer.adapters.naming import Factors
from lora_trainer.errors import ModelError

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_UNET = r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)"
_TEXT = r"(?:text_model\.)?encoder\.layers"
_KEY = re.compile(
    rf"(?:base_model\.model\.)?(?:(?P<unet>{_UNET}[.\w]*)|(?P<text>{_TEXT}[.\w]*))\.lora_(?P<part>[AB])"
    r"(?:\.default)?\.weight"
)
SECOND = "text_encoder_2"


def files(folder: Path) -> dict[str, Path]:
    """The networks' files in `folder`, by diffusers' names of them; its own file as "". Raises ModelError."""
    places = {"": folder, **{name: folder / name for name in ("unet", "text_encoder", SECOND)}}
    found = {name: place / MODEL for name, place in places.items() if (place / MODEL).is_file()}
    if not found:
        raise ModelError(f"{folder}: a folder without {MODEL}; expected a LoRA file, or a folder as PEFT saves it")
    return found


def as_diffusers(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """diffusers' names of those of `keys` that are PEFT's. Which of two text encoders they are of is in the name of the
    folder that `path` is in."""
    text = SECOND if path.parent.name == SECOND else "text_encoder"
    found = {key: match for key in keys if (match := _KEY.fullmatch(key))}
    return {
        key: f"{'unet' if match['unet'] else text}.{match['unet'] or match['text']}.lora_{match['part']}.weight"
        for key, match in found.items()
    }


def settings(path: Path, names: Iterable[str]) -> dict[str, object]:
    """What the adapter_config.json beside `path` says, in the form of diffusers' `lora_adapter_metadata`. Without one
    the scale is 1. Raises ModelError."""
    beside, networks = path.with_name(CONFIG), {name.split(".")[0] for name in names}
    if not networks or not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{beside}: not a configuration of PEFT ({error})") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("use_dora"):
        raise ModelError(f"{beside}: expected peft_type LORA without use_dora, found {kind!r}")
    return {f"{network}.{key}": value for network in networks for key, value in config.items()}


def tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of `factors`, by diffusers' module names, under PEFT's; alphas are in `config`."""
    named: dict[str, Tensor] = {}
    for module, f in factors.items():
        named[f"base_model.model.{module}.lora_A.weight"] = f.down
        named[f"base_model.model.{module}.lora_B.weight"] = f.up
    return named


def config(factors: Mapping[str, Factors]) -> bytes:
    """The adapter_config.json beside them: ranks and alphas of most modules, and those of the others by full name."""
    ranks, alphas = ({name: getattr(f, kind) for name, f in factors.items()} for kind in ("rank", "alpha"))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return (json.dumps(said, indent=2) + "\n").encode()
