"""`lora-trainer extract`: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.hashes import checkpoint_hashes
from lora_trainer.adapters.metadata import BaseFacts, made_facts
from lora_trainer.adapters.naming import Factors, text_name
from lora_trainer.adapters.svd import Rule, approximated
from lora_trainer.adapters.targets import SETS, select, select_text
from lora_trainer.errors import ModelError
from lora_trainer.events import EventSink, Progress
from lora_trainer.models.checkpoint import V_PREDICTION, stored_tensors
from lora_trainer.models.families import predicting
from lora_trainer.models.ldm_yaml import read_beside
from lora_trainer.models.noise import Prediction
from lora_trainer.models.single_file import PARAMETERIZATIONS, is_kernel
from lora_trainer.tools.outline import Outline, outline
from lora_trainer.tools.resize import check
from lora_trainer.tools.result import refuse_existing, write

EXTRACTED = "lora_trainer_extracted"


@dataclass(frozen=True)
class Recipe:
    """`rank` of linear layers and 1×1 convolutions; `conv_rank` of wider kernels and of what goes with them (None:
    left out); `precision` of the file, made `at` (seconds since 1970); `text`: the text encoders too."""

    rank: int
    conv_rank: int | None = None
    precision: str = "fp16"
    text: bool = True
    device: str = "cpu"
    at: float = 0.0


@dataclass
class _Sums:
    """Squared norms of the difference, and of what the LoRA holds of it."""

    after: float = 0.0
    before: float = 0.0

    @property
    def share(self) -> float:
        return math.sqrt(self.after / self.before) if self.before else 1.0


def extract(
    original: Path, tuned: Path, target: Path, recipe: Recipe, *, sink: EventSink, overwrite: bool = False
) -> list[str]:
    """Write what turns `original` into `tuned`, as far as the ranks of `recipe` hold it. Weights that are equal,
    rounded to the narrower of both formats, get no module. What there is to say.

    Raises ConfigError, ModelError and OutputError; nothing is then written.
    """
    refuse_existing(target, overwrite=overwrite)
    for rank in (recipe.rank, recipe.conv_rank or 1):
        check(Rule(rank))
    first, second = outline(original), outline(tuned)
    if first.family is not second.family:
        raise ModelError(f"{tuned}: expected {first.family.name} as {original} is, found {second.family.name}")
    wanted = _wanted(first, recipe)
    _same_shapes(first, second, wanted)
    found: dict[str, dict[str, Factors]] = {network: {} for network in first.parts}
    sums = _Sums()
    for done, (network, module, before, after) in enumerate(_pairs(first, second, wanted), start=1):
        sink(Progress(stage="extracting", done=done, total=sum(map(len, wanted.values()))))
        if not _equal(before, after):
            found[network][module] = _factors(after, before, recipe, sums)
    if not any(found.values()):
        raise ModelError(f"{tuned}: its weights are those of {original}; expected a difference to extract")
    factors = {
        name: f for network, modules in found.items() for name, f in first.parts[network].in_files(modules).items()
    }
    metadata = _metadata(first, recipe, target.stem) | {EXTRACTED: _record(tuned, sums)}
    write(factors, target, metadata, recipe.precision)
    counts = ", ".join(
        f"{len(modules)} of {network.replace('_', ' ')}" for network, modules in found.items() if modules
    )
    return [f"{target}: {counts}; {sums.share:.1%} of the norm of their difference is kept"]


def _wanted(whole: Outline, recipe: Recipe) -> dict[str, set[str]]:
    """What kohya's trainer targets, by network."""
    sets = list(SETS) if recipe.conv_rank else ["default"]
    wanted = {"unet": set(select(whole.parts["unet"].module, sets))}
    for network, part in whole.parts.items():
        if network != "unet" and recipe.text:
            wanted[network] = {text_name(name) for name in select_text(part.module, sys.maxsize)}
    return wanted


def _same_shapes(first: Outline, second: Outline, wanted: Mapping[str, set[str]]) -> None:
    """Raises ModelError."""
    for key in _keys(first, wanted):
        one, other = first.shapes[key], second.shapes.get(key)
        if one != other:
            found = "nothing" if other is None else list(other)
            raise ModelError(f"{second.path}: {key}: expected {list(one)} as in {first.path}, found {found}")


def _keys(whole: Outline, wanted: Mapping[str, set[str]]) -> set[str]:
    """The tensors in which the weights of `wanted` are."""
    return {
        key
        for key, shape in whole.shapes.items()
        for network, module, _ in whole.weights(key, torch.empty(shape, device="meta"))
        if module in wanted.get(network, ())
    }


def _pairs(
    first: Outline, second: Outline, wanted: Mapping[str, set[str]]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(network, module, weight before, weight after), one tensor of each file at a time."""
    keys = _keys(first, wanted)
    both = zip(
        stored_tensors(first.path, keys.__contains__), stored_tensors(second.path, keys.__contains__), strict=True
    )
    for (key, before), (_, after) in both:
        views = zip(first.weights(key, before), first.weights(key, after), strict=True)
        for (network, module, one), (_, _, other) in views:
            if module in wanted.get(network, ()):
                yield network, module, one, other


def _equal(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before.to(after.dtype), after) or torch.equal(before, after.to(before.dtype))


def _factors(after: Tensor, before: Tensor, recipe: Recipe, sums: _Sums) -> Factors:
    """float32 factors of the difference, whose scale is 1 as in kohya's tool. Raises ModelError."""
    difference = after.to(recipe.device).double() - before.to(recipe.device).double()
    rank = recipe.conv_rank if is_kernel(after) else recipe.rank
    up, down, kept, whole = approximated(difference.flatten(1), rank or recipe.rank)
    sums.after, sums.before = sums.after + kept, sums.before + whole
    shape = after.shape[1:]
    up, down = up.float().cpu(), down.float().cpu()
    rank = len(down)
    return Factors(down.reshape(rank, *shape), up.reshape(len(up), rank, *[1] * (len(shape) - 1)), float(rank))


def _metadata(whole: Outline, recipe: Recipe, name: str) -> dict[str, str]:
    """kohya's, of the checkpoint that the LoRA is for."""
    said = read_beside(whole.path).parameterization or ("v" if V_PREDICTION in whole.shapes else "")
    prediction: Prediction = PARAMETERIZATIONS.get(said, whole.family.prediction)
    family = predicting(whole.family, prediction)
    legacy, sha256 = checkpoint_hashes(whole.path)
    base = BaseFacts(
        name=whole.path.name,
        version=family.base_version,
        architecture=family.architecture,
        # Neither a YAML nor the shapes of 2.x tell.
        prediction="" if whole.family.probed and not said else prediction,
        legacy_hash=legacy,
        sha256=sha256,
    )
    args = {"conv_dim": f"{recipe.conv_rank}", "conv_alpha": f"{float(recipe.conv_rank)}"} if recipe.conv_rank else {}
    return made_facts(name, base, recipe.at) | {"ss_network_args": json.dumps(args)}


def _record(tuned: Path, sums: _Sums) -> str:
    return json.dumps({"from": tuned.name, "kept": round(sums.share, 4)})
