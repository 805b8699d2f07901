"""`lora-trainer inspect`: what a LoRA file is, how it was trained, how strong it is where."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lora_trainer.adapters.hashes import model_hash
from lora_trainer.adapters.load import Lora, read_adapter
from lora_trainer.adapters.lycoris import Rotation, Scales
from lora_trainer.adapters.naming import Factors, Weights
from lora_trainer.errors import printable

_BLOCK = re.compile(
    r"lora_(unet|te\d?)_(?:text_model_encoder_)?((?:down|up)_blocks_[0-9]{1,4}|mid_block|layers_[0-9]{1,4}|[a-z]+_blocks?_[0-9]{1,4})?"
)
_TRAINING = {
    "base model": "ss_sd_model_name",
    "trained by": "ss_network_module",
    "images": "ss_num_train_images",
    "steps": "ss_steps",
    "epochs": "ss_num_epochs",
    "learning rate": "ss_learning_rate",
    "batch size": "ss_batch_size_per_device",
    "resolution": "ss_resolution",
    "optimizer": "ss_optimizer",
    "seed": "ss_seed",
    "trigger words": "modelspec.trigger_phrase",
    "date": "modelspec.date",
}


# The width of the text embeddings tells a family where the file names none.
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL refiner", 2048: "SDXL"}


@dataclass(frozen=True)
class Report:
    """Plain facts about a file. `norms`: Frobenius norm of what is added to the weights of each block, of DoRA before
    it is normalised, of IA³ and OFT as a share of the weights (what is added to an identity); None where it is not
    finite."""

    file: str
    kind: str
    size: int
    family: str
    precision: str
    modules: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[str, int]
    training: dict[str, str]
    hash_matches: bool | None
    norms: dict[str, float | None]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        parts = ", ".join(f"{count} in {part}" for part, count in self.modules.items())
        hashes = {True: "matches the data", False: "DOES NOT match the data", None: "not in the file"}
        lines = [
            f"{self.file}: {self.kind} for {self.family}, {self.size / 1e6:.1f} MB, {self.precision}",
            f"modules: {parts}",
            f"rank: {_counts(self.ranks)}; alpha: {_counts(self.alphas)}",
            f"sshs_model_hash: {hashes[self.hash_matches]}",
        ]
        lines += [f"{label}: {value}" for label, value in self.training.items()]
        lines = [printable(line) for line in lines]
        widest = max((norm for norm in self.norms.values() if norm), default=1.0)
        lines.append("norm by block:")
        for block, norm in self.norms.items():
            bar = "not finite" if norm is None else f"{norm:9.4f}  {'#' * round(30 * norm / widest)}"
            lines.append(f"  {block:<24} {bar}")
        return lines + [printable(f"warning: {warning}") for warning in self.warnings]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def describe(path: Path) -> Report:
    """Read and measure a LoRA file. Raises ModelError."""
    lora = read_adapter(path)
    data = path.read_bytes()
    said = lora.metadata.get("sshs_model_hash")
    return Report(
        file=path.name,
        kind=" and ".join(sorted({f.kind for f in lora.factors.values()})),
        size=len(data),
        family=_family(lora),
        precision=lora.precision,
        modules=dict(Counter(_block(name)[0] for name in lora.factors)),
        ranks=dict(Counter(f.rank for f in lora.factors.values() if f.rank is not None)),
        alphas=dict(Counter(f"{f.alpha:g}" for f in lora.factors.values() if f.alpha is not None)),
        training={label: lora.metadata[key] for label, key in _TRAINING.items() if key in lora.metadata},
        hash_matches=None if said is None else said == model_hash(data),
        norms=_norms(lora.factors),
        warnings=tuple(_warnings(lora.factors)),
    )


def _family(lora: Lora) -> str:
    said = lora.metadata.get("modelspec.architecture") or lora.metadata.get("ss_base_model_version")
    if said:
        return said
    widths = {f.sizes[1] for name, f in lora.factors.items() if name.endswith("_attn2_to_k") and f.sizes[1]}
    family = _FAMILIES.get(widths.pop()) if len(widths) == 1 else None
    return f"{family} (by its sizes)" if family else "an unnamed base model"


def _block(name: str) -> tuple[str, str]:
    """(part, block) of a kohya name."""
    found = _BLOCK.match(name)
    if found is None:
        return "other", "other"
    part = "unet" if found[1] == "unet" else "text encoder"
    return part, f"{found[1]} {found[2] or 'outer'}"


def _norms(factors: Mapping[str, Weights]) -> dict[str, float | None]:
    squares: dict[str, float] = {}
    for name, f in factors.items():
        block = _block(name)[1]
        norm = _norm(f)
        squares[block] = squares.get(block, 0.0) + norm * norm
    return {
        block: math.sqrt(squares[block]) if math.isfinite(squares[block]) else None
        for block in sorted(squares, key=_natural)
    }


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers_2 before layers_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _norm(f: Weights) -> float:
    if not isinstance(f, Factors):
        exact = {key: t.double() for key, t in vars(f).items() if isinstance(t, torch.Tensor)}
        norm = _change(replace(f, **exact)).norm().item()
        return norm if math.isfinite(norm) else math.nan
    return _product_norm(f)


def _change(f: Weights) -> torch.Tensor:
    """What is added to a weight, or to an identity where that depends on the weight."""
    if isinstance(f, Rotation):
        return f.turn()
    return f.weight if isinstance(f, Scales) else f.delta(torch.empty(f.sizes, device="meta"))


def _product_norm(f: Factors) -> float:
    """‖(alpha / r) B A‖ = (alpha / r) sqrt(tr(AAᵀ BᵀB)), without forming BA where that is larger."""
    a, b = f.down.double().flatten(1), f.up.double().flatten(1)
    if f.rank * f.rank <= len(b) * a.shape[1]:
        product = torch.trace((a @ a.T) @ (b.T @ b)).clamp(min=0)
    else:
        product = (b @ a).square().sum()
    return f.alpha / f.rank * math.sqrt(product.item()) if torch.isfinite(product) else math.nan


def _warnings(factors: Mapping[str, Weights]) -> list[str]:
    # In float32, since some versions of torch lack these tests for 8-bit floats.
    parts = {name: [t.float() for t in f.parts().values() if t.dim()] for name, f in factors.items()}
    broken = [n for n, tensors in parts.items() if not all(t.isfinite().all() for t in tensors) or _strange(factors[n])]
    zero = [n for n, tensors in parts.items() if not all(t.any() for t in tensors) or _silent(factors[n])]
    found = []
    if broken:
        found.append(f"{len(broken)} modules hold numbers that are not finite, such as {broken[0]}")
    if zero:
        found.append(f"{len(zero)} of {len(factors)} modules are all zero and do nothing, such as {zero[0]}")
    return found


def _strange(f: Weights) -> bool:
    return f.alpha is not None and not math.isfinite(f.alpha)


def _silent(f: Weights) -> bool:
    """Whether an alpha of 0 undoes it, which is no constraint for OFT."""
    return f.alpha == 0 and not isinstance(f, Rotation)


def _counts(values: Mapping[object, int]) -> str:
    if not values:
        return "none"
    return str(next(iter(values))) if len(values) == 1 else ", ".join(f"{v} (×{n})" for v, n in values.items())
