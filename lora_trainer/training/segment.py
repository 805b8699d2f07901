"""A training segment: everything built on one borrowed model, and the state that outlives it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lora_trainer.adapters.inject import ADAPTER, Adapter, inject, without
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.adapters.naming import Weights
from lora_trainer.adapters.parts import layer_name
from lora_trainer.config import Config
from lora_trainer.events import Started
from lora_trainer.kernels.site import Site
from lora_trainer.models.model import Model
from lora_trainer.training import randomness
from lora_trainer.training.capture import Captures
from lora_trainer.training.checkpointing import checkpointed
from lora_trainer.training.chosen import (
    adapter_notices,
    learning_rate_of,
    text_layer,
    text_sizes,
    unet_sizes,
    up_ratio_of,
    usual_size,
)
from lora_trainer.training.clip import StepClip
from lora_trainer.training.dropout import LoraDropout, Shares
from lora_trainer.training.fused import Fused, fuse, is_linear
from lora_trainer.training.initial import NOTHING, Start, fill
from lora_trainer.training.ladder import ALL, Plan
from lora_trainer.training.lessons import lesson_of
from lora_trainer.training.library import optimizer_notices, optimizer_of
from lora_trainer.training.objectives import mse, objective_of, training_noise
from lora_trainer.training.optimizers import Optimizer
from lora_trainer.training.precision import LossScaler, resolve
from lora_trainer.training.preservation import Preservation
from lora_trainer.training.snapshot import Snapshot, restore
from lora_trainer.training.step import ForwardBackward, Network, Update
from lora_trainer.training.tier import ChooseOps, Tier, choose_tier
from lora_trainer.training.trainables import Trainables
from lora_trainer.training.working import WorkingCopy

# What a segment hands to the next one: `Snapshot.named`.
State = Mapping[str, Tensor]
# Before the names of weights as they would be saved, those of the best step.
BEST = "best"
# Free memory that a generation can be expected to need.
ROOM = 6 * 1024**3


@dataclass(frozen=True)
class Segment:
    """The machinery of one borrowing. `adapters`: what is trained, by diffusers' names of the networks."""

    config: Config
    model: Model
    adapters: dict[str, Adapter]
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
    def modules(self) -> int:
        return sum(len(adapter.layers) for adapter in self.adapters.values())

    def factors(self) -> dict[str, dict[str, Weights]]:
        """What is learned, by network and module name."""
        return {
            part: {name.removeprefix(layer_name(part, "")): f for name, f in adapter.factors().items()}
            for part, adapter in self.adapters.items()
        }

    @property
    def base_count(self) -> int:
        """Scalars of the frozen networks that the adapters are on."""
        networks = [self.model.unet] + (self.model.text.modules if self.config.train_text_encoder else [])
        return sum(p.numel() for network in networks for p in network.parameters()) - self.trainables.count

    @property
    def judge(self) -> Network:
        """What measures the held-out loss: whatever a run minimises, by what can be compared with other runs."""
        return replace(self.network, noise=self.model.noise, objective=mse)

    def live(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: flat buffers as long as the masters, and scalars."""
        parts = {"optimizer": self.optimizer.live(), "scaler": self.scaler.live()}
        named = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return {"masters": self.trainables.masters, **named}

    def snapshot(self) -> Snapshot:
        return Snapshot.of(self.live(), self.trainables.slots)

    def restore(self, state: State) -> None:
        """Go on from `Snapshot.named` of an earlier segment, of this process or another."""
        slots, mark = self.trainables.slots, "optimizer."
        restore(state, {name: part for name, part in self.live().items() if not name.startswith(mark)}, slots)
        theirs = {name.removeprefix(mark): part for name, part in state.items() if name.startswith(mark)}
        self.optimizer.load(theirs, slots)
        self.working.refresh()

    def begin_again(self, state: State) -> None:
        """As `restore`, without what was added up since the last update."""
        self.trainables.grads.zero_()
        self.update.loss.zero_()
        self.restore(state)

    @contextmanager
    def settled(self, weights: State | None = None) -> Iterator[None]:
        """The weights as they are saved, drawn and judged: averaged over steps where the optimizer or `ema_decay` does
        that, or `weights` (after BEST) that once were so. Training goes on from the very weights it had."""
        masters = self.trainables.masters
        before = None if weights is None else masters.clone()
        try:
            with self.optimizer.settled(masters):
                if weights is not None:
                    restore(weights, {BEST: masters}, self.trainables.slots)
                self.working.refresh()
                yield
        finally:
            if before is not None:
                masters.copy_(before)
            self.working.refresh()

    def base(self) -> AbstractContextManager[None]:
        """The networks as they are without what is trained."""
        return without(self.adapters.values())

    def started(self, name: str, images: int, steps: int) -> Started:
        """What is said before the first step."""
        config, facts, usual = self.config, self.model.facts, usual_size(self.config)
        return Started(
            name=name,
            device=str(facts.device),
            precision=str(self.network.precision.compute).removeprefix("torch."),
            images=images,
            steps=steps,
            epochs=config.epochs,
            effective_batch=config.batch_size * config.gradient_accumulation_steps,
            trainable=self.trainables.count,
            total=self.base_count,
            modules=self.modules,
            scale=usual.scale,
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of how the steps run."""
        return (*self.tier.notices, *optimizer_notices(self.config), *adapter_notices(self.config))

    def make_room(self) -> None:
        """Before somebody else uses the GPU: what the captured step holds, where memory is short."""
        device = self.captures.device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < ROOM:
            self.captures.release()


@contextmanager
def open_segment(
    config: Config,
    model: Model,
    state: State | None,
    plan: Plan | None = None,
    choose: ChooseOps | None = None,
    start: Start = NOTHING,
) -> Iterator[Segment]:
    """Inject the adapters into `model`'s views and go on from `state`, or begin with `start`; the views are clean of
    hooks afterwards.

    `choose` is asked for the operations; left out, for the fastest ones at once.
    """
    precision, _ = resolve(config.mixed_precision, model.facts.device)
    placed = start.placed(config, model) if state is None else {}
    adapters = injected(config, model)
    fill(adapters, placed)
    downs = {name: down for adapter in adapters.values() for name, down in adapter.downs().items()}
    changes = {name: change for adapter in adapters.values() for name, change in adapter.changes().items()}
    shares = Shares(config.lora_dropout, config.rank_dropout, config.module_dropout)
    dropout = LoraDropout(downs, shares, precision.compute, changes)
    with ExitStack() as stack:
        stack.callback(dropout.remove)
        trainables = trainables_of(config, adapters)
        tier = choose_tier(config, model, precision, choose)
        working = WorkingCopy(trainables, precision.compute, collects=tier.ops.collects)
        found = ChainMap(*(sites(adapter, working, dropout) for adapter in adapters.values()))
        computed = {each.layer: each for adapter in adapters.values() for each in adapter.computed.values()}
        fused = Fused(tier.ops, precision.compute, found, tier.kernels, computed)
        stack.enter_context(fuse(model.unet, fused))
        checkpointing = (plan or Plan.of(config)).checkpointing
        if checkpointing:
            stack.enter_context(checkpointed(model.unet, every=checkpointing == ALL))
        encode = StepClip(model.text, fused, bool(checkpointing), trained=config.train_text_encoder)
        noise = training_noise(config, model.noise)
        network = Network(
            model.unet, noise, objective_of(config, noise), precision, dropout, tier.memory_format, encode
        )
        if config.preservation_weight:
            network = replace(network, preservation=Preservation(config.preservation_weight, tuple(adapters.values())))
        network = replace(network, lesson=lesson_of(config, tuple(adapters.values())))
        segment = _assemble(config, model, adapters, network, working, tier)
        stack.callback(segment.captures.release)
        if state is not None:
            segment.restore(state)
        yield segment


def injected(config: Config, model: Model) -> dict[str, Adapter]:
    """Fresh adapters in the views of the networks that `config` trains; module names are those of files."""

    def start(name: str) -> torch.Generator:
        return randomness.generator(config.seed, f"init {name}")

    put, adapters = partial(inject, kind=KINDS[config.adapter]), {}
    if config.train_unet:
        adapters["unet"] = put(model.unet, unet_sizes(config, model.unet), generator=start)
    if config.train_text_encoder:
        for network, encoder in model.text.networks.items():
            called = partial(text_layer, network)
            sizes = text_sizes(config, encoder, network)
            adapter = put(encoder.inner, sizes, generator=lambda name, called=called: start(called(name)))
            adapters[network] = adapter.called(called)
    return adapters


def trainables_of(config: Config, adapters: Mapping[str, Adapter]) -> Trainables:
    """The parameters of `adapters`, in a group for each learning rate."""
    groups, factors = {}, {}
    for network, adapter in adapters.items():
        share = learning_rate_of(config, network) / config.learning_rate
        found = adapter.groups(up_ratio_of(config))
        for rate, members in found.items():
            name = network if len(found) == 1 else f"{network} ×{rate:g}"
            groups[name], factors[name] = members, share * rate
    return Trainables(groups, factors)


def sites(adapter: Adapter, working: WorkingCopy, dropout: LoraDropout) -> dict[nn.Module, Site]:
    """The LoRAs that are computed by fused products: those on linear layers and 1×1 convolutions."""
    slots = {slot.name: slot for slot in working.trainables.slots}
    found = {}
    for name, layer in adapter.layers.items():
        if not adapter.kind.is_lora or not is_linear(layer.get_base_layer()):
            continue
        down, up = slots[f"{name}.lora_A"], slots[f"{name}.lora_B"]
        found[layer] = Site(
            down=working.weight(down).flatten(1),
            up=working.weight(up).flatten(1),
            grad_down=working.grad(down).flatten(1),
            grad_up=working.grad(up).flatten(1),
            parameters=(down.owner.weight, up.owner.weight),
            scale=partial(layer.scaling.__getitem__, ADAPTER),
            draw=dropout.drawer(name, down.shape[0]),
            drawn=not dropout.shares.whole,
        )
    return found


def _assemble(
    config: Config, model: Model, adapters: dict[str, Adapter], network: Network, working: WorkingCopy, tier: Tier
) -> Segment:
    device, trainables = model.facts.device, working.trainables
    scaler = LossScaler(device, enabled=network.precision.compute == torch.float16)
    scales = {n: size.scale for adapter in adapters.values() for n, size in adapter.sizes.items()}
    optimizer = optimizer_of(config, trainables, scales)
    captures = Captures(device, enabled=tier.captured, deterministic=config.deterministic)
    loss = torch.zeros((), device=device)
    return Segment(
        config=config,
        model=model,
        adapters=adapters,
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
