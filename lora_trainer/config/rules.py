"""Rules between fields: each looks at a whole config and returns problems."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

import msgspec

from lora_trainer.config.adapting_rules import RULES as ADAPTING
from lora_trainer.config.adapting_rules import SCHEDULE_FREE
from lora_trainer.config.mode_rules import mode_problems
from lora_trainer.config.schema import PATHS, Config
from lora_trainer.errors import shown

# The WebUI's prompt syntax cannot name a LoRA with these, and file systems refuse the rest.
FORBIDDEN = re.compile(r'[:<>,/\\|?*"\x00-\x1f\x7f]')
RESERVED = {"none", "addams", "con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)}
MAX_NAME_BYTES = 150
WEIGHTS = ("min_snr_gamma", "soft_min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")
# These find the learning rate by themselves; learning_rate is a multiple of it.
ADAPTS = ("prodigy", "prodigyplusschedulefree")
ARGUMENT = re.compile(r"\s*[A-Za-z_]\w*\s*=\s*\S.*", re.DOTALL)
MAX_TEXT, MAX_ENTRIES, MAX_CONCEPTS = 10_000, 1_000, 100


def problems(config: Config) -> list[str]:
    return [problem for rule in RULES for problem in rule(config)]


def _validation(config: Config) -> Iterator[str]:
    if config.validation_data_dir and config.validation_split:
        yield "validation_split: expected 0 together with validation_data_dir, found " + str(config.validation_split)
    for key in ("validate_every", "early_stopping_patience"):
        if getattr(config, key) and not (config.validation_data_dir or config.validation_split):
            yield f"{key}: expected validation_data_dir or validation_split beside it, found neither"


def _drift(config: Config) -> Iterator[str]:
    if config.drift_prompts and not config.measure_drift:
        yield "drift_prompts: expected measure_drift beside them, found it switched off"
    if config.clip_model_dir and not config.measure_drift:
        yield "clip_model_dir: expected measure_drift beside it, found it switched off"


def _previews(config: Config) -> Iterator[str]:
    if config.sample_every and not config.sample_prompts:
        yield "sample_every: expected sample_prompts beside it, found none"


def _captions(config: Config) -> Iterator[str]:
    if config.keep_tokens and not (config.shuffle_captions or config.tag_dropout):
        yield "keep_tokens: expected shuffle_captions or tag_dropout beside it, found neither"


def _optimizer(config: Config) -> Iterator[str]:
    if config.optimizer == "custom" and not config.optimizer_class:
        yield "optimizer_class: expected module.Class beside optimizer custom, found none"
    if config.optimizer_class and config.optimizer != "custom":
        yield f"optimizer_class: expected optimizer custom beside it, found {config.optimizer}"
    if config.optimizer_args and config.optimizer == "adamw":
        yield "optimizer_args: expected an optimizer of another package beside them, found adamw"
    for text in config.optimizer_args[:MAX_ENTRIES]:  # what is beyond is refused by its number
        if not ARGUMENT.fullmatch(text):
            yield f"optimizer_args: expected name=value, found {shown(text)}"
    if config.optimizer in SCHEDULE_FREE and config.ema_decay:
        yield f"ema_decay: expected 0, since {config.optimizer} averages by itself, found {config.ema_decay:g}"


def _warmup(config: Config) -> Iterator[str]:
    if config.lr_warmup_steps and config.lr_warmup_ratio:
        yield f"lr_warmup_ratio: expected 0 together with lr_warmup_steps, found {config.lr_warmup_ratio:g}"
    if config.max_train_steps is not None and config.lr_warmup_steps >= config.max_train_steps:
        yield (
            f"lr_warmup_steps: expected fewer than max_train_steps ({config.max_train_steps}), "
            f"found {config.lr_warmup_steps}"
        )


def _objective(config: Config) -> Iterator[str]:
    weights = [key for key in WEIGHTS if getattr(config, key)]
    if len(weights) > 1:
        yield f"{weights[1]}: expected one way to weigh timesteps, found {' and '.join(weights)}"
    if config.adaptive_noise_scale and not config.noise_offset:
        yield "adaptive_noise_scale: expected noise_offset beside it, found 0"
    if config.max_timestep is not None and config.min_timestep >= config.max_timestep:
        yield f"min_timestep: expected less than max_timestep ({config.max_timestep}), found {config.min_timestep}"


def _masks(config: Config) -> Iterator[str]:
    if config.mask_dir and not config.masked_loss:
        yield "mask_dir: expected masked_loss beside it, found it switched off"


def _preservation(config: Config) -> Iterator[str]:
    words = (config.trigger_words, *(concept.trigger_words or "" for concept in config.concepts))
    given = any(word.strip(" ,") for word in words) or (config.preservation_prompt or "").strip()
    if config.preservation_weight and not given:
        yield "preservation_weight: expected trigger_words to leave out or preservation_prompt beside it, found none"


def _paths(config: Config) -> Iterator[str]:
    for key in ("base_model", "train_data_dir", "output_dir"):
        if not getattr(config, key).strip() and not (key == "train_data_dir" and config.mode == "slider"):
            yield f"{key}: expected a path, found nothing"
    if config.initial_lora is not None and not config.initial_lora.strip():
        yield "initial_lora: expected a file or a name, found nothing"
    for key in PATHS:
        if "\0" in (getattr(config, key) or ""):
            yield f"{key}: expected a path without NUL bytes, found {shown(getattr(config, key))}"


def _concepts(config: Config) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, concept in enumerate(config.concepts, start=1):
        if not concept.folder.strip():
            yield f"concepts, entry {number}: expected a folder, found nothing"
        for path in (concept.folder, concept.regularization or ""):
            if "\0" in path:
                yield f"concepts, entry {number}: expected a path without NUL bytes, found {shown(path)}"
        if concept.regularization is not None and not concept.regularization.strip():
            yield f"concepts, entry {number}: expected a folder as regularization, found nothing"
        first = seen.setdefault(posixpath.normpath(concept.folder.replace("\\", "/")), number)
        if first != number:
            yield f"concepts: expected each folder once, found {shown(concept.folder)} in entries {first} and {number}"
            return


def _name(config: Config) -> Iterator[str]:
    name = config.output_name
    if name is None:
        return
    if FORBIDDEN.search(name):
        yield f'output_name: expected a name without : < > , / \\ | ? * " and control characters, found {shown(name)}'
    if name.split(".")[0].strip().lower() in RESERVED or not name.strip(" .") or name != name.strip(" ."):
        yield f"output_name: expected a name that the WebUI and Windows allow, found {shown(name)}"
    if len(name.encode()) > MAX_NAME_BYTES:
        yield f"output_name: expected at most {MAX_NAME_BYTES} bytes, found {len(name.encode())}"


def _size(config: Config) -> Iterator[str]:
    for key, value in msgspec.to_builtins(config).items():
        most = MAX_CONCEPTS if key == "concepts" else MAX_ENTRIES
        if isinstance(value, list) and len(value) > most:
            yield f"{key}: expected at most {most:,} entries, found {len(value):,}"
        # What is accepted must fit the YAML file beside the output, and that be read again.
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        length = sum(len(text if isinstance(text, str) else str(text)) for text in texts)
        if length > MAX_TEXT:
            yield f"{key}: expected at most {MAX_TEXT:,} characters, found {length:,}"


RULES = (
    _size,
    mode_problems,
    _objective,
    _masks,
    _preservation,
    _optimizer,
    _paths,
    _concepts,
    _validation,
    _drift,
    _previews,
    *ADAPTING,
    _captions,
    _warmup,
    _name,
)


def unsearchable(config: Config) -> Iterator[str]:
    """Why no learning rate can be looked for."""
    if config.optimizer in ADAPTS:
        yield f"optimizer: {config.optimizer} finds the learning rate by itself; give it learning_rate=1"
