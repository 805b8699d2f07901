"""`lora-trainer resize`: a LoRA of a lower rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from lora_trainer.adapters.forms import named, told_family
from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.metadata import derived
from lora_trainer.adapters.svd import Rule, shrunk
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.tools.result import in_precision, refuse_existing, write


def resize(
    source: Path,
    target: Path,
    rule: Rule,
    *,
    precision: str | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write `source` with the ranks that `rule` says; modules that have no more stay as they are. What there is to say.

    Raises ConfigError, ModelError and OutputError; nothing is then written.
    """
    refuse_existing(target, overwrite=overwrite)
    check(rule)
    lora = read_lora(source)
    known = told_family(lora, family)
    refuse_broken(lora.path, lora.factors)
    largest = max(f.rank for f in lora.factors.values())
    factors, after, before = {}, 0.0, 0.0
    for name, f in lora.factors.items():
        # Rounded once, at the end.
        factors[name], kept, whole = shrunk(in_precision(f, "fp32") if precision else f, rule)
        after, before = after + kept, before + whole
    if all(factors[name].rank == f.rank for name, f in lora.factors.items()):
        raise ModelError(f"{source}: nothing to do: no module has a rank above that, the largest is {largest}")
    by = f" by {rule.method} {rule.value:g}" if rule.method else ""
    comment = f"dimension is resized from {largest} to at most {rule.rank}{by}"
    metadata = derived(lora.metadata, name=target.stem, version=known.base_version, comment=comment)
    write(named(replace(lora, factors=factors), known), target, metadata, precision)
    ranks = sorted({f.rank for f in factors.values()})
    share = math.sqrt(after / before) if before else 1.0
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [f"{target}: rank {largest} to {shown}; {share:.1%} of its norm is kept"]


def check(rule: Rule) -> None:
    """Raises ConfigError."""
    if rule.rank < 1:
        raise ConfigError([f"rank: expected a whole number of at least 1, found {rule.rank}"])
    bounds = {"sv_ratio": (1, math.inf), "sv_fro": (0, 1), "sv_cumulative": (0, 1)}
    if rule.method is not None:
        low, high = bounds[rule.method]
        if not low < rule.value <= high or math.isinf(rule.value):
            most = "" if math.isinf(high) else f" to {high}"
            raise ConfigError([f"value: expected more than {low}{most} for {rule.method}, found {rule.value:g}"])


def refuse_broken(path: Path, factors: dict) -> None:
    """Raises ModelError: a decomposition of what is not finite would not end, or mean nothing."""
    for name, f in factors.items():
        if not (f.down.float().isfinite().all() and f.up.float().isfinite().all() and math.isfinite(f.alpha)):
            raise ModelError(f"{path}: {name} holds numbers that are not finite")
