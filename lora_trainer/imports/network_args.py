"""What `network_module` and `network_args` of kohya's trainer mean here: networks/lora.py and networks/oft.py of
sd-scripts, and the arguments of LyCORIS' module for it (lycoris/kohya.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_trainer.config.adapting_rules import ALPHAS, WITHOUT_ALPHA
from lora_trainer.imports.taken import Taken

_LORA, _LYCORIS, _OFT = "networks.lora", "lycoris.kohya", "networks.oft"
_ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "ia3": "ia3", "diag-oft": "oft"}
# What LyCORIS' preset ia3 trains of a UNet.
_IA3 = ("to_k", "to_v", "ff.net.2")
_SAME = {
    "conv_dim": "conv_rank",
    "conv_alpha": "conv_alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
}
_REASONS = {
    "dora_wd": "its scale may be of the outputs there, which the WebUI applies wrongly: adapter=dora scales the inputs",
    "use_tucker": "convolutions are not decomposed further here",
    "use_cp": "convolutions are not decomposed further here",
    "dropout": "network_dropout is the same for a LoRA; LoHa and LoKr have none",
    "constraint": "how far OFT turns is not limited here",
    "rescaled": "OFT only turns here",
    "train_on_input": "IA³ scales the inputs of convolutions and of second feed-forward layers here",
    "enable_all_linear": "target_modules chooses",
    "enable_conv": "conv_rank does that here",
    "preset": "only full, attn-mlp and ia3 are known here: target_modules and exclude_modules choose",
    "block_lr_zero_threshold": "does nothing without rates of blocks",
}
# Sides by how many numbers there are of blocks: Stable Diffusion 1 and 2, SDXL (with one before and one after them).
_SIDES = {25: (12, 1, 12), 23: (9, 3, 9)}


def network(taken: Taken, values: dict[str, Any]) -> None:
    """Take the network's kind, its arguments and its largest norm out of `values`; what is left there has no
    counterpart."""
    module, given = values.get("network_module", _LORA), _arguments(values.get("network_args"))
    if given is None or module not in (_LORA, _LYCORIS, _OFT):
        return
    algorithm = str(given.get("algo", "lora")).lower()
    if module == _LYCORIS and algorithm not in _ALGORITHMS:
        return
    values.pop("network_module", None)
    if given:
        del values["network_args"]
    if module == _OFT:
        _oft(taken, values)
    if values.get("scale_weight_norms"):
        taken.take("scale_weight_norms", values.pop("scale_weight_norms"), "scale_weight_norms")
    rank, alpha = values.get("network_dim", 4), values.get("network_alpha", 1) or values.get("network_dim", 4)
    if module == _LYCORIS:
        _lycoris(taken, given, _ALGORITHMS[algorithm], rank, alpha)
    elif given.get("conv_dim"):
        given.setdefault("conv_alpha", 1)
    for theirs, ours in _SAME.items():
        if given.get(theirs) not in (None, "", 0, "0"):
            taken.take(ours, given.pop(theirs), theirs)
    _ranks(taken, given, rank, alpha)
    _rates(taken, given)
    kind = taken.settings.get("adapter")
    for key in ALPHAS if kind in WITHOUT_ALPHA else ():
        if key in taken.settings:
            taken.leave(key, taken.settings.pop(key), f"{kind} has no alpha")
    taken.leave_all(given, _REASONS, "network_args ")


def _arguments(given: object) -> dict[str, Any] | None:
    """`["conv_dim=8", …]` or a text of them, by name; None for anything else."""
    entries: Sequence[object] = given.split() if isinstance(given, str) else [] if given is None else given  # type: ignore[assignment]
    if not isinstance(entries, (list, tuple)) or not all(isinstance(e, str) and "=" in e for e in entries):
        return None
    pairs = (str(entry).partition("=") for entry in entries)
    return {name.strip(): text.strip() for name, _, text in pairs}


def _lycoris(taken: Taken, given: dict[str, Any], kind: str, rank: object, alpha: object) -> None:
    given.pop("algo", None)
    taken.take("adapter", kind, "network_args algo")
    if str(given.get("factor", "-1")) == "-1":
        given.pop("factor", None)
    elif kind == "lokr":
        taken.take("lokr_factor", given.pop("factor"), "network_args factor")
    preset = given.get("preset", "full")
    if preset not in ("full", "attn-mlp", "ia3"):
        return
    given.pop("preset", None)
    if preset == "ia3":
        taken.take("target_modules", list(_IA3), "network_args preset")
    if preset == "full":
        # What is not said of convolutions is as the rest there.
        given["conv_dim"], given["conv_alpha"] = given.get("conv_dim") or rank, given.get("conv_alpha") or alpha
        taken.remarks.append("LyCORIS' full preset trains the outermost layers of the UNet too, which no run here does")


def _oft(taken: Taken, values: dict[str, Any]) -> None:
    taken.take("adapter", "oft", "network_module")
    reasons = {
        "network_dim": "the number of blocks there; here lora_rank is the size of one",
        "network_alpha": "a limit of how far it turns there, which no run here has",
    }
    for key, why in reasons.items():
        if key in values:
            taken.leave(key, values.pop(key), why)


def _ranks(taken: Taken, given: dict[str, Any], rank: object, alpha: object) -> None:
    """There a block whose alpha is not said has that of the whole network."""
    if "block_dims" not in given:
        return
    names, dims = _blocks(given["block_dims"]), _numbers(given["block_dims"])
    alphas = _numbers(given.get("block_alphas", ",".join([str(alpha)] * len(dims or ()))))
    if names is None or dims is None or alphas is None or len(alphas) != len(dims):
        return
    found = [(name, d, a) for name, d, a in zip(names, dims, alphas, strict=True) if name]
    taken.take("block_ranks", [f"{name}={d:g}" for name, d, _ in found], "block_dims")
    taken.take("block_alphas", [f"{name}={a:g}" for name, d, a in found if d and a], "block_alphas")
    given.pop("block_dims")
    given.pop("block_alphas", None)


def _rates(taken: Taken, given: dict[str, Any]) -> None:
    sides = {"IN": "down_lr_weight", "MID": "mid_lr_weight", "OUT": "up_lr_weight"}
    least = (_numbers(given.get("block_lr_zero_threshold", "0")) or [0.0])[0]
    entries: list[str] = []
    for side, key in sides.items():
        rates = _numbers(given[key]) if key in given else []
        if rates is None:
            # Their names of curves: sine, linear+0.1.
            taken.leave(f"network_args {key}", given.pop(key), "write its numbers as block_lrs")
            continue
        one = side == "MID" and len(rates) == 1
        kept = [rate if rate > least else 0.0 for rate in rates]
        entries += [f"{side if one else f'{side}{number:02}'}={rate:g}" for number, rate in enumerate(kept)]
        given.pop(key, None)
    if entries:
        taken.take("block_lrs", entries, "down_lr_weight, mid_lr_weight, up_lr_weight")
        given.pop("block_lr_zero_threshold", None)


def _blocks(text: object) -> list[str | None] | None:
    count = len(str(text).split(","))
    if count not in _SIDES:
        return None
    down, middle, up = _SIDES[count]
    mid = ["MID"] if middle == 1 else [f"MID{number:02}" for number in range(middle)]
    names: list[str | None] = [*(f"IN{n:02}" for n in range(down)), *mid, *(f"OUT{n:02}" for n in range(up))]
    return [None, *names, None] if count == 23 else names


def _numbers(text: object) -> list[float] | None:
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        return None
