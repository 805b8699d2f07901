"""A training segment: everything built on one borrowed model, and the state that outlives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lora_trainer.adapters.inject import ADAPTER, Adapter, inject
from lora_trainer.adapters.targets import select
from lora_trainer.config import Config
from lora_trainer.kernels.site import Site
from lora_trainer.models.model import Model
from lora_trainer.training import randomness
from lora_trainer.training.capture import Captures
from lora_trainer.training.checkpointing import checkpointed
from lora_trainer.training.dropout import LoraDropout
from lora_trainer.training.fused import Fused, fuse, is_linear
from lora_trainer.training.ladder import Plan
from lora_trainer.training.objectives import mse
from lora_trainer.training.optimizers import AdamWSettings, FlatAdamW, Optimizer
from lora_trainer.training.precision import LossScaler, resolve
from lora_trainer.training.snapshot import Snapshot, restore
from lora_trainer.training.step import ForwardBackward, Network, Update
from lora_trainer.training.tier import Tier, choose_tier
from lora_trainer.training.trainables import Trainables
from lora_trainer.training.working import WorkingCopy

# What a segment hands to the next one: `Snapshot.named`.
State = Mapping[str, Tensor]
# Free memory that a generation can be expected to need.
ROOM = 6 * 1024**3


@dataclass(frozen=True)
class Segment:
    """The machinery of one borrowing."""

    model: Model
    adapter: Adapter
    network: Network
    trainables: Trainables
    working: WorkingCopy
    optimizer: Optimizer
    scaler: LossScaler
    captures: Captures
    forward_backward: ForwardBackward
    update: Update
    tier: Tier

    @property
    def base_count(self) -> int:
        """Scalars of the frozen network."""
        return sum(parameter.numel() for parameter in self.model.unet.parameters()) - self.trainables.count

    def live(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: flat buffers as long as the masters, and scalars."""
        parts = {"optimizer": self.optimizer.live(), "scaler": self.scaler.live()}
        named = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return {"masters": self.trainables.masters, **named}

    def snapshot(self) -> Snapshot:
        return Snapshot.of(self.live(), self.trainables.slots)

    def restore(self, state: State) -> None:
        """Go on from `Snapshot.named` of an earlier segment, of this process or another."""
        restore(state, self.live(), self.trainables.slots)
        self.working.refresh()

    def make_room(self) -> None:
        """Before somebody else uses the GPU: what the captured step holds, where memory is short."""
        device = self.captures.device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < ROOM:
            self.captures.release()


@contextmanager
def open_segment(config: Config, model: Model, state: State | None, plan: Plan | None = None) -> Iterator[Segment]:
    """Inject the adapter into `model`'s view and go on from `state`; the view is clean of hooks afterwards."""
    precision, _ = resolve(config.mixed_precision, model.facts.device)
    adapter = inject(
        model.unet,
        select(model.unet, config.target_modules),
        rank=config.lora_rank,
        alpha=alpha_of(config),
        generator=lambda name: randomness.generator(config.seed, f"init {name}"),
    )
    dropout = LoraDropout(adapter.downs(), config.lora_dropout, precision.compute)
    with ExitStack() as stack:
        stack.callback(dropout.remove)
        trainables = Trainables({"unet": adapter.parameters()})
        tier = choose_tier(config, model, precision)
        working = WorkingCopy(trainables, precision.compute, collects=tier.ops.collects)
        fused = Fused(tier.ops, precision.compute, sites(adapter, working, dropout), tier.kernels)
        stack.enter_context(fuse(model.unet, fused))
        if (plan or Plan.of(config)).checkpointing:
            stack.enter_context(checkpointed(model.unet))
        network = Network(model.unet, model.noise, mse, precision, dropout, tier.memory_format)
        segment = _assemble(config, model, adapter, network, working, tier)
        stack.callback(segment.captures.release)
        if state is not None:
            segment.restore(state)
        yield segment


def alpha_of(config: Config) -> float:
    """lora_alpha, by default twice the rank."""
    return float(2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha)


def sites(adapter: Adapter, working: WorkingCopy, dropout: LoraDropout) -> dict[nn.Module, Site]:
    """The LoRAs that are computed by fused products: those on linear layers and 1×1 convolutions."""
    slots = {slot.name: slot for slot in working.trainables.slots}
    found = {}
    for name, layer in adapter.layers.items():
        if not is_linear(layer.get_base_layer()):
            continue
        down, up = slots[f"{name}.lora_A"], slots[f"{name}.lora_B"]
        found[layer] = Site(
            down=working.weight(down).flatten(1),
            up=working.weight(up).flatten(1),
            grad_down=working.grad(down).flatten(1),
            grad_up=working.grad(up).flatten(1),
            parameters=(down.owner.weight, up.owner.weight),
            scale=partial(layer.scaling.__getitem__, ADAPTER),
            draw=dropout.drawer(name, adapter.rank),
        )
    return found


def _assemble(
    config: Config, model: Model, adapter: Adapter, network: Network, working: WorkingCopy, tier: Tier
) -> Segment:
    device, trainables = model.facts.device, working.trainables
    scaler = LossScaler(device, enabled=network.precision.compute == torch.float16)
    optimizer = FlatAdamW(trainables, AdamWSettings(weight_decay=config.weight_decay))
    captures = Captures(device, enabled=tier.captured, deterministic=config.deterministic)
    loss = torch.zeros((), device=device)
    return Segment(
        model=model,
        adapter=adapter,
        network=network,
        trainables=trainables,
        working=working,
        optimizer=optimizer,
        scaler=scaler,
        captures=captures,
        forward_backward=ForwardBackward(network, scaler, loss, working=working, captures=captures),
        update=Update(
            working, optimizer, scaler=scaler, loss=loss, captures=captures, max_grad_norm=config.max_grad_norm
        ),
        tier=tier,
    )
