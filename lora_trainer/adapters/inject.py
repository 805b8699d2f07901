"""LoRA modules in a frozen view, through PEFT; names, forward and saving follow PEFT's layers."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_trainer.adapters.naming import Factors

ADAPTER = "default"


@dataclass(frozen=True)
class Size:
    """Of one module's adapter: its change of the weight is scaled by alpha / rank, and it learns `rate` times as fast
    as its network."""

    rank: int
    alpha: float
    rate: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """The injected layers of one network and their sizes, by module name in the network's order."""

    layers: dict[str, LoraLayer]
    sizes: dict[str, Size]

    def parameters(self) -> list[tuple[str, nn.Module, str]]:
        """(name, owner, attribute) of each trained tensor."""
        return [
            (f"{name}.{part}", getattr(layer, part)[ADAPTER], "weight")
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        ]

    def groups(self, ratio: float = 1.0) -> dict[float, list[tuple[str, nn.Module, str]]]:
        """`parameters` by how fast they learn beside the network; up projections learn `ratio` times as fast as down
        ones (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
        groups: dict[float, list[tuple[str, nn.Module, str]]] = {}
        for name, owner, attribute in self.parameters():
            module, _, part = name.rpartition(".")
            rate = self.sizes[module].rate * (ratio if part == "lora_B" else 1.0)
            groups.setdefault(rate, []).append((name, owner, attribute))
        return groups

    def called(self, way: Callable[[str], str]) -> Adapter:
        """The same under other names of its modules."""
        return Adapter(*({way(name): of for name, of in each.items()} for each in (self.layers, self.sizes)))

    def downs(self) -> dict[str, nn.Module]:
        """The down projections, whose output LoRA dropout acts on."""
        return {name: layer.lora_A[ADAPTER] for name, layer in self.layers.items()}

    def factors(self) -> dict[str, Factors]:
        """What a file holds: for each module down, up (float32 copies) and the true alpha."""
        return {
            name: Factors(
                down=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
                up=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
                alpha=float(self.sizes[name].alpha),
            )
            for name, layer in self.layers.items()
        }

    @contextmanager
    def weight(self, value: float) -> Iterator[None]:
        """The LoRA at `value` times its strength; at 0 the network is exactly the base."""
        before = {layer: layer.scaling[ADAPTER] for layer in self.layers.values()}
        try:
            for layer, scaling in before.items():
                layer.scaling[ADAPTER] = scaling * value
                layer.enable_adapters(value != 0)
            yield
        finally:
            for layer, scaling in before.items():
                layer.scaling[ADAPTER] = scaling
                layer.enable_adapters(True)


def joined(adapters: Sequence[Adapter]) -> Adapter:
    """Several networks' as one; no two of their modules have one name."""
    layers, sizes = ChainMap(*(a.layers for a in adapters)), ChainMap(*(a.sizes for a in adapters))
    return Adapter(dict(layers), dict(sizes))


@contextmanager
def without(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Inside, every one of `adapters` is off, and with them their dropout: the networks are the base."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.weight(0))
        yield


def inject(network: nn.Module, sizes: Mapping[str, Size], *, generator: Callable[[str], torch.Generator]) -> Adapter:
    """Put a LoRA on the modules of `network` (a frozen view; its tensors are not touched) that `sizes` names.

    Parameters are fp32 whatever the base's dtype. Down starts as PEFT's (Kaiming uniform, a = sqrt 5), drawn from
    `generator(module name)`, up starts at zero. Dropout is ours (`training.dropout`), so PEFT's is 0.
    """
    layers = _inject(network, list(sizes))
    for name, layer in layers.items():
        size, shape = sizes[name], layer.get_base_layer().weight.shape
        down = torch.empty(size.rank, *shape[1:])
        bound = 1 / math.sqrt(down[0].numel())
        down.uniform_(-bound, bound, generator=generator(name))
        _put(layer, down, torch.zeros(shape[0], size.rank), size)
    return Adapter(layers, dict(sizes))


def inject_factors(network: nn.Module, factors: Mapping[str, Factors]) -> Adapter:
    """Put a loaded LoRA on `network`, each module with its own rank and alpha, frozen."""
    layers = _inject(network, list(factors))
    sizes = {name: Size(f.rank, f.alpha) for name, f in factors.items()}
    for name, layer in layers.items():
        _put(layer, factors[name].down, factors[name].up, sizes[name])
        layer.requires_grad_(False)
    return Adapter(layers, sizes)


def _put(layer: LoraLayer, down: Tensor, up: Tensor, size: Size) -> None:
    """The tensors of a LoRA into PEFT's projections, which were made for rank 1."""
    device = layer.get_base_layer().weight.device
    for part, values in (("lora_A", down), ("lora_B", up)):
        projection = getattr(layer, part)[ADAPTER]
        shape = (*values.shape[:2], *projection.weight.shape[2:])
        projection.weight = nn.Parameter(values.float().reshape(shape).to(device))
    layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = size.rank, size.alpha
    layer.scaling[ADAPTER] = size.alpha / size.rank


def _inject(network: nn.Module, modules: Sequence[str]) -> dict[str, LoraLayer]:
    """PEFT's layers on `modules`, by name. Its initialisation moves no global generator."""
    # PEFT's rank patterns mean different things in its versions: inject rank 1, then put tensors of each rank in.
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(modules), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: found[name] for name in modules}
