"""LoRA modules in a frozen view, through PEFT; names, forward and saving follow PEFT's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_trainer.adapters.naming import Factors

ADAPTER = "default"


@dataclass(frozen=True)
class Adapter:
    """The injected layers of one network, by module name in the network's order."""

    layers: dict[str, LoraLayer]
    rank: int
    alpha: float

    def parameters(self) -> list[tuple[str, nn.Module, str]]:
        """(name, owner, attribute) of each trained tensor."""
        return [
            (f"{name}.{part}", getattr(layer, part)[ADAPTER], "weight")
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        ]

    def downs(self) -> dict[str, nn.Module]:
        """The down projections, whose output LoRA dropout acts on."""
        return {name: layer.lora_A[ADAPTER] for name, layer in self.layers.items()}

    def factors(self) -> dict[str, Factors]:
        """What a file holds: for each module down, up (float32 copies) and the true alpha."""
        return {
            name: Factors(
                down=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
                up=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
                alpha=float(self.alpha),
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


@contextmanager
def without(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Inside, every one of `adapters` is off, and with them their dropout: the networks are the base."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.weight(0))
        yield


def inject(
    network: nn.Module,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    generator: Callable[[str], torch.Generator],
) -> Adapter:
    """Put a LoRA on `modules` of `network` (a frozen view; its tensors are not touched).

    Parameters are fp32 whatever the base's dtype. Down starts as PEFT's (Kaiming uniform, a = sqrt 5), drawn from
    `generator(module name)`, up starts at zero. Dropout is ours (`training.dropout`), so PEFT's is 0.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), lora_dropout=0.0)
    layers = _inject(network, modules, config)
    for name, layer in layers.items():
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        start = torch.empty(down.weight.shape)
        bound = 1 / math.sqrt(start[0].numel())
        start.uniform_(-bound, bound, generator=generator(name))
        device = layer.get_base_layer().weight.device
        down.weight = nn.Parameter(start.to(device))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
    return Adapter(layers, rank, alpha)


def inject_factors(network: nn.Module, factors: Mapping[str, Factors]) -> Adapter:
    """Put a loaded LoRA on `network`, each module with its own rank and alpha, frozen."""
    # PEFT's rank patterns mean different things in its versions: inject rank 1, then put the file's tensors in.
    layers = _inject(network, list(factors), LoraConfig(r=1, lora_alpha=1, target_modules=list(factors)))
    for name, layer in layers.items():
        device = layer.get_base_layer().weight.device
        f = factors[name]
        for part, values in (("lora_A", f.down), ("lora_B", f.up)):
            projection = getattr(layer, part)[ADAPTER]
            shape = (*values.shape[:2], *projection.weight.shape[2:])
            projection.weight = nn.Parameter(values.float().reshape(shape).to(device), requires_grad=False)
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = f.rank, f.alpha
        layer.scaling[ADAPTER] = f.alpha / f.rank
    return Adapter(layers, max(f.rank for f in factors.values()), max(f.alpha for f in factors.values()))


def _inject(network: nn.Module, modules: Sequence[str], config: LoraConfig) -> dict[str, LoraLayer]:
    """PEFT's layers on `modules`, by name. Its initialisation moves no global generator."""
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: found[name] for name in modules}
