"""A config's folders to prepared training and held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lora_trainer.config import Config
from lora_trainer.dataset.cache import Cache
from lora_trainer.dataset.concepts import described, layout
from lora_trainer.dataset.crops import sizes_of
from lora_trainer.dataset.grouping import by_folder
from lora_trainer.dataset.images import MASK_ENDING
from lora_trainer.dataset.items import Item, Scan, scan
from lora_trainer.dataset.masks import masks_in, told, with_masks
from lora_trainer.dataset.pairs import flat, joined, with_originals
from lora_trainer.dataset.prepare import NO_RULES, Encoded, Encoders, LatentNoise, prepare
from lora_trainer.dataset.samples import Prepared
from lora_trainer.errors import DataError, ModelError
from lora_trainer.events import EventSink, Notice
from lora_trainer.models.fingerprint import fingerprint
from lora_trainer.models.inpainting import inpaints
from lora_trainer.models.model import Model
from lora_trainer.training import randomness, sliders
from lora_trainer.training.regularization import own_folders, regularization
from lora_trainer.training.wording import read_live, rules_of


@dataclass(frozen=True)
class Items:
    """Pictures and captions of a run, before anything is encoded."""

    train: tuple[Item, ...]
    held_out: tuple[Item, ...]
    regularization: tuple[Item, ...] = ()

    @property
    def shown(self) -> tuple[Item, ...]:
        """What steps are made of."""
        return (*self.train, *self.regularization)


@dataclass(frozen=True)
class TrainingData:
    train: Prepared
    held_out: Prepared | None


def find(config: Config, sink: EventSink) -> Items:
    """What the config's folders hold. Raises DataError."""
    if config.mode == "slider":
        return _slider(config, sink)
    _refuse_inside("mask_dir", config.mask_dir, config)
    _refuse_inside("original_data_dir", config.original_data_dir, config)
    for folder in (config.reg_data_dir, *own_folders(config)):
        _refuse_inside("regularisation pictures", folder, config)
    metadata = Path(config.metadata_path) if config.metadata_path else None
    items = _scan(partial(scan, Path(config.train_data_dir), metadata=metadata, concepts=config.concepts), config, sink)
    tell_concepts(items, sink)
    if config.mode == "difference":
        folders = (Path(config.train_data_dir), Path(config.original_data_dir or ""))
        items = with_originals(items, *folders, whole=not config.concepts)
    if config.validation_data_dir:
        found = Items(items, _scan(partial(scan, Path(config.validation_data_dir)), config, sink))
    else:
        found = split(items, config.validation_split, config.seed)
    found = replace(found, regularization=regularization(found.train, config, sink))
    return _masked(found, config, sink) if config.masked_loss else found


def _slider(config: Config, sink: EventSink) -> Items:
    if not config.train_data_dir.strip():
        items = sliders.drawn_items(config)
    else:
        items = sliders.picture_items(config, Path(config.train_data_dir), config.concepts)
        sink(Notice(text=f"slider: {len(items)} pictures of {config.train_data_dir}; their captions are not read"))
    if config.validation_data_dir:
        return Items(items, sliders.picture_items(config, Path(config.validation_data_dir)))
    return split(items, config.validation_split, config.seed)


def _refuse_inside(key: str, folder: str | None, config: Config) -> None:
    """Raises DataError where the pictures of `folder` would be trained on."""
    home = Path(config.train_data_dir)
    read = layout(home, config.concepts).roots if folder and home.is_dir() else ()
    if any(root.resolve() in (Path(folder).resolve(), Path(folder).resolve().parent) for root in read):
        raise DataError(f"{key}: expected a folder whose pictures are not trained on, found {folder} in {home}")


def _masked(items: Items, config: Config, sink: EventSink) -> Items:
    """With the masks of all pictures; says where they are from. Raises DataError where there is none."""
    folder = Path(config.mask_dir) if config.mask_dir else None
    masks = masks_in(folder) if folder is not None else {}
    train = with_masks(items.train, masks)
    if all(item.mask is None for item in train):
        names = f"{train[0].path.stem}{MASK_ENDING} beside {train[0].path.name}"
        wanted = f"pictures of the same names in {folder}, or {names}" if folder else f"mask_dir, {names}"
        raise DataError(f"masked_loss: expected masks: {wanted}, or transparent pictures; found none")
    sink(Notice(text=f"masks of {len(train)} pictures: {told(train, folder)}"))
    # Pictures of another folder may bear the same names.
    held_out = with_masks(items.held_out, masks, loose=not config.validation_data_dir)
    return replace(items, train=train, held_out=held_out)


def split(items: Sequence[Item], share: float, seed: int) -> Items:
    """Hold out `share` of the items, chosen by seed and file name, so that adding images moves few of them."""
    if share == 0:
        return Items(tuple(items), ())
    count = max(1, round(share * len(items)))
    if count >= len(items):
        raise DataError(f"validation_split: {share:g} of {len(items)} images leaves none to train on")
    chosen = set(sorted(items, key=lambda item: randomness.key(seed, f"split {item.path.name}"))[:count])
    return Items(tuple(i for i in items if i not in chosen), tuple(i for i in items if i in chosen))


