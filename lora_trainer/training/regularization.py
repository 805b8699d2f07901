"""Prior preservation (DreamBooth, Ruiz et al. 2022, arXiv:2208.12242, section 3.2): pictures of the same kind, without
the trigger words, so that what these words do not mean stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_trainer.config import Config
from lora_trainer.config.schema import Concept
from lora_trainer.dataset.concepts import layout
from lora_trainer.dataset.items import Item, scan
from lora_trainer.errors import DataError
from lora_trainer.events import EventSink, Notice


def regularization(train: Sequence[Item], config: Config, sink: EventSink) -> tuple[Item, ...]:
    """The regularisation pictures beside `train`: of each folder as many as an epoch sees of the pictures that it is
    for. Their captions are theirs, or else the caption of the concept whose own folder it is, or else the run's words
    for the class. Raises DataError."""
    home = Path(config.train_data_dir)
    plan = layout(home, config.concepts)
    shown: dict[Path, int] = {}
    words: dict[Path, str] = {}
    for item in train:
        concept = plan.concept(item.path)
        folder = config.reg_data_dir if concept.regularization is None else home / concept.regularization
        if folder is not None:
            shown[Path(folder)] = shown.get(Path(folder), 0) + item.repeats
            own = "" if concept.regularization is None else concept.caption
            words.setdefault(Path(folder), own or config.preservation_prompt or "")
    found: list[Item] = []
    for folder, total in shown.items():
        items = balanced(_read(folder, words[folder], config, sink), total)
        found += [replace(item, weight=item.weight * config.prior_loss_weight, prior=True) for item in items]
        seen = f"an epoch sees {sum(item.repeats for item in items):,} of them beside {total:,} to learn"
        sink(Notice(text=f"regularisation: {len(items)} pictures of {folder}: {seen}"))
    trained = {item.path.resolve() for item in train}
    if twice := next((item.path for item in found if item.path.resolve() in trained), None):
        raise DataError(f"{twice}: is to be learned, and a regularisation picture too; it can be only one of them")
    return tuple(found)


def own_folders(config: Config) -> list[str]:
    """Those of concepts."""
    home = Path(config.train_data_dir)
    return [str(home / concept.regularization) for concept in config.concepts if concept.regularization is not None]


def balanced(items: Sequence[Item], total: int) -> list[Item]:
    """So many of `items`, and so often, that an epoch sees `total`: the first of them, or all with more repeats, as in
    kohya's trainer. One that is repeated is not cut short, so that it can be a few more."""
    kept: list[Item] = []
    seen = 0
    for item in items:
        if seen < total:
            kept.append(item)
            seen += item.repeats
    each, more = divmod(max(0, total - seen), len(kept))
    return [replace(item, repeats=item.repeats + each + (number < more)) for number, item in enumerate(kept)]


def _read(folder: Path, words: str, config: Config, sink: EventSink) -> tuple[Item, ...]:
    # The names of sub-folders, where they say it, go before.
    concepts = [Concept(folder=".", caption=words)] if words.strip() and not layout(folder).concepts else []
    found = scan(folder, concepts=concepts, lines=config.wildcards)
    for note in found.notes:
        sink(Notice(text=note))
    for skipped in found.skipped:
        sink(Notice(text=f"skipped: {skipped}", level="warning"))
    return found.items
