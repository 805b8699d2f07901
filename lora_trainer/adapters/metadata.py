"""What a LoRA file says about itself: kohya's `ss_` keys, `modelspec`, and our whole config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from lora_trainer import __version__
from lora_trainer.config.sources import HEADER_KEY

# What kohya's trainer names as the implementation of SDXL LoRAs; the earlier families' are diffusers'.
SGM = "https://github.com/Stability-AI/generative-models"


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
    the first that was trained, and the one before which that ended."""

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
        "ss_sd_model_name": base.name,
        "ss_base_model_version": base.version,
        "ss_v2": base.version.startswith("sd_v2"),
        "ss_sd_model_hash": base.legacy_hash,
        "ss_new_sd_model_hash": base.sha256,
        **_data(data),
        **_modelspec(run, data, base),
        HEADER_KEY: run.config_json,
        "lora_trainer_version": __version__,
    }
    # A hash that is not known is left out: the WebUI would trust a wrong one.
    unknown = {key for key, value in values.items() if value is None and key.endswith("_hash")}
    return {key: str(value) for key, value in values.items() if key not in unknown}


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
    """Stability AI's model metadata standard, version 1.0.1 (github.com/Stability-AI/ModelSpec)."""
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{base.architecture}/lora",
        "implementation": SGM if "-xl-" in base.architecture else "diffusers",
        "title": run.name,
        "date": datetime.fromtimestamp(int(run.finished_at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        "resolution": f"{data.resolution}x{data.resolution}",
        "prediction_type": base.prediction,
        "encoder_layer": "1",
        "timestep_range": f"{run.timesteps[0]},{run.timesteps[1]}",
    }
    if run.trigger_words:
        values["trigger_phrase"] = run.trigger_words
    return {f"modelspec.{key}": value for key, value in values.items()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
