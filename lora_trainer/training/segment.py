"""A training segment: everything built on one borrowed model, and the state that outlives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_trainer.adapters.inject import Adapter, inject
from lora_trainer.adapters.targets import select
from lora_trainer.config import Config
from lora_trainer.models.model import Model
from lora_trainer.training import randomness
from lora_trainer.training.checkpointing import checkpointed
from lora_trainer.training.dropout import LoraDropout
from lora_trainer.training.objectives import mse
from lora_trainer.training.optimizers import AdamWSettings, FlatAdamW, Optimizer
from lora_trainer.training.precision import LossScaler, resolve
from lora_trainer.training.step import ForwardBackward, Network, Update
from lora_trainer.training.trainables import Trainables

# What a segment hands to the next one: part, tensor name, tensor.
State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Segment:
    """The machinery of one borrowing."""

    model: Model
    adapter: Adapter
    network: Network
    trainables: Trainables
    optimizer: Optimizer
    scaler: LossScaler
    forward_backward: ForwardBackward
    update: Update

    @property
    def base_count(self) -> int:
        """Scalars of the frozen network."""
        return sum(parameter.numel() for parameter in self.model.unet.parameters()) - self.trainables.count

    def state(self) -> State:
        """A copy of everything that training has changed."""
        return {
            "masters": self.trainables.state(),
            "optimizer": self.optimizer.state(),
            "scaler": self.scaler.state(),
        }

    def load_state(self, state: State) -> None:
        self.trainables.load_state(state["masters"])
        self.optimizer.load_state(state["optimizer"])
        self.scaler.load_state(state["scaler"])


@contextmanager
def open_segment(config: Config, model: Model, state: State | None) -> Iterator[Segment]:
    """Inject the adapter into `model`'s view and go on from `state`; the view is clean of hooks afterwards."""
    precision, _ = resolve(config.mixed_precision, model.facts.device)
    rank = config.lora_rank
    adapter = inject(
        model.unet,
        select(model.unet, config.target_modules),
        rank=rank,
        alpha=alpha_of(config),
        generator=lambda name: randomness.generator(config.seed, f"init {name}"),
    )
    dropout = LoraDropout(adapter.downs(), config.lora_dropout, precision.compute)
    try:
        with checkpointed(model.unet) if config.gradient_checkpointing else nullcontext():
            trainables = Trainables({"unet": adapter.parameters()})
            segment = _assemble(
                config, model, adapter, Network(model.unet, model.noise, mse, precision, dropout), trainables
            )
            if state is not None:
                segment.load_state(state)
            yield segment
    finally:
        dropout.remove()


def alpha_of(config: Config) -> float:
    """lora_alpha, by default twice the rank."""
    return float(2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha)


def _assemble(config: Config, model: Model, adapter: Adapter, network: Network, trainables: Trainables) -> Segment:
    device = model.facts.device
    scaler = LossScaler(device, enabled=network.precision.compute == torch.float16)
    optimizer = FlatAdamW(trainables, AdamWSettings(weight_decay=config.weight_decay))
    loss = torch.zeros((), device=device)
    return Segment(
        model=model,
        adapter=adapter,
        network=network,
        trainables=trainables,
        optimizer=optimizer,
        scaler=scaler,
        forward_backward=ForwardBackward(network, scaler, loss),
        update=Update(trainables, optimizer, scaler, loss, max_grad_norm=config.max_grad_norm),
    )
