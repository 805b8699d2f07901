"""Which modules of a UNet and of a text encoder are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain

from torch import nn

from lora_trainer.errors import ConfigError
from lora_trainer.models.mmdit import MMDiT

# What kohya's trainer targets by default in each Transformer2DModel, and with convolutions in the rest.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONV = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
# kohya's in each layer of a CLIP text encoder.
TEXT = re.compile(r"(?:.+\.)?layers\.(\d+)\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])")
SETS = {"default": ATTENTION, "conv": CONV}
# kohya's in each block of Stable Diffusion 3's transformer (networks/lora_sd3.py); q, k and v are one matrix there.
JOINT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
BLOCKS = {"input_blocks": "IN", "middle_block": "MID", "output_blocks": "OUT"}
# The names of language models and of PEFT's examples.
ALIASES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}


def select(model: nn.Module, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Names of the modules of a diffusers UNet, or an MMDiT, that `target_modules` means, in the model's order.

    An entry is a set's name or the ending of module names. Raises ConfigError for entries that match nothing.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    sets, within = ({"default": JOINT}, "joint_blocks.") if isinstance(model, MMDiT) else (SETS, ".attentions.")
    chosen: set[str] = set()
    problems = []
    for entry in target_modules:
        endings = sets.get(entry, (ALIASES.get(entry, entry),))
        found = {name for name in names if any(_ends(name, ending) for ending in endings)}
        if entry == "default":
            found = {name for name in found if within in name}
        if not found:
            problems.append(_nothing(entry, names, sets))
        chosen |= found
    if problems:
        raise ConfigError(problems)
    return tuple(name for name in names if name in chosen)


def select_text(model: nn.Module, layers: int) -> tuple[str, ...]:
    """Names of the modules of a CLIP text encoder that are trained, in its first `layers` layers and in its order."""
    found = ((name, TEXT.fullmatch(name)) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name, match in found if match and int(match[1]) < layers)


def filtered(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that match a pattern (`*.attn2.*`, as in a shell) of `include`, if it has any, and none of
    `exclude`."""

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return tuple(n for n in names if (not include or matches(n, include)) and not matches(n, exclude))


def block_of(ldm_name: str) -> str:
    """The block of a UNet's module by its name in the checkpoint: IN04 of `input_blocks.4.1.proj_in`, as kohya counts
    them; "" outside of the blocks."""
    side, _, rest = ldm_name.partition(".")
    return f"{BLOCKS[side]}{int(rest.partition('.')[0]):02}" if side in BLOCKS else ""


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _nothing(entry: str, names: Sequence[str], sets: Mapping[str, Sequence[str]]) -> str:
    known = {
        *sets,
        *chain.from_iterable(sets.values()),
        *(name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()),
    }
    near = get_close_matches(entry, sorted(known), n=3, cutoff=0.4) or sorted(sets)
    return f"target_modules: expected sets or endings of module names, found {entry!r}; near it: {', '.join(near)}"
