"""Where a run begins: anew under a name of its own, or from the state that an earlier process left."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_trainer.config import Config, output_name_of
from lora_trainer.config.options import options
from lora_trainer.config.schema import PATHS
from lora_trainer.dataset.items import Item
from lora_trainer.errors import ModelError, OutputError, UserError
from lora_trainer.events import EventSink, Finished, Notice
from lora_trainer.files import sweep_folder
from lora_trainer.hosts.ports import LoraStore
from lora_trainer.training.data import Items
from lora_trainer.training.initial import other_start
from lora_trainer.training.sliders import is_drawn
from lora_trainer.training.states import FOLDER, Facts, Kept, StateFolder, folders, numbered

# Settings that may change between two processes of one run: they change nothing that was learned so far. What
# pictures and which model a path leads to is compared itself.
FREE = frozenset(
    {
        *PATHS,
        "preset",
        "concepts",
        *(
            "output_name",
            "epochs",
            "max_train_steps",
            "save_steps",
            "checkpoint_every",
            "validate_every",
            "save_best",
            "measure_drift",
            "drift_prompts",
            "early_stopping_patience",
            "log_with",
            "overwrite",
        ),
        *("sample_prompts", "sample_every", "sample_steps", "sample_guidance", "sample_negative_prompt"),
        *("output_format", "save_precision", "metadata_private", "training_comment", "cpu_threads", "device", "trial"),
        *("gradient_checkpointing", "enable_xformers", "kernels", "auto_fit"),
    }
)


class ResumeError(UserError):
    """The run that is there is not the one that was asked for."""


@dataclass(frozen=True)
class Beginning:
    """A claimed name, its folder of states (None for a trial run), and what there is to go on from."""

    name: str
    states: StateFolder | None = None
    kept: Kept | None = None
    finished: Finished | None = None


def begin(config: Config, store: LoraStore, sink: EventSink, *, resume: bool) -> Beginning:
    """Find the run to go on with, or claim a name for a new one. Raises ResumeError and OutputError."""
    wanted = output_name_of(config)
    for folder in ("", "samples"):
        sweep_folder(Path(config.output_dir) / folder, wanted)
    if config.trial:
        return Beginning(next(name for name in _names(wanted) if store.free(name)))
    found = _resumed(config, wanted, sink) if resume else None
    return found or _claimed(config, store, wanted, sink)


def compare(facts: Facts, config: Config) -> None:
    """Raises ResumeError when `config` is not the one that the run began with."""
    now = msgspec.to_builtins(config)
    # A setting that came with an update was at its default before.
    then = {key: option.default for key, option in options().items()} | facts.config
    changed = [key for key in sorted(now) if key not in FREE and then[key] != now[key]]
    if changed:
        told = "; ".join(f"{key} was {then[key]!r}, now {now[key]!r}" for key in changed)
        raise ResumeError(
            f"resume: the run of {facts.name} at step {facts.step} began with other settings ({told}): take those, or "
            "train without --resume"
        )
    told = other_start(facts.initial, config)
    if told is not None:
        raise ResumeError(f"resume: the run of {facts.name} began elsewhere ({told}): take that, or train anew")


def same_base(facts: Facts, base: str) -> None:
    """Raises ModelError when the weights are not those that the run began with."""
    if facts.base != base:
        raise ModelError(
            f"base_model: the run of {facts.name} began with another model, or in another number format; expected that "
            "one to go on from"
        )


def same_data(facts: Facts, data: str) -> None:
    """Raises ResumeError when the pictures or captions are not those that the run began with."""
    if facts.data != data:
        raise ResumeError(
            f"train_data_dir: pictures or captions have changed since the run of {facts.name} began: bring them back, "
            "or train without --resume"
        )


def digest(items: Items) -> str:
    """Of names, sizes, captions, weights and masks, in order."""
    whole = hashlib.sha256()
    others = (None, *items.regularization) if items.regularization else ()
    for item in (*items.train, None, *items.held_out, *others):
        facts = None if item is None else (item.path.name, item.caption, _size(item))
        if item is not None and item.repeats > 1:
            facts = (*facts, item.repeats)
        if item is not None and item.weight != 1:
            facts = (*facts, "weight", item.weight)
        if item is not None and item.mask is not None:
            facts = (*facts, "mask", item.mask.name, item.mask.stat().st_size)
        if item is not None and item.original is not None:
            facts = (*facts, "original", item.original.name, item.original.stat().st_size)
        whole.update(repr(facts).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _size(item: Item) -> int:
    """In bytes; a picture that the base draws is no file."""
    return 0 if is_drawn(item) else item.path.stat().st_size


def _resumed(config: Config, wanted: str, sink: EventSink) -> Beginning | None:
    for states in folders(Path(config.output_dir), wanted):
        if not states.claim():
            raise OutputError(f"{states.path}: another process is training this run")
        try:
            found = _found(states, config, sink)
        except ResumeError:
            states.release()
            raise
        if found is not None:
            return found
        states.release()
    sink(Notice(text=f"resume: {config.output_dir} has no run of {wanted} to go on with: it starts"))
    return None


def _found(states: StateFolder, config: Config, sink: EventSink) -> Beginning | None:
    """What there is in a claimed folder."""
    name = states.path.name
    if not states.unfinished:
        finished = states.finished()
        return None if finished is None else Beginning(name, states, None, finished)
    kept, damaged = states.newest()
    for path in damaged:
        sink(Notice(text=f"{path.name} is not whole: what was before it is used", level="warning"))
    if kept is None:
        sink(Notice(text=f"resume: no state of {name} is whole: it starts anew", level="warning"))
        states.clear()
    else:
        compare(kept.facts, config)
    return Beginning(name, states, kept)


def _claimed(config: Config, store: LoraStore, wanted: str, sink: EventSink) -> Beginning:
    for name in _names(wanted):
        if not store.free(name):
            continue
        states = StateFolder(Path(config.output_dir) / FOLDER / name)
        if states.unfinished and not config.overwrite:
            sink(
                Notice(
                    text=f"an unfinished run of {name} is in {config.output_dir}: --resume goes on with it, "
                    "overwrite=true replaces it",
                    level="warning",
                )
            )
            continue
        if states.claim():
            states.clear()
            return Beginning(name, states)
    raise AssertionError("names are endless")


def _names(wanted: str) -> Iterator[str]:
    return (numbered(wanted, number) for number in itertools.count(1))
