"""`lora-trainer convert`: a LoRA under the names that another program reads, and back.

kohya's forms and PEFT's hold an alpha, diffusers' does not: there alpha / rank goes into up. What that takes away is in
the header, so that the way back gives the very tensors: exactly, where alpha / rank is a power of two or the numbers
have 16 bits (with other scales they are then written in 32); from 32 bits with other scales, up to the last digit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters import peft_files
from lora_trainer.adapters.forms import places, renames, told_family, written
from lora_trainer.adapters.load import Lora, adapter_metadata, configured_alphas, read_lora
from lora_trainer.adapters.metadata import ALPHAS, CONFIG, derived
from lora_trainer.adapters.naming import Factors, to_diffusers
from lora_trainer.adapters.save import assemble
from lora_trainer.adapters.writer import DTYPES
from lora_trainer.errors import ModelError, OutputError
from lora_trainer.files import publish
from lora_trainer.models.checkpoint import DTYPES as BY_NAME
from lora_trainer.models.families import Family
from lora_trainer.tools.result import kohya_tensors, refuse_existing

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """A LoRA with its true alphas and in its own number format. `places`: diffusers' names of each module's network and
    of itself; `alphas`: as tensors, None for a module without one."""

    lora: Lora
    family: Family
    places: Mapping[str, tuple[str, str]]
    alphas: Mapping[str, Tensor | None]

    def by_network(self) -> dict[str, dict[str, Factors]]:
        found: dict[str, dict[str, Factors]] = {}
        for name, (network, module) in self.places.items():
            found.setdefault(network, {})[module] = self.lora.factors[name]
        return found


def convert(source: Path, target: Path, form: str, *, family: str | None = None, overwrite: bool = False) -> list[str]:
    """Write `source` in `form` (one of `forms.FORMS`); what there is to say of it. For PEFT `target` is a folder.

    Raises ModelError and OutputError; nothing is then written.
    """
    if form == "peft":
        _refuse_folder(target, overwrite=overwrite)
    else:
        refuse_existing(target, overwrite=overwrite)
    found = read(source, family)
    metadata = derived(found.lora.metadata, name=target.stem, version=found.family.base_version)
    told = [f"{target}: {len(found.lora.factors)} modules of {found.family.name} in the form {form}"]
    if form == "diffusers":
        tensors, more, lost = _diffusers(found)
        publish(assemble(tensors, metadata | more), target)
        return told + lost
    if CONFIG in found.lora.metadata:
        metadata[CONFIG] = found.lora.metadata[CONFIG]
    if form == "peft":
        for network, factors in found.by_network().items():
            folder = target / network
            kept = metadata | {ALPHAS: _record(found)}
            publish(assemble(peft_files.tensors(factors), kept), folder / peft_files.MODEL)
            publish(peft_files.config(factors), folder / peft_files.CONFIG)
        return told
    ldm = form == "ldm" or found.family.ldm_names
    names = {old: written(new, found.family) for old, new in renames(found.lora, found.family, ldm=ldm).items()}
    factors = {new: found.lora.factors[name] for name, new in names.items()}
    alphas = {names[name]: alpha for name, alpha in found.alphas.items()}
    publish(assemble(kohya_tensors(factors, alphas), metadata), target)
    return told


def read(path: Path, family: str | None) -> Source:
    """A LoRA in any form; what a conversion to diffusers' form took away is put back. Raises ModelError."""
    lora = read_lora(path)
    known = told_family(lora, family)
    where = places(lora, known)
    if lora.form == "kohya":
        return Source(lora, known, where, {name: lora.alphas.get(name) for name in lora.factors})
    if ALPHAS not in lora.metadata:
        return Source(lora, known, where, {})
    try:
        record = json.loads(lora.metadata[ALPHAS])
        dtype = BY_NAME[record["dtype"]]
        alphas = {name: _alpha(record["alphas"], place) for name, place in where.items()}
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise ModelError(f"{path}: its header's {ALPHAS} is damaged ({error!r})") from error
    if lora.form == "diffusers":
        factors = {name: _unfolded(f, alphas[name][0], dtype) for name, f in lora.factors.items()}
        lora = replace(lora, factors=factors)
    return Source(lora, known, where, {name: tensor for name, (_, tensor) in alphas.items()})


