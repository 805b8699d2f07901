"""The forms in which files name a LoRA's modules, and the ways from one to another.

kohya's form joins a module's path with underscores: that of diffusers (Stable Diffusion 1.x, 2.x) or of CompVis' LDM
(SDXL). The names inside are those of `models.unet_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lora_trainer.adapters.load import Lora
from lora_trainer.adapters.naming import TEXT_PREFIX, UNET_PREFIX, Factors, kohya_name, native_name
from lora_trainer.adapters.targets import ATTENTION, CONV
from lora_trainer.errors import ModelError
from lora_trainer.models.families import FAMILIES, REFINER, SD1, SD2, SD3, SDXL, Family
from lora_trainer.models.text import NETWORKS
from lora_trainer.models.unet_names import OUTER, RESNET, to_diffusers, to_ldm

FORMS = ("kohya", "ldm", "diffusers", "peft")
BY_NAME = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "sdxl-refiner": REFINER}
# Resnets a level in every published UNet of these families.
LAYERS = 2
_WEIGHT = ".weight"

_NAME = re.compile(rf"(?P<prefix>{UNET_PREFIX}|{TEXT_PREFIX}[12]?)_(?P<path>.+)")
_LDM = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_DIFFUSERS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_embedding.")
# Parts of module paths with an underscore of their own.
_PATHS = (
    *(*OUTER, *OUTER.values(), *RESNET, *RESNET.values(), *ATTENTION, *CONV),
    *("output_blocks", "down_blocks", "up_blocks", "transformer_blocks"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
)
_WORDS = {word for path in _PATHS for word in path.split(".") if "_" in word}
_PARTS = re.compile(rf"(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})(?=_|$)|[^_]+")


def dotted(path: str) -> str:
    """A module's path in a network, of its parts joined with underscores."""
    return ".".join(_PARTS.findall(path))


def family_of(lora: Lora) -> Family | None:
    """The family that a file is made for, by what its header says, else by its names and sizes."""
    said = lora.metadata.get("ss_base_model_version", "")
    built = lora.metadata.get("modelspec.architecture", "")
    for family, version, architecture in (
        (REFINER, REFINER.base_version, REFINER.architecture),
        (SDXL, "sdxl", "stable-diffusion-xl"),
        (SD2, "sd_v2", "stable-diffusion-v2"),
        (SD1, "sd_v1", "stable-diffusion-v1"),
    ):
        if said.startswith(version) or built.startswith(architecture):
            return family
    two = any(name.startswith((f"{TEXT_PREFIX}1_", f"{TEXT_PREFIX}2_")) for name in lora.factors)
    return by_width(lora.factors) or (SDXL if two else None)


def told_family(lora: Lora, name: str | None) -> Family:
    """The one called `name`, else what the file tells. Raises ModelError."""
    if lora.metadata.get("modelspec.architecture", "").startswith(SD3.architecture):
        raise ModelError(f"{lora.path}: a LoRA for {SD3.name}; expected one for Stable Diffusion 1.x, 2.x or SDXL")
    family = BY_NAME[name] if name else family_of(lora)
    if family is None:
        known = ", ".join(BY_NAME)
        raise ModelError(f"{lora.path}: neither its header nor its sizes tell its family; add --family, one of {known}")
    return family


def by_width(factors: Mapping[str, Factors]) -> Family | None:
    """The family whose text embeddings are as wide as a UNet's modules take them."""
    widths = {f.down.shape[1] for name, f in factors.items() if name.endswith("_attn2_to_k")}
    return {768: SD1, 1024: SD2, 1280: REFINER, 2048: SDXL}.get(widths.pop()) if len(widths) == 1 else None


def numbered(lora: Lora, family: Family) -> Lora:
    """`lora` with the first text encoder called as in files for `family`: with a number where there are two. One of
    them alone may have come without, and some files for Stable Diffusion 1.x have it."""
    first = family.text[0].lora
    names = {name: re.sub(rf"^{TEXT_PREFIX}1?_", f"{first}_", name) for name in lora.factors}
    return replace(lora, factors={new: lora.factors[name] for name, new in _all_different(lora, names).items()})


def named(lora: Lora, family: Family, *, ldm: bool | None = None) -> dict[str, Factors]:
    """The modules of `lora` by their names in files of kohya's form, the UNet's after LDM's paths or after diffusers';
    left out, as kohya's trainer names that family. Raises ModelError for names that are no module's."""
    ldm = family.ldm_names if ldm is None else ldm
    return {written(new, family): lora.factors[name] for name, new in renames(lora, family, ldm=ldm).items()}


def written(name: str, family: Family) -> str:
    """A name in kohya's form, as files for `family` have it."""
    return native_name(name) if any(text.native for text in family.text) else name


def renames(lora: Lora, family: Family, *, ldm: bool) -> dict[str, str]:
    """Each module's name, by the one that it has in `lora`. Raises ModelError, also for two names of one module."""
    return _all_different(lora, {name: rename(lora, name, family, ldm=ldm) for name in lora.factors})


def places(lora: Lora, family: Family) -> dict[str, tuple[str, str]]:
    """diffusers' names of the network and of the module, by each name in `lora`. Raises ModelError."""
    found: dict[str, tuple[str, str]] = {}
    for name, new in renames(lora, family, ldm=False).items():
        prefix, path = _split(lora, new)
        found[name] = ("unet" if prefix == UNET_PREFIX else NETWORKS[prefix == f"{TEXT_PREFIX}2"], path)
    return found


def rename(lora: Lora, name: str, family: Family, *, ldm: bool) -> str:
    """`name`, a module of `lora`, in kohya's form after LDM's paths or diffusers'. Raises ModelError."""
    prefix, path = _split(lora, name)
    if prefix != UNET_PREFIX:
        return kohya_name(_text_prefix(lora, name, prefix, family), path)
    if path.startswith(_LDM) == ldm:
        return name
    try:
        if ldm:
            other = to_ldm(path, LAYERS, family.attends)
            back = to_diffusers(other + _WEIGHT, LAYERS)
        else:
            other = to_diffusers(path + _WEIGHT, LAYERS).removesuffix(_WEIGHT)
            back = to_ldm(other, LAYERS, family.attends) + _WEIGHT
    except (KeyError, ValueError, IndexError):
        back = ""
    if back != path + _WEIGHT:
        raise ModelError(f"{lora.path}: {name!r} names no module of a UNet of {family.name}")
    return kohya_name(UNET_PREFIX, other)


def _all_different(lora: Lora, names: dict[str, str]) -> dict[str, str]:
    if len(set(names.values())) < len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise ModelError(f"{lora.path}: two of its names mean one module: {twice}")
    return names


def _split(lora: Lora, name: str) -> tuple[str, str]:
    """(prefix, path) of a module's name."""
    found = _NAME.fullmatch(name)
    path = dotted(found["path"]) if found else ""
    known = path.startswith((*_LDM, *_DIFFUSERS) if found and found["prefix"] == UNET_PREFIX else "text_model.")
    if not known or path.replace(".", "_") != found["path"]:
        raise ModelError(f"{lora.path}: {name!r} names no module of {', '.join(f.name for f in reversed(FAMILIES))}")
    return found["prefix"], path


def _text_prefix(lora: Lora, name: str, prefix: str, family: Family) -> str:
    """Where a family has two text encoders, the first may have come without its number, and where it has one, with."""
    numbered = [part.lora for part in family.text]
    if prefix == f"{TEXT_PREFIX}2" and prefix not in numbered:
        raise ModelError(f"{lora.path}: {name!r} is of a second text encoder, which {family.name} does not have")
    return prefix if prefix in numbered else numbered[0]