def load(
    items: Items,
    config: Config,
    model: Model,
    *,
    sink: EventSink,
    kept: tuple[Encoded, Encoded] | None = None,
) -> TrainingData:
    """Encode everything; `kept` (training, held-out) as for `prepare`. Raises DataError, and ModelError for a model
    that cannot learn in the config's mode."""
    if config.mode == "difference" and inpaints(model.unet):
        raise ModelError(
            f"base_model: {model.facts.name} is an inpainting checkpoint, which is shown parts of each picture; "
            "expected another one in mode difference"
        )
    kept = kept or (Encoded(), Encoded())
    encoders = _encoders(config, model)
    told = model.facts.family.told
    if any(map(sliders.is_drawn, items.train)):
        parts = zip((items.train, items.held_out), kept, strict=True)
        made = [sliders.draw(part, config, model, sink=sink, kept=each) if part else None for part, each in parts]
        return _taught(_told(TrainingData(*made), told), config, encoders)
    data = _told(_encoded(items, config, model, encoders, sink=sink, kept=kept), told)
    data = _taught(data, config, encoders)
    views = sum(len(sample.latents) for sample in data.train.trained)
    if views > data.train.images:
        seen = f"seen {len(data.train.trained)} times an epoch, as {views} sizes, parts and mirrorings"
        sink(Notice(text=f"pictures: {data.train.images}, {seen}"))
    return data


def _told(data: TrainingData, told: Callable[[Tensor], Tensor]) -> TrainingData:
    """With what the model is told of each picture's sizes."""

    def tell(prepared: Prepared) -> Prepared:
        return replace(prepared, samples=tuple(replace(s, sizes=told(s.sizes)) for s in prepared.samples))

    return TrainingData(tell(data.train), data.held_out and tell(data.held_out))


def _taught(data: TrainingData, config: Config, encoders: Encoders) -> TrainingData:
    """With what the config's mode compares beside each picture. Raises DataError."""
    if config.mode == "images":
        return data
    change = partial(sliders.directed, config=config, read=encoders.read) if config.mode == "slider" else joined
    return TrainingData(change(data.train), data.held_out and change(data.held_out))


def _encoded(
    items: Items,
    config: Config,
    model: Model,
    encoders: Encoders,
    *,
    sink: EventSink,
    kept: tuple[Encoded, Encoded],
) -> TrainingData:
    sizes = sizes_of(config, model.facts.family.resolution)
    pairs = config.mode == "difference"

    def noise(purpose: str) -> LatentNoise:
        def draw(index: int, view: int, shape: tuple[int, int, int]) -> Tensor:
            # The two of a pair differ only by what changed.
            number = index // 2 if pairs else index
            return randomness.normal(config.seed, f"{purpose} {view}" if view else purpose, [number], shape)

        return draw

    first, second = kept
    # Said once, however often preparing is interrupted.
    live = read_live(items.shown, config, model.text, sink if first.count == 0 else lambda event: None)
    reading = replace(encoders, read=model.text.tokens, live=True) if live else encoders
    shown = flat(items.shown) if pairs else items.shown
    train = prepare(shown, reading, sizes, noise=noise("latents"), sink=sink, kept=first)
    held_out = None
    if items.held_out:
        # Always the same: as they are written, at one size, neither moved nor mirrored.
        plain = [replace(item, caption=encoders.rules.plain(item.caption)) for item in items.held_out]
        plain = flat(plain) if pairs else plain
        still = replace(encoders, rules=NO_RULES)
        unmoved = [replace(sizes[0], crop="focus" if sizes[0].crop == "focus" else "center", flip=False)]
        held_out = prepare(plain, still, unmoved, noise=noise("held-out latents"), sink=sink, kept=second)
    encoders.cache.trim()
    return TrainingData(train, held_out)


def _encoders(config: Config, model: Model) -> Encoders:
    text = model.text
    cache = Cache(Path(config.cache_dir) if config.cache_dir else None)
    vae_key, text_key = (fingerprint(*part) if cache.folder else "" for part in ([model.vae], text.modules))
    # The WebUI's reading of a caption depends on more than the caption: embeddings, settings. Tokens cost nothing.
    cached = text_key and config.caption_syntax == "literal" and not config.train_text_encoder
    return Encoders(
        model.vae,
        text.tokens if config.train_text_encoder else text.context,
        vae_key,
        f"{text_key} {text.hearing}" if cached else "",
        cache,
        rules_of(config),
        unmasked=config.unmasked_weight if config.masked_loss else None,
        holed=inpaints(model.unet),
    )


def tell_concepts(items: Sequence[Item], sink: EventSink) -> None:
    """How often an epoch sees which pictures, where not each once."""
    if any(item.repeats > 1 for item in items):
        sink(Notice(text=described([(name, len(group), group[0].repeats) for name, group in by_folder(items).items()])))


def _scan(read: Callable[..., Scan], config: Config, sink: EventSink) -> tuple[Item, ...]:
    found = read(trigger_words=config.trigger_words, lines=config.wildcards)
    for note in found.notes:
        sink(Notice(text=note))
    for skipped in found.skipped:
        sink(Notice(text=f"skipped: {skipped}", level="warning"))
    return found.items
