"""What a LoRA file says about itself: kohya's `ss_` keys, `modelspec`, and our whole config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from lora_trainer import __version__
from lora_trainer.adapters.naming import Factors
from lora_trainer.config.sources import HEADER_KEY

# What kohya's trainer names as the implementation of SDXL LoRAs; the earlier families' are diffusers'.
SGM = "https://github.com/Stability-AI/generative-models"
# How a file's alphas are kept beside its tensors: by diffusers, and by `lora-trainer convert`.
CONFIG, ALPHAS = "lora_adapter_metadata", "lora_trainer_alphas"
# The LoRA that a run started from.
INITIAL = "lora_trainer_initial"


@dataclass(frozen=True)
class BaseFacts:
    """The checkpoint: its name, family keys, and hashes where they are known."""

    name: str
    version: str
    architecture: str
    prediction: str
    legacy_hash: str | None
    sha256: str | None


@dataclass(frozen=True)
class Folder:
    """The captions of its images, and how often an epoch sees each."""

    captions: Sequence[str]
    repeats: int = 1


@dataclass(frozen=True)
class DataFacts:
    """The data set: its folders by name; images by bucket (width, height), each as often as an epoch sees it; and the
    folders of regularisation pictures, which count in none of these."""

    folders: Mapping[str, Folder]
    buckets: Mapping[tuple[int, int], int]
    resolution: int
    batches_per_epoch: int
    regularization: Mapping[str, Folder] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(self.buckets.values())


@dataclass(frozen=True)
class RunFacts:
    """The run so far. Times are seconds since 1970; `settings` are kohya's names without `ss_`; `timesteps`
    the first that was trained, and the one before which that ended; `initial` the LoRA that it started from."""

    name: str
    session_id: int
    started_at: float
    finished_at: float
    steps: int
    epoch: int
    trigger_words: str
    config_json: str
    settings: Mapping[str, object]
    timesteps: tuple[int, int] = (0, 1000)
    initial: Mapping[str, str] = field(default_factory=dict)


def build_metadata(run: RunFacts, data: DataFacts, base: BaseFacts) -> dict[str, str]:
    """Every key of the header but the file's own hashes; all values are text."""
    values: dict[str, object] = {f"ss_{key}": value for key, value in run.settings.items()}
    values |= {
        "ss_session_id": run.session_id,
        "ss_training_started_at": run.started_at,
        "ss_training_finished_at": run.finished_at,
        "ss_output_name": run.name,
        "ss_steps": run.steps,
        "ss_epoch": run.epoch,
        **_base(base),
        **_data(data),
        **_modelspec(run, data, base),
        HEADER_KEY: run.config_json,
        "lora_trainer_version": __version__,
    }
    if run.initial:
        values[INITIAL] = _json(dict(run.initial))
    # A hash that is not known is left out: the WebUI would trust a wrong one.
    unknown = {key for key, value in values.items() if value is None and key.endswith("_hash")}
    return {key: str(value) for key, value in values.items() if key not in unknown}


def derived(metadata: Mapping[str, str], *, name: str, version: str, comment: str = "") -> dict[str, str]:
    """The header of a file `name` that is made of one with `metadata`: it keeps what that said, but for its name, its
    hashes and how its alphas were kept. A header without the base model's `version` gets it, since the WebUI takes a
    file that says anything for Stable Diffusion 1.x. `comment` comes before the training's own."""
    lost = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", CONFIG, ALPHAS)
    kept = {key: text for key, text in metadata.items() if key not in lost}
    kept["ss_output_name"] = name
    kept.setdefault("ss_base_model_version", version)
    kept.setdefault("ss_v2", str(version.startswith("sd_v2")))
    if "modelspec.title" in kept:
        kept["modelspec.title"] = name
    if comment:
        kept["ss_training_comment"] = "; ".join(filter(None, (comment, kept.get("ss_training_comment"))))
    return kept


def sizes(factors: Collection[Factors]) -> dict[str, str]:
    """kohya's keys of rank and alpha, as its tools write them."""
    ranks, alphas = {f"{f.rank}" for f in factors}, {f"{f.alpha:.6g}" for f in factors}
    said = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    return {key: next(iter(found)) if len(found) == 1 else "Dynamic" for key, found in said.items()}


def made_facts(name: str, base: BaseFacts, at: float) -> dict[str, str]:
    """The least that a file says which no training made: its name, its base model, and when (seconds since 1970)."""
    values = {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        **_base(base),
        **{f"modelspec.{key}": value for key, value in _spec(name, base, at).items()},
        "lora_trainer_version": __version__,
    }
    return {key: str(value) for key, value in values.items() if value}


def _base(base: BaseFacts) -> dict[str, object]:
    return {
        "ss_sd_model_name": base.name,
        "ss_base_model_version": base.version,
        "ss_v2": str(base.version.startswith("sd_v2")),
        "ss_sd_model_hash": base.legacy_hash,
        "ss_new_sd_model_hash": base.sha256,
    }


def _spec(name: str, base: BaseFacts, at: float) -> dict[str, object]:
    """Stability AI's model metadata standard, version 1.0.1 (github.com/Stability-AI/ModelSpec)."""
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{base.architecture}/lora",
        "implementation": SGM if "-xl-" in base.architecture else "diffusers",
        "title": name,
        "date": datetime.fromtimestamp(int(at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        # The standard has no word for a flow.
        **({} if base.prediction == "flow" else {"prediction_type": base.prediction}),
    }


def _data(data: DataFacts) -> dict[str, object]:
    tags = {name: dict(Counter(_tags(folder.captions))) for name, folder in data.folders.items()}
    buckets = {
        "buckets": {
            str(number): {"resolution": list(size), "count": count}
            for number, (size, count) in enumerate(sorted(data.buckets.items()))
        }
    }
    return {
        "ss_num_train_images": data.images,
        "ss_num_reg_images": sum(len(folder.captions) * folder.repeats for folder in data.regularization.values()),
        "ss_num_batches_per_epoch": data.batches_per_epoch,
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_enable_bucket": True,
        "ss_dataset_dirs": _dirs(data.folders),
        "ss_reg_dataset_dirs": _dirs(data.regularization),
        "ss_tag_frequency": _json(tags),
        "ss_bucket_info": _json(buckets),
    }


def _dirs(folders: Mapping[str, Folder]) -> str:
    counts = {name: (folder.repeats, len(folder.captions)) for name, folder in folders.items()}
    return _json({name: {"n_repeats": repeats, "img_count": images} for name, (repeats, images) in counts.items()})


def _tags(captions: Sequence[str]) -> list[str]:
    return [tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip()]


def _modelspec(run: RunFacts, data: DataFacts, base: BaseFacts) -> dict[str, object]:
    values = {
        **_spec(run.name, base, run.finished_at),
        "resolution": f"{data.resolution}x{data.resolution}",
        "encoder_layer": "1",
        "timestep_range": f"{run.timesteps[0]},{run.timesteps[1]}",
    }
    if run.trigger_words:
        values["trigger_phrase"] = run.trigger_words
    return {f"modelspec.{key}": value for key, value in values.items()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
