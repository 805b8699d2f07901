"""kohya's description of a data set: [general], [[datasets]], [[datasets.subsets]], as TOML or JSON.

Format: docs/config_README-en.md of github.com/kohya-ss/sd-scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.config.options import options
from lora_trainer.imports import kohya
from lora_trainer.imports.places import concept_of, take_concepts
from lora_trainer.imports.taken import Taken

NAME = "kohya's data-set description"
_REASONS = {
    **kohya.REASONS,
    "metadata_file": "captions in kohya's JSON are not read: write them to a metadata.csv or to .txt files",
}


def recognises(data: object) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("datasets"), (list, Mapping))


def read(data: Mapping[str, Any]) -> Taken:
    """Folders become concepts; values that hold for a subset there hold for the run here, so the first counts."""
    taken, entries, known = Taken(), [], []
    general = _table(taken, "general", data.get("general", {}))
    datasets = data["datasets"]
    # [[datasets.subsets]] without [[datasets]] before it, as in kohya's docs/masked_loss_README.md.
    for number, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
        own = _table(taken, f"datasets[{number}]", dataset)
        subsets = own.pop("subsets", [])
        if not isinstance(subsets, list):
            taken.leave(f"datasets[{number}].subsets", subsets, "expected a list")
            continue
        for index, subset in enumerate(subsets):
            where = f"datasets[{number}].subsets[{index}]"
            levels = {f"{where}.": _table(taken, where, subset), f"datasets[{number}].": own, "general.": general}
            known.append((where, levels))
    said = {key for _, levels in known for level in levels.values() for key in level}
    silent = {key: kohya.off(key) for key, ours in kohya.AUGMENT.items() if key in said and ours in options()}
    for where, levels in known:
        entries += _subset(taken, where, {**levels, "kohya's default ": silent})
    take_concepts(taken, entries)
    taken.leave_all({key: value for key, value in data.items() if key not in ("general", "datasets")}, {})
    return taken


def _subset(taken: Taken, where: str, levels: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The concept of a subset, if it is one; `levels` are the tables whose values hold for it, the nearest first."""
    values = {key: value for level in reversed(levels.values()) for key, value in level.items()}

    def name(key: str) -> str:
        return next((prefix + key for prefix, level in levels.items() if key in level), key)

    folder = values.pop("image_dir", None)
    if not isinstance(folder, str) or not folder.strip():
        taken.leave(where, folder, "expected an image_dir")
        return []
    if values.pop("is_reg", False):
        _regularization(taken, folder, where, levels[f"{where}."])
        return []
    share = values.pop("validation_split", 0)
    if share == 1:
        taken.take("validation_data_dir", folder, where)
        return []
    if share:
        taken.take("validation_split", share, name("validation_split"))
    if "batch_size" in values:
        taken.take("batch_size", values.pop("batch_size"), name("batch_size"))
    kohya.data_set(taken, values, name)
    parts = {"repeats": "num_repeats", "caption": "class_tokens"}
    found = {ours: (name(theirs), values.pop(theirs)) for ours, theirs in parts.items() if theirs in values}
    for key, value in values.items():
        taken.leave_all({name(key): value}, {name(key): _REASONS[key]} if key in _REASONS else {})
    return [(f"{where}.image_dir", concept_of(taken, folder, found))]


def _regularization(taken: Taken, folder: str, where: str, own: Mapping[str, Any]) -> None:
    """One folder of regularisation pictures for the run; of the rest of the subset's own table nothing has a place."""
    taken.take("reg_data_dir", folder, f"{where}.image_dir")
    rest = {key: value for key, value in own.items() if key not in ("image_dir", "is_reg")}
    if rest.get("class_tokens"):
        taken.take("preservation_prompt", rest.pop("class_tokens"), f"{where}.class_tokens")
    if rest.get("num_repeats") == 1:
        del rest["num_repeats"]
    reasons = {"num_repeats": "an epoch sees as many regularisation pictures as training pictures"}
    taken.leave_all(rest, dict.fromkeys(rest, "not for regularisation pictures alone") | reasons, f"{where}.")


def _table(taken: Taken, name: str, value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    taken.leave(name, value, "expected a table of keys and values")
    return {}
