"""The train step in two parts: forward/backward for each micro-batch, one update for all.

Both parts read and write buffers that stay where they are, take no decision on the host and never synchronise,
so that each is captured in a CUDA graph where there is one, and runs eagerly as it stands elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_trainer.dataset.samples import Sample
from lora_trainer.models.flow import Flow
from lora_trainer.models.mmdit import MMDiT
from lora_trainer.models.noise import NoiseSchedule
from lora_trainer.models.text import Conditions
from lora_trainer.training.capture import Captures
from lora_trainer.training.dropout import LoraDropout
from lora_trainer.training.objectives import Objective
from lora_trainer.training.optimizers import Optimizer
from lora_trainer.training.precision import LossScaler, Precision
from lora_trainer.training.preservation import Preservation
from lora_trainer.training.working import WorkingCopy

# Token ids [B, n, 77] and their emphasis to what the UNet is told of them.
Encode = Callable[[Tensor, "Tensor | None"], Conditions]
# What `Network.terms` yields of a network and a batch.
Lesson = Callable[["Network", "Batch"], Iterator[Tensor]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples: everything random is already drawn.

    latents, eps: [B, 4, h, w] float32, and input_eps, the noise that the network is shown, where that is not eps;
    t: [B] int64; weight: [B] float32, summing to 1 over an update (0 for padding);
    mask_keys: [B, 2] int32. The captions: context [B, 77 n, width], or, to be encoded in the step, their token ids
    [B, n, 77] int64, with their emphasis of that shape where they have it. SDXL's: pooled [B, width], and sizes [B, 6]
    with original (height, width), crop (top, left) and target (height, width) in pixels, or what its relatives are told
    instead (`Family.told`). mask [B, 1, h, w] float32, how
    much each part of the loss counts, in a run with masks. shown [B, 5, h, w] float32: an inpainting model's masks and
    the latents of what they leave. preserved: with output preservation, the captions without trigger words, under the
    same names and in the same shapes; positive and negative: likewise a slider's prompts. original [B, 4, h, w]
    float32: of pairs, the latents before the change.
    """

    latents: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    mask_keys: Tensor
    context: Tensor | None = None
    ids: Tensor | None = None
    emphasis: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    input_eps: Tensor | None = None
    mask: Tensor | None = None
    shown: Tensor | None = None
    preserved: Mapping[str, Tensor] | None = None
    positive: Mapping[str, Tensor] | None = None
    negative: Mapping[str, Tensor] | None = None
    original: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured graph depends on: (B, h, w, tokens)."""
        tokens = self.context.shape[1] if self.ids is None else self.ids[0].numel()
        return (*self.latents.shape[:1], *self.latents.shape[2:], tokens)

    def without_trigger(self) -> Batch:
        """The same with the captions of `preserved`."""
        return replace(self, **self.preserved, preserved=None)

    def directed(self, texts: Mapping[str, Tensor]) -> Batch:
        """The same with the captions `texts`: `positive` or `negative`."""
        return replace(self, **texts, positive=None, negative=None)

    def condition(self, encode: Encode | None = None) -> dict[str, object]:
        """What a UNet is told beside the noisy latents and the time, by diffusers' argument names."""
        said = Conditions(self.context, self.pooled) if self.ids is None else encode(self.ids, self.emphasis)
        added = None if said.pooled is None else {"text_embeds": said.pooled, "time_ids": self.sizes}
        return {"encoder_hidden_states": said.context, "added_cond_kwargs": added}

    def like(self, device: torch.device) -> Batch:
        """Empty buffers of the same shapes on `device`."""
        return self._each(lambda tensor: torch.empty_like(tensor, device=device))

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU need not be waited for."""
        return self._each(torch.Tensor.pin_memory)

    def split(self, parts: int) -> list[Batch]:
        """The samples in up to `parts` batches of one size; padding with weight 0 fills the last one up."""
        count = self.latents.shape[0]
        size = -(-count // parts)
        index = torch.arange(size * -(-count // size)).clamp(max=count - 1)
        whole = self._each(lambda tensor: tensor[index])
        whole.weight[count:] = 0
        return [whole._each(lambda tensor, at=at: tensor[at : at + size]) for at in range(0, len(index), size)]

    def copy_(self, other: Batch) -> None:
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                mine.copy_(theirs, non_blocking=True)
            elif mine is not None:
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name], non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Tensor | Mapping[str, Tensor] | None) -> Tensor | dict[str, Tensor] | None:
            if value is None or isinstance(value, Tensor):
                return None if value is None else change(value)
            return {name: change(tensor) for name, tensor in value.items()}

        return Batch(*(changed(getattr(self, field.name)) for field in fields(self)))


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, a row a sample."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def directions(samples: Sequence[Sample]) -> dict[str, dict[str, Tensor]]:
    """A slider's prompts under the names of a batch's fields."""
    return {name: stacked([sample.directions[name] for sample in samples]) for name in samples[0].directions}


def with_sizes(texts: dict[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
    """Captions with `sizes` [B, n] in float32, of which the families are told that have a pooled embedding."""
    return {**texts, "sizes": sizes.float()}


@dataclass(frozen=True)
class Network:
    """What the forward pass runs: the injected view, its schedule, and how it is computed; `encode` is the text encoder
    for captions that come as token ids; `preservation` holds it at the base's answers where that is asked for; a
    `lesson` teaches something else than the pictures."""

    unet: UNet2DConditionModel | MMDiT
    noise: NoiseSchedule | Flow
    objective: Objective
    precision: Precision
    dropout: LoraDropout
    memory_format: torch.memory_format = torch.contiguous_format
    encode: Encode | None = None
    preservation: Preservation | None = None
    lesson: Lesson | None = None

    def terms(self, batch: Batch) -> Iterator[Tensor]:
        """What is minimised, each sample's loss [B] float32, in parts that add up. Each part wants its backward pass
        before the next is asked for: the LoRA may be at another weight then, and the peak of memory stays the same."""
        if self.lesson is not None:
            yield from self.lesson(self, batch)
            return
        yield self.losses(batch)
        if self.preservation is not None:
            yield self.preserved(batch)

    def judged(self, batch: Batch) -> Tensor:
        """Each sample's loss as runs are compared by it, [B] float32; without gradients."""
        return self.losses(batch) if self.lesson is None else sum(self.lesson(self, batch))

    def losses(self, batch: Batch) -> Tensor:
        """Each sample's loss, [B] float32."""
        with self.precision.autocast():
            latents, eps = self._laid_out(batch)
            target = self.noise.target(latents, eps, batch.t)
            return self.objective(self._predicted(batch, latents, eps), target, batch.t, batch.mask)

    def preserved(self, batch: Batch) -> Tensor:
        """How far each sample's prediction without trigger words is from the base's, weighed, [B] float32."""
        return self.preservation.losses(partial(self.predicted, batch.without_trigger()))

    def predicted(self, batch: Batch) -> Tensor:
        """What the network says of the noisy latents, [B, 4, h, w]."""
        with self.precision.autocast():
            return self._predicted(batch, *self._laid_out(batch))

    def _laid_out(self, batch: Batch) -> tuple[Tensor, Tensor]:
        latents, eps = (x.contiguous(memory_format=self.memory_format) for x in (batch.latents, batch.eps))
        return latents, eps

    def _predicted(self, batch: Batch, latents: Tensor, eps: Tensor) -> Tensor:
        condition = batch.condition(self.encode)
        noisy = self.noise.add_noise(latents, eps if batch.input_eps is None else batch.input_eps, batch.t)
        if batch.shown is not None:
            noisy = torch.cat([noisy, batch.shown], dim=1)
        noisy = noisy.contiguous(memory_format=self.memory_format)
        return self.unet(noisy, self.noise.times(batch.t), **condition, return_dict=False)[0]