def _refuse_folder(target: Path, *, overwrite: bool) -> None:
    full = target.is_dir() and any(target.iterdir())
    if target.suffix == ".safetensors" or target.is_file() or (full and not overwrite):
        raise OutputError(f"{target}: expected the name of a new folder, which is what PEFT keeps a LoRA in")


def _diffusers(found: Source) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """(tensors, what the header says of alphas, what cannot be undone)."""
    networks = found.by_network()
    if _configured(found, networks):
        # The header says the alphas already, so up stays as it is.
        plain = {n: {m: replace(f, alpha=float(f.rank)) for m, f in modules.items()} for n, modules in networks.items()}
        parts = [to_diffusers(modules, network) for network, modules in plain.items()]
        return _joined(parts), {CONFIG: found.lora.metadata[CONFIG]}, []
    factors, dtype = list(found.lora.factors.values()), _dtype(found)
    wide = torch.float32 if dtype in _HALF and _changed(factors, dtype, dtype) else dtype
    changed = _changed(factors, wide, dtype)
    parts = []
    for network, modules in networks.items():
        parts.append(to_diffusers({module: _folded(f, wide) for module, f in modules.items()}, network))
    lost = [f"{changed} numbers come back with another last digit, since alpha / rank is no power of two"]
    return _joined(parts), {ALPHAS: _record(found)}, lost if changed else []


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _folded(f: Factors, dtype: torch.dtype) -> Factors:
    """Alpha in up, where scale 1 says nothing more of it."""
    up = (f.up.double() * (f.alpha / f.rank)).to(dtype)
    return Factors(f.down.to(dtype), up, float(f.rank))


def _unfolded(f: Factors, alpha: float, dtype: torch.dtype) -> Factors:
    scale = alpha / f.rank or 1.0
    return Factors(f.down.to(dtype), (f.up.double() / scale).to(dtype), alpha)


def _changed(factors: list[Factors], folded: torch.dtype, dtype: torch.dtype) -> int:
    """Numbers that differ after folding in one number format and unfolding into another."""
    back = ((f, _unfolded(_folded(f, folded), f.alpha, dtype)) for f in factors)
    return sum(int((f.up != b.up).sum() + (f.down != b.down).sum()) for f, b in back)


def _configured(found: Source, networks: Mapping[str, Mapping[str, Factors]]) -> bool:
    """Whether a header of diffusers' own came along from there that says just these alphas."""
    path, metadata = found.lora.path, found.lora.metadata
    if CONFIG not in metadata:
        return False
    shapes = {f"{n}.{m}.lora_A.weight": list(f.down.shape) for n, fs in networks.items() for m, f in fs.items()}
    alphas = configured_alphas(path, adapter_metadata(path, metadata[CONFIG]), shapes)
    return list(alphas.values()) == [f.alpha for modules in networks.values() for f in modules.values()]


def _dtype(found: Source) -> torch.dtype:
    """The number format of a file, or one that holds all of its."""
    kinds = {t.dtype for f in found.lora.factors.values() for t in (f.down, f.up)}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _record(found: Source) -> str:
    """The alphas of `found`, most of them as "*": [value, number format and shape of its tensor or null]."""
    entries = {}
    for name, place in found.places.items():
        tensor = found.alphas.get(name, torch.empty((), dtype=torch.float32))
        kind = (None, None) if tensor is None else (DTYPES[tensor.dtype], tuple(tensor.shape))
        entries[".".join(place)] = (found.lora.factors[name].alpha, *kind)
    usual = Counter(entries.values()).most_common(1)[0][0]
    others = {place: entry for place, entry in entries.items() if entry != usual}
    return json.dumps({"dtype": DTYPES[_dtype(found)], "alphas": {"*": usual, **others}})


def _alpha(entries: Mapping[str, list], place: tuple[str, str]) -> tuple[float, Tensor | None]:
    """An entry of `_record` as a number and as a tensor."""
    value, kind, shape = entries.get(".".join(place), entries["*"])
    return float(value), None if kind is None else torch.full(shape, value, dtype=BY_NAME[kind])
