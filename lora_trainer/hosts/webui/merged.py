"""The built-in Lora extension merges a prompt's LoRAs into the weights and leaves them there until the next prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def lora_extension() -> ModuleType | None:
    """The built-in extension's `networks`; None where it is switched off."""
    return sys.modules.get("networks")


def unmerge(sd_model: Any) -> bool:
    """Restore, in place and exactly, the weights that a prompt's LoRAs have changed; whether there were any.

    The next prompt merges its own anew.
    """
    networks = lora_extension()
    merged = [m for m in getattr(sd_model, "network_layer_mapping", {}).values() if _names(m)]
    if networks is None or not merged:
        return False
    networks.loaded_networks.clear()
    with torch.no_grad():
        for module in merged:
            networks.network_apply_weights(module)
    return True


def make_known(files: Iterable[Path]) -> bool:
    """Let prompts name LoRAs that lie outside the Lora folder, until the list is refreshed; whether they now do."""
    networks, network = lora_extension(), sys.modules.get("network")
    if networks is None or network is None:
        return False
    for file in files:
        if file.stem not in networks.available_network_aliases:
            found = network.NetworkOnDisk(file.stem, str(file))
            networks.available_networks[file.stem] = networks.available_network_aliases[file.stem] = found
    return True


def _names(module: Any) -> tuple:
    return getattr(module, "network_current_names", ())
