"""Optimizers of other packages, each imported when it is asked for, on views of the flat buffers.

They keep Python numbers that a CUDA graph would freeze, so the update runs uncaptured; what it follows, the forward and
backward pass, stays captured.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.config import Config
from lora_trainer.config.adapting_rules import SCHEDULE_FREE
from lora_trainer.config.rules import ADAPTS
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.training.average import Averaged
from lora_trainer.training.norms import WithinNorm, products_of
from lora_trainer.training.optimizers import AdamWSettings, FlatAdamW, Optimizer
from lora_trainer.training.trainables import Slot, Trainables

VALUES = "values"


@dataclass(frozen=True)
class Entry:
    """`path`: module.Class of `package`. `flat`: it treats numbers one by one, so a group can be one tensor; others
    need the matrices."""

    package: str
    path: str
    flat: bool
    arguments: Mapping[str, object] = field(default_factory=dict)


# Papers: 8 bits arXiv:2110.02861, Lion 2302.06675, Adafactor 1804.04235, Prodigy 2306.06101, schedule-free 2405.15682,
# CAME 2307.02047.
REGISTRY = {
    "adamw8bit": Entry("bitsandbytes", "bitsandbytes.optim.AdamW8bit", True),
    "lion": Entry("lion-pytorch", "lion_pytorch.Lion", True),
    "adafactor": Entry(
        "transformers",
        "transformers.optimization.Adafactor",
        False,
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": Entry("prodigyopt", "prodigyopt.Prodigy", True),
    "prodigyplusschedulefree": Entry("prodigy-plus-schedule-free", "prodigyplus.ProdigyPlusScheduleFree", False),
    "adamwschedulefree": Entry("schedulefree", "schedulefree.AdamWScheduleFree", True),
    "came": Entry("came-pytorch", "came_pytorch.CAME", False),
}


def optimizer_of(config: Config, trainables: Trainables, scales: Mapping[str, float] | None = None) -> Optimizer:
    """What `config` asks for, with the average of the weights. `scales`: of each module, for scale_weight_norms.
    Raises ConfigError."""
    if config.optimizer == "adamw":
        optimizer: Optimizer = FlatAdamW(trainables, AdamWSettings(weight_decay=config.weight_decay))
    else:
        optimizer = Library(config, trainables)
    if config.scale_weight_norms and scales:
        optimizer = WithinNorm(optimizer, products_of(trainables.slots, scales), config.scale_weight_norms)
    decay = ema_decay_of(config)
    return Averaged(optimizer, trainables.masters, decay) if decay else optimizer


def ema_decay_of(config: Config) -> float:
    """ema_decay, by default 0.97 (docs/defaults.md), or 0 where the optimizer averages by itself."""
    if config.ema_decay is not None:
        return config.ema_decay
    return 0.0 if config.optimizer in SCHEDULE_FREE else 0.97


def optimizer_class(config: Config) -> type | None:
    """The class of another package, None for our own. Raises ConfigError where it is not installed."""
    if config.optimizer == "adamw":
        return None
    entry = REGISTRY.get(config.optimizer)
    path = entry.path if entry else config.optimizer_class or ""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a package that is not made for this machine raises anything
        if entry is None:
            raise ConfigError([f"optimizer_class: {path} cannot be imported: {error}"]) from error
        missing = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise ConfigError(
            [
                f"optimizer: {config.optimizer} needs the package {entry.package}, which {why}; "
                f"`pip install {entry.package}`, or optimizer=adamw"
            ]
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError([f"optimizer_class: expected a torch.optim.Optimizer, found {path}"])
    return found


def optimizer_notices(config: Config) -> Iterator[str]:
    """How the update runs, and which learning rate is meant."""
    if config.optimizer == "adamw":
        return
    yield (
        f"optimizer: {config.optimizer} updates the weights uncaptured, and waits for the device once a step to leave "
        "out one whose numbers are not finite"
    )
    if config.optimizer in ADAPTS and config.learning_rate < 0.1:
        yield (
            f"optimizer: {config.optimizer} finds the learning rate by itself and takes learning_rate as a factor: "
            f"1 is meant, found {config.learning_rate:g}"
        )
    if config.optimizer in SCHEDULE_FREE and config.lr_scheduler != "constant":
        yield f"optimizer: {config.optimizer} needs no schedule: lr_scheduler=constant is meant"


class Library:
    """A torch.optim.Optimizer over `Trainables`, its state in names and tensors like everybody's."""

    capturable = False

    def __init__(self, config: Config, trainables: Trainables) -> None:
        entry = REGISTRY.get(config.optimizer)
        self.name = config.optimizer_class or config.optimizer
        self.parameters = [
            members(trainables, number, flat=bool(entry and entry.flat)) for number in range(len(trainables.groups))
        ]
        groups = [
            {"params": list(named.values()), "lr": config.learning_rate * group.factor}
            for named, group in zip(self.parameters, trainables.groups, strict=True)
        ]
        self.inner = construct(config, entry, groups)
        self.tried = False
        getattr(self.inner, "train", lambda: None)()

    def step(self, trainables: Trainables, bad: Tensor) -> None:
        """Raises UserError when the optimizer keeps something that no state can hold."""
        if bad.item():
            return
        for theirs, group in zip(self.inner.param_groups, trainables.groups, strict=True):
            theirs["lr"] = group.learning_rate.item()
        self.inner.step()
        if not self.tried:
            self.live()
            self.tried = True

    def live(self) -> dict[str, Tensor]:
        kept: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for holder, values in self._holders():
            kept[holder] = {}
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{holder}"] = value
                elif key != "params":
                    kept[holder][key] = value
        forms = {name: (*form(tensor), tensor.is_cuda) for name, tensor in tensors.items()}
        try:
            text = json.dumps({"kept": kept, "forms": forms}, sort_keys=True)
        except TypeError as error:
            raise UserError(f"optimizer: {self.name} keeps what cannot be saved with a run: {error}") from error
        # Two dimensions: not one of those that are cut into parameters.
        whole = {name: tensor.detach().reshape(1, -1) for name, tensor in tensors.items()}
        return {VALUES: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).view(1, -1), **whole}

    def load(self, named: Mapping[str, Tensor], slots: Sequence[Slot]) -> None:
        values = json.loads(bytes(named[VALUES].flatten().tolist()))
        device = self.inner.param_groups[0]["params"][0].device
        self.inner.state.clear()
        restored: dict[str, dict[str, object]] = {}
        for holder, kept in values["kept"].items():
            restored[holder] = {key: tupled(value) for key, value in kept.items()}
        for name, (shape, stride, on_device) in values["forms"].items():
            key, _, holder = name.partition("/")
            saved = named[name]
            tensor = torch.empty_strided(shape, stride, dtype=saved.dtype, device=device if on_device else "cpu")
            restored[holder][key] = tensor.copy_(saved.view(shape))
        for number, group in enumerate(self.inner.param_groups):
            parameters = group["params"]
            group.clear()
            group.update(restored[f"group {number}"], params=parameters)
            for name, parameter in self.parameters[number].items():
                if name in restored:
                    self.inner.state[parameter] = restored[name]

    @contextmanager
    def settled(self, masters: Tensor) -> Iterator[None]:
        """A schedule-free optimizer's average; `masters` come back to the bit, which its own way back would miss."""
        if not hasattr(self.inner, "eval"):
            yield
            return
        before = masters.clone()
        self.inner.eval()
        try:
            yield
        finally:
            self.inner.train()
            masters.copy_(before)

    def _holders(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, group in enumerate(self.inner.param_groups):
            yield f"group {number}", group
            for name, parameter in self.parameters[number].items():
                if self.inner.state.get(parameter):
                    yield name, self.inner.state[parameter]


def members(trainables: Trainables, number: int, *, flat: bool) -> dict[str, nn.Parameter]:
    """The parameters of a group by name: its slots, or the whole of it."""
    group = trainables.groups[number]
    if not flat:
        inside = [slot for slot in trainables.slots if group.start <= slot.start < group.stop]
        return {slot.name: getattr(slot.owner, slot.attribute) for slot in inside}
    whole = nn.Parameter(trainables.masters[group.start : group.stop])
    whole.grad = trainables.grads[group.start : group.stop]
    return {group.name: whole}


def construct(config: Config, entry: Entry | None, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Raises ConfigError for arguments that the class does not take."""
    kind = optimizer_class(config)
    # A class that we do not know may mean something else by weight_decay, such as Adam's L2 term.
    arguments = {"weight_decay": config.weight_decay, **entry.arguments} if entry else {}
    if config.optimizer == "prodigyplusschedulefree":
        arguments["split_groups"] = len(groups) > 1
    given = parsed(config.optimizer_args)
    try:
        return kind(groups, lr=config.learning_rate, **{**arguments, **given})
    except Exception as error:  # an assertion, a ValueError, a TypeError: each class has its own way to refuse
        raise ConfigError([f"optimizer_args: {config.optimizer} refuses {given or arguments}: {error}"]) from error


def parsed(arguments: Sequence[str]) -> dict[str, object]:
    """`name=value` with values as Python writes numbers, tuples, booleans and None; anything else is text."""
    found = {}
    for argument in arguments:
        name, _, text = (part.strip() for part in argument.partition("="))
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = {"true": True, "false": False}.get(text.lower(), text)
    return found


def form(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides: sums depend on the order in memory."""
    return list(tensor.shape), list(tensor.stride())


def tupled(value: object) -> object:
    """JSON knows no tuples; no optimizer keeps lists."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value
