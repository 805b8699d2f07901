"""Reading files of adapters: kohya's, diffusers' and PEFT's LoRAs, and LyCORIS'."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lora_trainer.adapters import peft_files
from lora_trainer.adapters.lycoris import Scales
from lora_trainer.adapters.metadata import CONFIG
from lora_trainer.adapters.naming import TEXT_PREFIX, UNET_PREFIX, Weights, from_native, kohya_name
from lora_trainer.adapters.parsing import weights_of
from lora_trainer.errors import ModelError, shown
from lora_trainer.models.checkpoint import read_header, stored_tensors

_KOHYA = re.compile(
    r"(?P<name>(?:lora|oft)_[a-z0-9]+_[^.]+)\."
    r"(?P<part>lora_(?:down|up|A|B)\.weight|alpha|dora_scale|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?"
    r"|weight|on_input|oft_blocks)"
)
# Older diffusers says lora.down, and lora_linear_layer.down in the text encoder.
_DIFFUSERS = re.compile(
    r"(?P<network>unet|text_encoder|text_encoder_2)\.(?P<name>.+)\."
    r"(?P<part>lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)\.weight"
)
_PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
}

# No number beyond this is an alpha; JSON may hold whole numbers that no float can.
_LARGEST = 1e30


@dataclass(frozen=True)
class Lora:
    """A file's modules by kohya's name (`lora_unet_…`), and its metadata. `form`: kohya, diffusers or peft, whose names
    it has; `alphas`: those that are tensors of it."""

    path: Path
    factors: dict[str, Weights]
    metadata: dict[str, str]
    precision: str
    alphas: dict[str, Tensor] = field(default_factory=dict)
    form: str = "kohya"


def read_lora(path: Path) -> Lora:
    """The plain LoRA in a .safetensors file, or in a folder as PEFT saves it: all its `factors` are Factors without a
    dora_scale. Raises ModelError."""
    lora = read_adapter(path)
    for name, f in lora.factors.items():
        if f.kind != "LoRA":
            raise ModelError(f"{path}: expected a LoRA, found {f.kind} at {name}")
    return lora


def read_adapter(path: Path) -> Lora:
    """The LoRA, DoRA, LoHa, LoKr, IA³ or OFT in a .safetensors file, or the LoRA in a folder as PEFT saves it. Raises
    ModelError."""
    if path.is_dir():
        return _read_folder(path)
    header = read_header(path)
    keys = [key for key in header if key != "__metadata__"]
    renamed = peft_files.as_diffusers(path, keys)
    names = {key: renamed.get(key, from_native(key)) for key in keys}
    prefixes = _prefixes(names.values())
    places = {key: _place(name, prefixes) for key, name in names.items()}
    strange = [key for key, place in places.items() if place is None]
    if len(strange) == len(keys):
        raise ModelError(f"{path}: this is {_kind(keys)}")
    if strange:
        raise ModelError(
            f"{path}: {len(strange)} of {len(keys)} tensors are of another adapter, such as {strange[0]!r}"
        )
    tensors = dict(stored_tensors(path))
    modules: dict[str, dict[str, Tensor]] = {}
    for key, (name, part) in places.items():
        modules.setdefault(name, {})[part] = tensors[key]
    metadata = dict(header.get("__metadata__", {}))
    config = adapter_metadata(path, metadata.get(CONFIG) or "{}") | peft_files.settings(path, renamed.values())
    alphas = configured_alphas(path, config, {name: header[key]["shape"] for key, name in names.items()})
    factors = {name: weights_of(path, name, parts, alphas.get(name)) for name, parts in modules.items()}
    precision = next(header[key]["dtype"] for key in keys if not key.endswith(("alpha", "dora_scale", "on_input")))
    own = {name: parts["alpha"] for name, parts in modules.items() if "alpha" in parts}
    form = "peft" if renamed else "kohya" if any(map(_KOHYA.fullmatch, names.values())) else "diffusers"
    return Lora(path, factors, metadata, precision, own, form)


def _read_folder(folder: Path) -> Lora:
    """A network's LoRA in each of PEFT's folders."""
    loras = {network: read_lora(file) for network, file in peft_files.files(folder).items()}
    factors = {name: f for lora in loras.values() for name, f in lora.factors.items()}
    if peft_files.SECOND in loras:
        alone, numbered = f"{TEXT_PREFIX}_", f"{TEXT_PREFIX}1_"
        factors = {re.sub(f"^{alone}", numbered, name): f for name, f in factors.items()}
    first = next(iter(loras.values()))
    return Lora(folder, factors, first.metadata, first.precision, form=first.form)


def match(
    lora: Lora, model: nn.Module, prefix: str = UNET_PREFIX, *, named: Callable[[str], str] = str
) -> tuple[dict[str, Weights], list[str]]:
    """(factors by module name in the model's order, names under `prefix` that the model does not have). A file may call
    modules as the model does, or as `named` does.

    Raises ModelError when a module of that name has other sizes: families share names.
    """
    wanted = {name: factors for name, factors in lora.factors.items() if name.startswith(prefix + "_")}
    modules = {
        kohya_name(prefix, way(name)): (name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for way in (str, named)
    }
    for name in wanted.keys() & modules.keys():
        weight, f = modules[name][1], wanted[name]
        # A 1×1 convolution's factors may come as a linear layer's, and the other way round.
        scale, own = f.parts().get("dora_scale"), (weight.shape[0], _inputs(weight, f))
        if any(size not in (None, expected) for size, expected in zip(f.sizes, own, strict=True)):
            outputs, inputs = (size or "what it gets" for size in f.sizes)
            raise ModelError(
                f"{lora.path}: made for another base model: {name} maps {inputs} to {outputs}, "
                f"the model's own {own[1]} to {own[0]}"
            )
        if isinstance(f, Scales) and weight.dim() == 4 and not f.on_input:
            raise ModelError(f"{lora.path}: {name} scales a convolution's outputs, as the WebUI does not")
        if scale is not None and scale.numel() != weight.shape[1]:
            raise ModelError(
                f"{lora.path}: {name}.dora_scale has {scale.numel()} numbers; expected {weight.shape[1]}, one for each "
                "input: it scales the outputs, as the WebUI does not"
            )
    matched = {module: wanted[name] for name, (module, _) in modules.items() if name in wanted}
    return matched, [name for name in wanted if name not in modules]


def _inputs(weight: Tensor, f: Weights) -> int:
    """Of each output; IA³ has one number for all of a convolution's kernel."""
    return weight.shape[1] if isinstance(f, Scales) else weight[0].numel()


def _prefixes(keys: Iterable[str]) -> dict[str, str]:
    """kohya's prefixes of diffusers' networks: the text encoders are numbered where there are two (SDXL)."""
    two = any(key.startswith("text_encoder_2.") for key in keys)
    first = f"{TEXT_PREFIX}1" if two else TEXT_PREFIX
    return {"unet": UNET_PREFIX, "text_encoder": first, "text_encoder_2": f"{TEXT_PREFIX}2"}


def _place(key: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
    """(kohya's module name, down | up | the part's own name) of a tensor; None for other kinds of adapter."""
    if found := _KOHYA.fullmatch(key):
        # kohya's OFT has a prefix of its own.
        return re.sub("^oft_", "lora_", found["name"]), _PARTS.get(found["part"], found["part"])
    if found := _DIFFUSERS.fullmatch(key):
        part = "down" if found["part"].endswith(("A", "down")) else "up"
        return kohya_name(prefixes[found["network"]], found["name"]), part
    return None


def _kind(keys: Sequence[str]) -> str:
    """What a file without any tensor of a known LoRA is instead."""
    foreign = next((key for key in keys if "lora_" in key or ".lora." in key), None)
    if foreign is not None:
        return f"a LoRA whose names are not known here ({len(keys)} tensors, such as {foreign!r})"
    kind = "a checkpoint, not a LoRA" if any("diffusion_model." in key for key in keys) else "not a LoRA"
    return f"{kind} ({len(keys)} tensors, none with lora_down or lora_A)"


def configured_alphas(path: Path, config: Mapping[str, object], shapes: Mapping[str, list[int]]) -> dict[str, float]:
    """Alphas by kohya's name from the PEFT config that recent diffusers puts in the header
    (`lora_adapter_metadata`: JSON of "unet.lora_alpha", "unet.alpha_pattern", …). Raises ModelError."""
    prefixes = _prefixes(shapes)
    alphas: dict[str, float] = {}
    for key, shape in shapes.items():
        found = _DIFFUSERS.fullmatch(key)
        if found is None or not shape or not found["part"].endswith(("A", "down")):
            continue
        network, module = found["network"], found["name"]
        pattern = config.get(f"{network}.alpha_pattern") or {}
        if not isinstance(pattern, dict):
            found = shown(pattern)
            raise ModelError(f"{path}: lora_adapter_metadata: expected an object as alpha_pattern, found {found}")
        own = (a for ending, a in pattern.items() if f".{module}".endswith(f".{ending.lstrip('^')}"))
        alpha = next(own, config.get(f"{network}.lora_alpha"))
        if alpha is None:
            continue
        if not isinstance(alpha, (int, float)) or abs(alpha) > _LARGEST:
            wanted = f"expected a number as alpha of {module}, found {shown(alpha)}"
            raise ModelError(f"{path}: lora_adapter_metadata: {wanted}")
        # Rank-stabilised LoRA scales by alpha / sqrt(r).
        stabilised = math.sqrt(shape[0]) if config.get(f"{network}.use_rslora") else 1.0
        alphas[kohya_name(prefixes[network], module)] = alpha * stabilised
    return alphas


def adapter_metadata(path: Path, text: str) -> dict[str, object]:
    """What diffusers says of a file in its header. Raises ModelError."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its lora_adapter_metadata is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: its lora_adapter_metadata is a JSON {type(config).__name__}; expected an object")
    return config