class ForwardBackward:
    """Adds the gradient of one micro-batch's weighted loss, times the loss scale, into the flat gradient."""

    def __init__(
        self, network: Network, scaler: LossScaler, loss: Tensor, *, working: WorkingCopy, captures: Captures
    ) -> None:
        self.network, self.scaler, self.loss = network, scaler, loss
        self.working, self.captures = working, captures
        self.buffers: dict[tuple[int, ...], Batch] = {}

    def __call__(self, batch: Batch) -> None:
        shape = batch.shape
        if shape not in self.buffers:
            self.buffers[shape] = batch.like(self.loss.device)
        static = self.buffers[shape]
        static.copy_(batch)
        if not self.network.dropout.knows(shape):
            with torch.no_grad(), self.network.dropout.recording(shape, static.mask_keys):
                self.network.losses(static)
        self.captures.run(shape, lambda: self._compute(static))

    def _compute(self, batch: Batch) -> None:
        # Checkpointed blocks run again in backward: the masks must still be there. Where memory runs out in the middle,
        # closing brings the LoRA back to its own weight.
        masks = self.network.dropout.masks(batch.shape, batch.mask_keys)
        with masks, closing(self.network.terms(batch)) as terms:
            for losses in terms:
                self._add(losses, batch)

    def _add(self, losses: Tensor, batch: Batch) -> None:
        loss = (losses * batch.weight).sum()
        (loss * self.scaler.scale).backward()
        self.working.collect()
        self.loss.add_(loss.detach())


class Update:
    """One optimizer update from the accumulated gradient.

    A loss or gradient that is not finite changes nothing but the loss scale; the device decides. `result` holds
    (loss, gradient norm before clipping, 1 if the update was held back).
    """

    def __init__(
        self,
        working: WorkingCopy,
        optimizer: Optimizer,
        *,
        scaler: LossScaler,
        loss: Tensor,
        captures: Captures,
        max_grad_norm: float,
    ) -> None:
        self.working, self.optimizer, self.scaler, self.loss = working, optimizer, scaler, loss
        self.captures, self.max_grad_norm = captures, max_grad_norm
        self.result = torch.zeros(3, device=loss.device)

    def __call__(self) -> None:
        if self.optimizer.capturable:
            self.captures.run("update", self._compute)
        else:
            self._compute()

    def _compute(self) -> None:
        grads = self.working.trainables.grads
        grads.div_(self.scaler.scale)
        norm = torch.linalg.vector_norm(grads)
        bad = 1 - (torch.isfinite(norm) & torch.isfinite(self.loss)).float()
        if self.max_grad_norm > 0:
            grads.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        self.optimizer.step(self.working.trainables, bad)
        self.working.refresh()
        self.scaler.update(bad)
        self.result.copy_(torch.stack([self.loss, norm, bad]))
        grads.zero_()
        self.loss.zero_()
