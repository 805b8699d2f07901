"""OneTrainer's concepts: training_concepts/*.json, or the list inside a run's settings.

Format: modules/util/config/ConceptConfig.py of github.com/Nerogar/OneTrainer (config_version 2, and what its
migrations know of 0 and 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.config.options import options
from lora_trainer.imports.places import concept_of, take_concepts
from lora_trainer.imports.taken import Taken

NAME = "OneTrainer's concepts"
# Of the image and text parts: those that matter only when another one is on.
_OF = {
    "random_rotate_max_angle": ("enable_random_rotate", "enable_fixed_rotate"),
    "random_brightness_max_strength": ("enable_random_brightness", "enable_fixed_brightness"),
    "random_contrast_max_strength": ("enable_random_contrast", "enable_fixed_contrast"),
    "random_saturation_max_strength": ("enable_random_saturation", "enable_fixed_saturation"),
    "random_hue_max_strength": ("enable_random_hue", "enable_fixed_hue"),
    "resolution_override": ("enable_resolution_override",),
    "prompt_path": ("prompt_source",),
    "keep_tags_count": ("enable_tag_shuffling", "tag_dropout_enable"),
    "tag_delimiter": ("enable_tag_shuffling", "tag_dropout_enable"),
    **dict.fromkeys(
        (
            "tag_dropout_mode",
            "tag_dropout_probability",
            "tag_dropout_special_tags",
            "tag_dropout_special_tags_mode",
            "tag_dropout_special_tags_regex",
        ),
        ("tag_dropout_enable",),
    ),
    **dict.fromkeys(
        ("caps_randomize_mode", "caps_randomize_probability", "caps_randomize_lowercase"), ("caps_randomize_enable",)
    ),
}
_AUGMENT = {
    "enable_random_flip": "flip",
    "enable_crop_jitter": "crop",
    "enable_tag_shuffling": "shuffle_captions",
    "keep_tags_count": "keep_tokens",
    "tag_dropout_probability": "tag_dropout",
}
_REASONS = {
    "name": "the folder's name says it",
    "seed": "the run's seed counts",
    "config_version": "the file's own",
    "__version": "the file's own",
    "concept_stats": "counted by OneTrainer, not a setting",
    "image_variations": "not supported",
    "text_variations": "captions are read anew, not cached in variations",
    "loss_weight": "not supported",
}


def recognises(data: object) -> bool:
    concepts = data.get("concepts") if isinstance(data, Mapping) else data
    return (
        isinstance(concepts, list) and bool(concepts) and all(isinstance(c, Mapping) and "path" in c for c in concepts)
    )


def read(data: Any) -> Taken:
    taken, entries = Taken(), []
    concepts = data["concepts"] if isinstance(data, Mapping) else data
    for number, concept in enumerate(concepts):
        entries += _concept(taken, f"[{number}].", dict(concept))
    take_concepts(taken, entries)
    if isinstance(data, Mapping):
        rest = {key: value for key, value in data.items() if key != "concepts"}
        taken.leave_all(rest, dict.fromkeys(rest, "only the concepts of OneTrainer's settings are read"))
    return taken


def _concept(taken: Taken, where: str, values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    folder, kind = values.pop("path"), values.pop("type", "STANDARD")
    if not isinstance(folder, str) or not folder.strip():
        taken.leave(f"{where}path", folder, "expected a folder")
        return []
    if not values.pop("enabled", True):
        taken.leave(f"{where}path", folder, "the concept is switched off there")
        return []
    if values.pop("validation_concept", False) or kind == "VALIDATION":
        taken.take("validation_data_dir", folder, f"{where}path")
        return []
    if kind != "STANDARD":
        taken.leave(f"{where}path", folder, f"concepts of type {kind} are not supported")
        return []
    if values.pop("include_subdirectories", False):
        taken.remarks.append(f"{where}include_subdirectories: {folder} is read with its direct sub-folders, no deeper")
    if values.get("loss_weight") == 1:
        del values["loss_weight"]
    found = _repeats(taken, where, values)
    for part in ("image", "text"):
        if isinstance(values.get(part), Mapping):
            _part(taken, f"{where}{part}.", dict(values.pop(part)))
    taken.leave_all(values, _REASONS, where)
    return [(f"{where}path", concept_of(taken, folder, found))]


def _repeats(taken: Taken, where: str, values: dict[str, Any]) -> dict[str, tuple[str, object]]:
    """OneTrainer's balancing: repeats, which need not be whole there, or a number of pictures an epoch."""
    strategy = values.pop("balancing_strategy", "REPEATS")
    key = "balancing" if "balancing" in values else "repeats"
    count = values.pop(key, 1)
    if strategy != "REPEATS":
        taken.leave(f"{where}{key}", count, f"the strategy {strategy}, so many pictures an epoch, is not supported")
        return {}
    if isinstance(count, float) and count == count and abs(count) < 1e6 and count != int(count):
        whole = max(1, round(count))
        taken.leave(f"{where}{key}", count, f"repeats are whole numbers here: {whole} instead")
        count = whole
    return {"repeats": (f"{where}{key}", count)}


def _part(taken: Taken, where: str, values: dict[str, Any]) -> None:
    """The image or text part of a concept: what is on there."""
    on = {key: value for key, value in values.items() if value and any(map(values.get, _OF.get(key, (key,))))}
    source = on.pop("prompt_source", "sample")
    on.pop("prompt_path", None)
    if source == "filename":
        taken.remarks.append(f"{where}prompt_source: file names are captions where there are no others")
    elif source != "sample":
        path = values.get("prompt_path")
        taken.leave(f"{where}prompt_path", path, "one file of captions for all: give the concept a caption instead")
    if on.get("tag_delimiter") == ",":
        del on["tag_delimiter"]
    modes = {"tag_dropout_probability"} if on.get("tag_dropout_mode") != "RANDOM" else set()
    for theirs, ours in _AUGMENT.items():
        if theirs in on and ours in options() and theirs not in modes:
            value = on.pop(theirs)
            taken.take(ours, "random" if ours == "crop" else value, f"{where}{theirs}")
    taken.leave_all(on, dict.fromkeys(on, "no such option here"), where)
