"""`lora-trainer merge --into`: LoRAs in a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.forms import numbered
from lora_trainer.adapters.load import Lora
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.writer import raw
from lora_trainer.errors import ModelError
from lora_trainer.files import publish
from lora_trainer.models.checkpoint import read_header, stored_tensors
from lora_trainer.tools.merge import MERGED, Weighted, merged_record, read_all
from lora_trainer.tools.outline import Outline, outline
from lora_trainer.tools.result import refuse_existing

# By (network, module): the LoRAs of it, each with its weight, in the order in which they were given.
Plan = Mapping[tuple[str, str], Sequence[tuple[Factors, float]]]
_METADATA = "__metadata__"


def merge_into(
    checkpoint: Path,
    files: Sequence[Weighted],
    target: Path,
    *,
    family: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write `checkpoint` with the LoRAs added to its weights: the same tensors in the same order and number formats,
    and its metadata, less a hash of what it was. What there is to say.

    One tensor at a time is in memory. Raises ModelError and OutputError; nothing is then written.
    """
    refuse_existing(target, overwrite=overwrite)
    whole = outline(checkpoint)
    loras, known = read_all([file.path for file in files], family)
    if known.name != whole.family.name:
        raise ModelError(f"{files[0].path}: a LoRA for {known.name}; {checkpoint} is {whole.family.name}")
    plan = _plan(whole, loras, [file.weight for file in files])
    header = read_header(checkpoint)
    metadata = {key: text for key, text in header.get(_METADATA, {}).items() if key != "modelspec.hash_sha256"}
    before = _before(checkpoint, metadata)
    metadata[MERGED] = json.dumps(before + json.loads(merged_record(loras, [file.weight for file in files])))
    entries = {key: entry for key, entry in header.items() if key != _METADATA}
    publish(_parts({_METADATA: metadata, **entries}, _merged(whole, plan)), target)
    told = [f"{target}: {len(files)} LoRAs in {checkpoint.name}, {len(plan)} of its weights changed"]
    yaml = checkpoint.with_suffix(".yaml")
    if yaml.is_file():
        told.append(f"{yaml} says how that checkpoint is loaded: copy it to {target.with_suffix('.yaml').name}")
    return told


def applied(weight: Tensor, loras: Iterable[tuple[Factors, float]]) -> Tensor:
    """`weight` with LoRAs in it, float32, as WebUI 1.10 adds them on a CPU (extensions-builtin/Lora/network.py,
    finalize_updown): one after another, up · down, times alpha / rank, times the prompt's weight."""
    whole = weight.float()
    for f, strength in loras:
        change = (f.up.float().flatten(1) @ f.down.float().flatten(1)).reshape(weight.shape)
        whole = whole + change * (f.alpha / f.rank) * strength
    return whole


def _plan(whole: Outline, loras: Sequence[Lora], weights: Sequence[float]) -> Plan:
    """Raises ModelError when a module has no place in the checkpoint, or one of another size."""
    shapes = {
        (network, module): view.shape
        for key, shape in whole.shapes.items()
        for network, module, view in whole.weights(key, torch.empty(shape, device="meta"))
    }
    names = {name: place for place in shapes for name in whole.names(*place)}
    plan: dict[tuple[str, str], list[tuple[Factors, float]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for name, f in numbered(lora, whole.family).factors.items():
            place = names.get(name)
            if place is None:
                raise ModelError(f"{lora.path}: {whole.path} has no place for {name}")
            shape = shapes[place]
            if (len(f.up), f.down[0].numel()) != (shape[0], shape[1:].numel()):
                found = f"maps {f.down[0].numel()} to {len(f.up)}, the model's own {shape[1:].numel()} to {shape[0]}"
                raise ModelError(f"{lora.path}: made for another base model: {name} {found}")
            plan.setdefault(place, []).append((f, weight))
    return plan


def _merged(whole: Outline, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in stored_tensors(whole.path, as_stored=True):
        for network, module, view in whole.weights(key, tensor):
            if (network, module) in plan:
                changed = applied(view, plan[network, module]).to(tensor.dtype)
                if not changed.float().isfinite().all():
                    raise ModelError(f"{whole.path}: {key} with the LoRAs is too large for its numbers")
                view.copy_(changed)
        yield key, tensor


def _before(path: Path, metadata: Mapping[str, str]) -> list:
    """LoRAs that went into the checkpoint earlier."""
    try:
        earlier = json.loads(metadata.get(MERGED, "[]"))
    except ValueError as error:
        raise ModelError(f"{path}: its header's {MERGED} is not JSON ({error})") from error
    return earlier if isinstance(earlier, list) else [earlier]


def _parts(header: Mapping[str, object], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """A .safetensors file with this header, part by part."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in tensors:
        yield raw(tensor)
