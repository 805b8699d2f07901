"""One module's tensors in a file to what they are, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_trainer.adapters.lycoris import Hada, Kron, Rotation, Scales
from lora_trainer.adapters.naming import Factors, Weights
from lora_trainer.errors import ModelError


def weights_of(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Weights:
    """`parts` by what files call them (down and up for a LoRA's); `alpha` where it stands elsewhere. Raises
    ModelError."""
    tensors = {key: tensor for key, tensor in parts.items() if key != "alpha"}
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ModelError(f"{path}: {name}.alpha has {parts['alpha'].numel()} numbers; expected one")
        alpha = parts["alpha"].item()
    kinds = {_KINDS.get(key) or key.partition("_")[0] for key in tensors} - {"dora"}
    if len(kinds) > 1:
        raise ModelError(f"{path}: {name} holds two kinds of adapter: {', '.join(sorted(tensors))}")
    (kind,) = kinds or {"lora"}
    if kind != "lora" and "dora_scale" in tensors:
        raise ModelError(f"{path}: {name} has a dora_scale beside {kind}; expected one beside lora_down only")
    return _READERS[kind](path, name, tensors, alpha)


def _factors(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Factors:
    if "down" not in parts or "up" not in parts:
        missing = "lora_down" if "up" in parts else "lora_up"
        raise ModelError(f"{path}: {name} lacks its {missing}")
    down, up = parts["down"], parts["up"]
    if down.dim() not in (2, 4) or up.dim() not in (2, 4) or math.prod(up.shape[2:]) != 1:
        raise ModelError(
            f"{path}: {name} has shapes {list(down.shape)} and {list(up.shape)}; "
            "expected [r, in] or [r, in, h, w], and [out, r] or [out, r, 1, 1]"
        )
    if down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise ModelError(f"{path}: {name} has ranks {down.shape[0]} and {up.shape[1]}; expected equal ones")
    # Without an alpha the scale is 1, as every loader has it.
    return Factors(down, up, float(down.shape[0] if alpha is None else alpha), parts.get("dora_scale"))


def _hada(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Hada:
    tensors = {part.removeprefix("hada_"): tensor for part, tensor in parts.items()}
    for part in ("w1_a", "w1_b", "w2_a", "w2_b"):
        if part not in tensors:
            raise ModelError(f"{path}: {name} lacks its hada_{part}")
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    for one, other in (("w1_a", "w1_b"), ("w2_a", "w2_b")):
        _product(path, name, shapes[one], shapes[other])
    if shapes["w1_a"][0] != shapes["w2_a"][0] or shapes["w1_b"][1] != shapes["w2_b"][1]:
        raise ModelError(
            f"{path}: {name} has products of sizes {shapes['w1_a']} and {shapes['w2_a']}; expected equal ones"
        )
    return Hada(**tensors, alpha=float(shapes["w1_b"][0] if alpha is None else alpha))


def _kron(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Kron:
    tensors = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items()}
    for side in ("w1", "w2"):
        halves = [f"{side}_{half}" for half in "ab" if f"{side}_{half}" in tensors]
        if (side in tensors) == (len(halves) == 2) or len(halves) == 1:
            raise ModelError(f"{path}: {name} lacks its lokr_{side}, or lokr_{side}_a and lokr_{side}_b")
        if halves:
            _product(path, name, *(tuple(tensors[half].shape) for half in halves))
    whole = tensors.get("w2")
    if any(t.dim() != 2 for key, t in tensors.items() if key != "w2") or (
        whole is not None and whole.dim() not in (2, 4)
    ):
        raise ModelError(f"{path}: {name} has tensors that are no matrices; expected them for lokr, but for lokr_w2")
    kron = Kron(**tensors, alpha=1.0)
    return Kron(**tensors, alpha=float(kron.rank if alpha is None else alpha))


def _scales(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Scales:
    for part in ("weight", "on_input"):
        if part not in parts:
            raise ModelError(f"{path}: {name} lacks its {part}")
    weight, on_input = parts["weight"], parts["on_input"]
    if on_input.numel() != 1:
        raise ModelError(f"{path}: {name}.on_input has {on_input.numel()} numbers; expected one")
    if weight.numel() == 0 or weight.numel() != max(weight.shape, default=1):
        raise ModelError(f"{path}: {name}.weight has the shape {list(weight.shape)}; expected one number a channel")
    if on_input.item() == 0:
        return Scales(weight.reshape(-1, 1))
    return Scales(weight.reshape(1, -1, *weight.shape[2:]))


def _rotation(path: Path, name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Rotation:
    if "oft_blocks" not in parts:
        raise ModelError(f"{path}: {name} lacks its oft_blocks")
    blocks = parts["oft_blocks"]
    if blocks.dim() == 4:
        raise ModelError(f"{path}: {name}.oft_blocks has four dimensions, as BOFT has them; expected OFT's three")
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or 0 in blocks.shape:
        raise ModelError(f"{path}: {name}.oft_blocks has the shape {list(blocks.shape)}; expected [k, n, n]")
    return Rotation(blocks, alpha=float(alpha or 0.0))


# The kinds of tensors that do not begin with it.
_KINDS = {"down": "lora", "up": "lora", "weight": "ia3", "on_input": "ia3"}
_READERS = {"lora": _factors, "hada": _hada, "lokr": _kron, "ia3": _scales, "oft": _rotation}


def _product(path: Path, name: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if len(one) != 2 or len(other) != 2 or one[1] != other[0] or one[1] == 0:
        raise ModelError(f"{path}: {name} has shapes {list(one)} and {list(other)}; expected [n, r] and [r, m]")
