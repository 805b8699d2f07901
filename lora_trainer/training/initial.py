"""A run that starts from an existing LoRA: which one, whether it fits, and its weights in the adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_trainer.adapters.forms import family_of, numbered
from lora_trainer.adapters.hashes import model_hash
from lora_trainer.adapters.inject import ADAPTER, Adapter, Size
from lora_trainer.adapters.load import Lora, match, read_lora
from lora_trainer.adapters.metadata import INITIAL
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.parts import parts_of
from lora_trainer.adapters.svd import Rule, grown, shrunk
from lora_trainer.config import Config
from lora_trainer.errors import ModelError, shown
from lora_trainer.models.checkpoint import read_header
from lora_trainer.models.model import Model
from lora_trainer.training.chosen import text_layer, text_sizes, unet_sizes

SUFFIX = ".safetensors"
# By network and module: what a LoRA has, and the size that it gets.
Placed = Mapping[str, Mapping[str, tuple[Factors, Size]]]


@dataclass(frozen=True)
class Start:
    """What a run starts from: nothing, or a LoRA. `origin` is what the file's header and the states say of it; in a run
    that goes on from a state `lora` is None, since the state has its weights."""

    origin: Mapping[str, str] = field(default_factory=dict)
    lora: Lora | None = None

    @classmethod
    def of(cls, config: Config) -> Start:
        """`initial_lora`, read. Raises ModelError for a file that is not there, or is no plain LoRA."""
        if config.initial_lora is None:
            return cls()
        try:
            path = find(config)
            lora = read_lora(path)
        except ModelError as error:
            raise ModelError(f"initial_lora: {str(error).removeprefix('initial_lora: ')}") from error
        return cls({"name": path.name, "sshs_model_hash": hash_of(path)}, lora)

    def placed(self, config: Config, model: Model) -> Placed:
        """Its modules by network and by name in the adapters of `config` on `model`, which has none yet.

        Raises ModelError when it is for another family, or when something of it would be lost.
        """
        if self.lora is None:
            return {}
        ours = model.facts.family
        lora, theirs = numbered(self.lora, ours), family_of(self.lora)
        if theirs is not None and theirs.text != ours.text:
            raise ModelError(f"initial_lora: {lora.path} is a LoRA for {theirs.name}; this run trains {ours.name}")
        parts, targets = parts_of(model), targeted(config, model)
        placed: dict[str, dict[str, tuple[Factors, Size]]] = {}
        known: set[str] = set()
        for network, part in parts.items():
            try:
                found, strange = match(lora, part.module, part.prefix, named=part.ldm)
            except ModelError as error:
                raise ModelError(f"initial_lora: {error}") from error
            known |= {name for name in lora.factors if name.startswith(f"{part.prefix}_")} - set(strange)
            sizes = targets.get(network, {})
            called = {name if network == "unet" else text_layer(network, name): f for name, f in found.items()}
            lost = {name: f for name, f in called.items() if name not in sizes and _acts(f)}
            if lost:
                raise ModelError(_untrained(lora, network, next(iter(lost)), len(lost)))
            placed[network] = {name: (f, sizes[name]) for name, f in called.items() if name in sizes}
        strange = [name for name, f in lora.factors.items() if name not in known and _acts(f)]
        if strange or not any(placed.values()):
            example = f", such as {strange[0]}" if strange else ""
            raise ModelError(
                f"initial_lora: {lora.path}: {len(strange) or len(lora.factors)} of its {len(lora.factors)} modules "
                f"have no place in {model.facts.name}{example}"
            )
        return placed


NOTHING = Start()


def find(config: Config) -> Path:
    """The file that `initial_lora` means: a path, or a name among the WebUI's LoRAs. Raises ModelError."""
    text = config.initial_lora or ""
    folder = Path(config.base_model).parent.parent / "Lora"
    for path in (Path(text), Path(text + SUFFIX)):
        if path.exists():
            return path
    if Path(text).name == text and folder.is_dir():
        wanted = text if text.endswith(SUFFIX) else text + SUFFIX
        found = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.name == wanted)
        if found:
            return found[0]
    raise ModelError(f"initial_lora: expected a LoRA file, or the name of one in {folder}, found {shown(text)}")


