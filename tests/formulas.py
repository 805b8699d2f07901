"""What the WebUI adds to a weight for the tensors of a file, after extensions-builtin/Lora of 1.10.1, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by what comes after the first dot."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tensor if tensor.dtype == torch.int64 else tensor.double()
    return found


def added(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """network_lora, network_hada, network_ia3, network_oft, network_lokr; then finalize_updown and
    apply_weight_decompose of network.py."""
    w, weight, dim = dict(parts), weight.double(), None
    if "lora_up.weight" in w:
        up, down = (w[f"lora_{part}.weight"] for part in ("up", "down"))
        updown, dim = up.reshape(len(up), -1) @ down.reshape(len(down), -1), len(down)
    elif "hada_w1_a" in w:
        updown, dim = (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"]), len(w["hada_w1_b"])
    elif "weight" in w:
        return weight * (w["weight"] if w["on_input"].item() else w["weight"].reshape(-1, 1))
    elif "oft_blocks" in w:
        return _turned(w, weight) - weight
    else:
        for half in ("lokr_w1", "lokr_w2"):
            if half not in w:
                w[half], dim = w[f"{half}_a"] @ w[f"{half}_b"], len(w[f"{half}_b"])
        left, right = w["lokr_w1"], w["lokr_w2"]
        rows = [torch.cat([left[i, j] * right for j in range(left.shape[1])], dim=1) for i in range(left.shape[0])]
        updown = torch.cat(rows, dim=0)
    updown = updown.reshape(weight.shape) * (1.0 if dim is None else w["alpha"].item() / dim)
    if "dora_scale" in w:
        merged = updown + weight
        dims = [dim for dim in range(merged.dim()) if dim != 1]
        updown = merged * (w["dora_scale"] / merged.square().sum(dim=dims, keepdim=True).sqrt()) - weight
    return updown


def _turned(w: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    blocks, eye = w["oft_blocks"], torch.eye(w["oft_blocks"].shape[1], dtype=torch.float64)
    skew = blocks - blocks.transpose(1, 2)
    constraint = w["alpha"] * len(weight) if "alpha" in w else 0
    if constraint != 0:
        norm = torch.norm(skew.flatten())
        skew = skew * ((torch.clamp(norm, max=constraint) + 1e-8) / (norm + 1e-8))
    turn = (eye + skew) @ torch.linalg.inv(eye - skew)
    parts = weight.reshape(len(blocks), blocks.shape[1], -1)
    return torch.stack([r.t() @ part for r, part in zip(turn, parts, strict=True)]).reshape(weight.shape)
