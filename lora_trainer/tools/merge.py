"""`lora-trainer merge`: several LoRAs in one, each at a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_trainer.adapters.forms import named, told_family
from lora_trainer.adapters.load import Lora, read_lora
from lora_trainer.adapters.metadata import derived
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.save import PRECISIONS
from lora_trainer.adapters.svd import Rule, shrunk
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.models.families import Family
from lora_trainer.tools.resize import check, refuse_broken
from lora_trainer.tools.result import refuse_existing, widest, write

MERGED = "lora_trainer_merged"
# Of each file's header, what stays where all say the same.
_SHARED = (
    *("ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip"),
    *("ss_network_module", "modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec"),
    *("modelspec.prediction_type", "modelspec.resolution"),
)
_TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Weighted:
    """A LoRA file and the weight that a prompt would give it."""

    path: Path
    weight: float

    @classmethod
    def parse(cls, text: str) -> Weighted:
        """`FILE:0.8`, or `FILE` at weight 1. Raises ConfigError."""
        path, colon, number = text.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            # C:\\lora.safetensors
            path, weight = text, 1.0
        path = path if colon else text
        if not path or not math.isfinite(weight) or weight == 0:
            raise ConfigError([f"merge: expected FILE or FILE:WEIGHT with a weight that is not 0, found {text!r}"])
        return cls(Path(path), weight)


def merge(
    files: Sequence[Weighted],
    target: Path,
    *,
    rank: int | None = None,
    precision: str | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write one LoRA that adds to a weight what all of `files` together add: their ranks are put side by side, which is
    exact up to the rounding of `precision` (left out: the widest of the files'), or with a `rank` cut down to it.

    Raises ConfigError, ModelError and OutputError; nothing is then written.
    """
    refuse_existing(target, overwrite=overwrite)
    rule = None if rank is None else Rule(rank)
    if rule is not None:
        check(rule)
    loras, known = read_all([file.path for file in files], family)
    dtype = PRECISIONS[precision] if precision else widest(loras)
    parts: dict[str, list[tuple[Lora, Factors, float]]] = {}
    for lora, file in zip(loras, files, strict=True):
        for name, f in named(lora, known).items():
            parts.setdefault(name, []).append((lora, f, file.weight * f.alpha / f.rank))
    factors = {name: _side_by_side(name, entries) for name, entries in parts.items()}
    after = before = 0.0
    for name, f in factors.items() if rule else ():
        factors[name], kept, whole = shrunk(f, rule)
        after, before = after + kept, before + whole
    factors = {name: Factors(f.down.to(dtype), f.up.to(dtype), f.alpha) for name, f in factors.items()}
    write(factors, target, _metadata(loras, files, known, target.stem), None)
    ranks = sorted({f.rank for f in factors.values()})
    told = f"{target}: {len(files)} LoRAs in one, {len(factors)} modules of rank {ranks[0]} to {ranks[-1]}"
    return [told + (f"; {math.sqrt(after / before) if before else 1:.1%} of its norm is kept" if rule else "")]


def read_all(paths: Sequence[Path], family: str | None) -> tuple[list[Lora], Family]:
    """The LoRAs, and the family that all of them are for. Raises ModelError."""
    loras = [read_lora(path) for path in paths]
    known = [told_family(lora, family) for lora in loras]
    for lora, other in zip(loras, known, strict=True):
        if other is not known[0]:
            raise ModelError(f"{lora.path}: a LoRA for {other.name}; {loras[0].path} is for {known[0].name}")
        refuse_broken(lora.path, lora.factors)
    return loras, known[0]


def _side_by_side(name: str, parts: Sequence[tuple[Lora, Factors, float]]) -> Factors:
    """float64 factors of the sum of scale · up · down. The largest scale becomes the module's own, so that the up with
    it, and those of equal scales, stay as they are. Raises ModelError."""
    lora, first, _ = parts[0]
    common = max(abs(scale) for _, _, scale in parts) or 1.0
    whole = max((f for _, f, _ in parts), key=lambda f: f.down.dim())
    for other, f, _ in parts:
        mine, theirs = ((len(g.up), g.down[0].numel()) for g in (first, f))
        if mine != theirs:
            raise ModelError(f"{other.path}: made for another base model than {lora.path}: {name} has other sizes")
    down = torch.cat([f.down.double().reshape(f.rank, *whole.down.shape[1:]) for _, f, _ in parts])
    ups = [f.up.double().reshape(len(f.up), f.rank, *whole.up.shape[2:]) * (scale / common) for _, f, scale in parts]
    return Factors(down, torch.cat(ups, 1), common * len(down))


def _metadata(loras: Sequence[Lora], files: Sequence[Weighted], family: Family, name: str) -> dict[str, str]:
    said = [lora.metadata for lora in loras]
    shared = {key: said[0][key] for key in _SHARED if key in said[0] and len({one.get(key) for one in said}) == 1}
    words = dict.fromkeys(word for one in said for word in (one.get(_TRIGGER) or "").split(", ") if word)
    if words:
        shared[_TRIGGER] = ", ".join(words)
    if "modelspec.architecture" in shared:
        shared["modelspec.title"] = name
        shared["modelspec.merged_from"] = ", ".join(file.path.name for file in files)
    shared[MERGED] = merged_record(loras, [file.weight for file in files])
    return derived(shared, name=name, version=family.base_version)


def merged_record(loras: Sequence[Lora], weights: Sequence[float]) -> str:
    """What a header says of LoRAs that are in a file."""
    entries = zip(loras, weights, strict=True)
    return json.dumps([_origin(lora.path, lora.metadata) | {"weight": weight} for lora, weight in entries])


def _origin(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    known = {key: metadata[key] for key in ("sshs_model_hash",) if key in metadata}
    return {"name": path.name, **known}