def hash_of(path: Path) -> str:
    """`sshs_model_hash` of what is in a file now; of a folder as PEFT saves it, of all files in it."""
    files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
    return " ".join(model_hash(file.read_bytes()) for file in files)


def other_start(origin: Mapping[str, str], config: Config) -> str | None:
    """How `initial_lora` differs from what a run began with, which its states say is `origin`. A file that is gone, or
    that the run itself has replaced, is no difference: the states have its weights."""
    if not origin or config.initial_lora is None:
        same = not origin and config.initial_lora is None
        return None if same else f"{origin.get('name')} was its initial_lora, now {config.initial_lora}"
    try:
        path = find(config)
    except ModelError:
        return None
    if hash_of(path) == origin["sshs_model_hash"] or _started_from(path) == origin:
        return None
    return f"{origin['name']} was its initial_lora; {path} holds other weights"


def _started_from(path: Path) -> object:
    """What a file's header says of where its run began."""
    header = {} if path.is_dir() else read_header(path)
    return json.loads(header.get("__metadata__", {}).get(INITIAL, "null"))


def targeted(config: Config, model: Model) -> dict[str, dict[str, Size]]:
    """The sizes of what `config` trains, by network and by module as the adapters call it. Raises ConfigError."""
    targets = {"unet": unet_sizes(config, model.unet)} if config.train_unet else {}
    if config.train_text_encoder:
        for network, encoder in model.text.networks.items():
            sizes = text_sizes(config, encoder, network)
            targets[network] = {text_layer(network, name): size for name, size in sizes.items()}
    return targets


@torch.no_grad()
def fill(adapters: Mapping[str, Adapter], placed: Placed) -> None:
    """The weights of `placed` in freshly injected adapters, which then add to the base what the LoRA adds to it. What
    the LoRA does not have stays as it is: it adds nothing yet."""
    for network, modules in placed.items():
        for name, (f, size) in modules.items():
            layer = adapters[network].layers[name]
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            fitted = _fitted(f, size, down)
            down.copy_(fitted.down.reshape(down.shape))
            up.copy_(fitted.up.reshape(up.shape))


def _fitted(f: Factors, size: Size, fresh: torch.Tensor) -> Factors:
    """`f` in float32 at another size: the very numbers where it is its own."""
    f = Factors(f.down.float(), f.up.float(), f.alpha)
    if f.rank > size.rank:
        f = shrunk(f, Rule(size.rank))[0]
    if f.rank < size.rank:
        f = grown(f, size.rank, fresh.cpu())
    # A power of two where scales are what they usually are, which loses no digit.
    ratio = (f.alpha / f.rank) / (size.alpha / size.rank)
    return f if ratio == 1 else Factors(f.down, f.up * ratio, size.alpha)


def what_of(placed: Placed, config: Config) -> str:
    """What is said of it before the first step."""
    pairs = [pair for modules in placed.values() for pair in modules.values()]
    text = f"starts from {config.initial_lora}: {len(pairs)} modules of rank {_range(f.rank for f, _ in pairs)}"
    if any(f.rank != size.rank for f, size in pairs):
        text += f", at rank {_range(size.rank for _, size in pairs)} now"
    if any(f.alpha / f.rank != size.alpha / size.rank for f, size in pairs):
        then, now = (_range(one.alpha / one.rank for one in ones) for ones in zip(*pairs, strict=True))
        text += f"; alpha / rank was {then} and is {now} now, with the weights scaled to match"
    return text


def _range(found: Iterable[float]) -> str:
    values = set(found)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _acts(f: Factors) -> bool:
    return bool(f.up.float().any() and f.down.float().any() and f.alpha)


def _untrained(lora: Lora, network: str, name: str, count: int) -> str:
    unet = network == "unet"
    wanted = "train_unet and target_modules that mean them" if unet else "train_text_encoder: true"
    return (
        f"initial_lora: {lora.path}: {count} of its modules in {'the UNet' if unet else 'a text encoder'}, such as "
        f"{name}, are not trained in this run and would be lost; expected {wanted}"
    )
