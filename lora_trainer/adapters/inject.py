"""Adapters in a frozen view, through PEFT: its layers hold their tensors, and a LoRA's compute it too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_trainer.adapters.kinds import KINDS, LORA, Kind, Size, kind_of
from lora_trainer.adapters.layers import ADAPTER, Change, Decomposed, Turned, computed
from lora_trainer.adapters.naming import Weights

__all__ = ["ADAPTER", "Adapter", "Size", "inject", "inject_factors", "strengthened", "without"]


@dataclass(frozen=True)
class Adapter:
    """The injected layers of one network and their sizes, by module name in the network's order; `computed`: what
    computes those of kinds that PEFT's own forward does not."""

    layers: dict[str, BaseTunerLayer]
    sizes: dict[str, Size]
    kind: Kind = LORA
    computed: dict[str, Change | Turned | Decomposed] = field(default_factory=dict)

    def parameters(self) -> list[tuple[str, nn.Module, str]]:
        """(name, owner, attribute) of each trained tensor."""
        return [
            (f"{name}.{part}", *place)
            for name, layer in self.layers.items()
            for part, place in places(layer, self.kind).items()
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
        each = {key: getattr(self, key) for key in ("layers", "sizes", "computed")}
        return replace(self, **{key: {way(name): of for name, of in by.items()} for key, by in each.items()})

    def downs(self) -> dict[str, nn.Module]:
        """The down projections, whose output LoRA dropout acts on."""
        return {name: layer.lora_A[ADAPTER] for name, layer in self.layers.items() if self.kind.is_lora}

    def changes(self) -> dict[str, Change | Turned]:
        """The modules without a product of a rank, of which outputs can be left out."""
        return {name: each for name, each in self.computed.items() if not isinstance(each, Decomposed)}

    def factors(self) -> dict[str, Weights]:
        """What a file holds: for each module its tensors (float32 copies) and the true alpha."""
        return {
            name: held(layer, self.kind, self.sizes[name], lambda tensor: tensor.detach().float().cpu().clone())
            for name, layer in self.layers.items()
        }

    @contextmanager
    def weight(self, value: float) -> Iterator[None]:
        """The adapter at `value` times its strength; at 0 the network is exactly the base."""
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
def strengthened(adapters: Iterable[Adapter], value: float) -> Iterator[None]:
    """Inside, every one of `adapters` has `value` times its strength."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.weight(value))
        yield


def without(adapters: Iterable[Adapter]) -> AbstractContextManager[None]:
    """Inside, every one of `adapters` is off, and with them their dropout: the networks are the base."""
    return strengthened(adapters, 0)


def inject(
    network: nn.Module, sizes: Mapping[str, Size], *, generator: Callable[[str], torch.Generator], kind: Kind = LORA
) -> Adapter:
    """Put an adapter on the modules of `network` (a frozen view; its tensors are not touched) that `sizes` names.

    Parameters are fp32 whatever the base's dtype, and begin as `kind` says, drawn from `generator(module name)`.
    """
    layers = _inject(network, list(sizes), kind)
    for name, layer in layers.items():
        _put(layer, kind.start(layer.get_base_layer().weight, sizes[name], generator(name)), kind, sizes[name])
    return _computed(Adapter(layers, dict(sizes), kind))


def inject_factors(network: nn.Module, factors: Mapping[str, Weights]) -> list[Adapter]:
    """Put what a file holds on `network`, each module with its own rank and alpha, frozen; an Adapter a kind."""
    by_kind: dict[str, dict[str, Weights]] = {}
    for name, f in factors.items():
        by_kind.setdefault(kind_of(f).name, {})[name] = f
    adapters = []
    for kind, some in ((KINDS[kind], some) for kind, some in by_kind.items()):
        layers = _inject(network, list(some), kind)
        sizes = {name: Size(f.rank, f.alpha) for name, f in some.items()}
        for name, layer in layers.items():
            found = {key: getattr(some[name], key) for key in kind.fields}
            _put(layer, {key: tensor for key, tensor in found.items() if tensor is not None}, kind, sizes[name])
            layer.requires_grad_(False)
        adapters.append(_computed(Adapter(layers, sizes, kind)))
    return adapters


def places(layer: BaseTunerLayer, kind: Kind) -> dict[str, tuple[nn.Module, str]]:
    """(owner, attribute) of the tensors in a layer, by PEFT's names of them."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for part in kind.fields.values():
        holder = getattr(layer, part)
        if isinstance(holder, nn.ModuleDict):
            found[part] = holder[ADAPTER], "weight"
        elif isinstance(holder, nn.Parameter):
            found[part] = layer, part
        elif ADAPTER in holder:
            found[part] = holder, ADAPTER
    return found


def held(layer: BaseTunerLayer, kind: Kind, size: Size, copied: Callable[[Tensor], Tensor] = lambda t: t) -> Weights:
    """What a layer holds: its live tensors, or copies."""
    there = places(layer, kind)
    tensors = {name: copied(getattr(*there[part])) for name, part in kind.fields.items() if part in there}
    return kind.weights(**tensors, alpha=None if size.alpha is None else float(size.alpha))


def _computed(adapter: Adapter) -> Adapter:
    """With forwards of ours where PEFT's own do not do, on the layers themselves."""
    if adapter.kind is LORA:
        return adapter
    for name, layer in adapter.layers.items():
        way = computed(layer, partial(held, layer, adapter.kind, adapter.sizes[name]))
        layer.forward = way.forward
        adapter.computed[name] = way
    return adapter


def _put(layer: BaseTunerLayer, tensors: Mapping[str, Tensor], kind: Kind, size: Size) -> None:
    """The tensors of a module into PEFT's layer, which was made for rank 1."""
    device = layer.get_base_layer().weight.device
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part, None)
        if isinstance(holder, nn.ParameterDict) and ADAPTER in holder:
            del holder[ADAPTER]
    for name, values in tensors.items():
        part = kind.fields[name]
        holder, values = getattr(layer, part, None), values.float().to(device)
        if isinstance(holder, nn.ModuleDict):
            shape = (*values.shape[:2], *holder[ADAPTER].weight.shape[2:])
            holder[ADAPTER].weight = nn.Parameter(values.reshape(shape))
        elif holder is None:
            setattr(layer, part, nn.Parameter(values))
        else:
            holder[ADAPTER] = nn.Parameter(values)
    alpha = layer.lora_alpha if kind.is_lora else layer.alpha
    layer.r[ADAPTER], alpha[ADAPTER] = (size.rank, size.alpha) if size.alpha else (1, 1.0)
    layer.scaling[ADAPTER] = size.scale


def _inject(network: nn.Module, modules: Sequence[str], kind: Kind) -> dict[str, BaseTunerLayer]:
    """PEFT's layers on `modules`, by name. Its initialisation moves no global generator."""
    # PEFT's rank patterns mean different things in its versions: inject rank 1, then put tensors of each rank in.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(kind.config(modules), network, adapter_name=ADAPTER)
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: found[name] for name in modules}
