"""The tab's controls, from the declaration: what is shown, where, under which words, and back to settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lora_trainer.config.options import Option, options
from lora_trainer.config.presets import preset_keys
from lora_trainer.config.schema import GROUPS

# Option: why it has no control.
HIDDEN = {
    "base_model": "the host's loaded checkpoint",
    "output_dir": "the host's LoRA folder",
    "cache_dir": "a folder of the host's",
    "base_precision": "the base is as the host stores it",
    "device": "the host's device",
    "cpu_threads": "the host's threads",
    "trial": "a button of its own",
    "enable_xformers": "does nothing",
    "optimizer_class": "names code: only on the command line",
}
FIRST = ("preset", "output_name", "train_data_dir", "trigger_words")
MAIN = ("lora_rank", "epochs", "batch_size", "resolution")

_LABELS = {
    "output_name": "LoRA name",
    "train_data_dir": "Folder of pictures",
    "metadata_path": "Caption file",
    "validation_data_dir": "Folder of held-out pictures",
    "validation_split": "Share held out",
    "extra_resolutions": "More resolutions",
    "crop": "Part of the picture",
    "crops_per_image": "Parts to choose from",
    "flip": "Mirror pictures by chance",
    "keep_tokens": "Tags that stay first",
    "caption_dropout": "Share of empty captions",
    "tag_dropout": "Share of tags left out",
    "adapter": "Kind of adapter",
    "lokr_factor": "LoKr's small factor",
    "mode": "What is learned",
    "slider_positive": "Slider leads to",
    "slider_negative": "Slider leads away from",
    "slider_target": "Slider acts on",
    "slider_attributes": "Slider leaves alone",
    "slider_guidance": "Reach of the slider",
    "slider_pictures": "Pictures the slider draws",
    "original_data_dir": "Folder of originals",
    "lora_rank": "Rank",
    "lora_alpha": "Alpha",
    "lora_dropout": "Dropout",
    "rank_stabilized": "Rank-stabilised strength",
    "rank_dropout": "Share of ranks left out",
    "module_dropout": "Share of modules left out",
    "target_modules": "Parts to train",
    "include_modules": "Only modules like",
    "exclude_modules": "No modules like",
    "conv_rank": "Rank of convolutions",
    "conv_alpha": "Alpha of convolutions",
    "block_ranks": "Ranks of blocks",
    "block_alphas": "Alphas of blocks",
    "block_lrs": "Learning rates of blocks",
    "loraplus_lr_ratio": "LoRA+ ratio",
    "scale_weight_norms": "Largest norm of a module",
    "train_unet": "Train the UNet",
    "text_encoder_rank": "Text encoder's rank",
    "text_encoder_alpha": "Text encoder's alpha",
    "gradient_accumulation_steps": "Batches per step",
    "max_train_steps": "Stop after steps",
    "lr_scheduler": "Learning rate schedule",
    "lr_scheduler_num_cycles": "Cycles of the schedule",
    "lr_scheduler_power": "Power of the schedule",
    "lr_warmup_steps": "Warm-up steps",
    "lr_warmup_ratio": "Warm-up as a share",
    "loss_type": "Loss",
    "huber_c": "Huber's c",
    "min_snr_gamma": "Min-SNR gamma",
    "soft_min_snr_gamma": "Soft min-SNR gamma",
    "debiased_estimation_loss": "Debiased estimation",
    "scale_v_pred_loss_like_noise_pred": "Weigh v like noise",
    "mask_dir": "Folder of masks",
    "preservation_weight": "Weight of output preservation",
    "preservation_prompt": "Words for the class",
    "reg_data_dir": "Folder of regularisation pictures",
    "prior_loss_weight": "Weight of regularisation pictures",
    "unmasked_weight": "Weight of what masks leave out",
    "multires_noise_iterations": "Multi-resolution noise",
    "multires_noise_discount": "Multi-resolution discount",
    "ip_noise_gamma": "Input perturbation",
    "timestep_sampling": "Timesteps",
    "zero_terminal_snr": "Zero-terminal SNR",
    "optimizer_args": "Arguments of the optimizer",
    "ema_decay": "Decay of the average",
    "max_grad_norm": "Longest gradient",
    "output_format": "File format",
    "save_precision": "Precision of the file",
    "save_steps": "Save every so many steps",
    "overwrite": "Replace a LoRA of the same name",
    "log_with": "Log losses to",
    "metadata_private": "Keep paths and prompts in the file",
    "training_comment": "Comment",
    "validate_every": "Measure every so many steps",
    "validation_draws": "Measurements each time",
    "save_best": "Save the best step",
    "early_stopping_patience": "Patience of early stopping",
    "measure_drift": "Compare with other prompts",
    "drift_prompts": "Other prompts",
    "clip_model_dir": "Folder of a CLIP model",
    "sample_every": "Draw every so many steps",
    "sample_steps": "Denoising steps of a drawing",
    "sample_guidance": "Guidance of a drawing",
    "sample_negative_prompt": "Negative prompt of a drawing",
}
# The command line writes the option's name where the page needs other or fewer words.
_HELP = {
    "preset": "Sets some of the controls below for what is to be learned.",
    "train_data_dir": "Pictures with captions beside them: metadata.csv, metadata.jsonl or one .txt for each picture.",
    "concepts": "Only these folders in the folder of pictures: castle, or {folder: castle, repeats: 10}.",
    "lora_rank": "What it can hold. 4 to 16 for a style.",
    "batch_size": "Pictures at once; less saves memory.",
    "resolution": "In pixels; the model's own when empty.",
    "gradient_accumulation_steps": "Batches added up for one step, as if the batch size were that many times larger.",
    "log_with": "The run's folder keeps them as CSV, and for TensorBoard if asked.",
}

_AUTOMATIC = (
    *("output_name", "resolution", "lora_alpha", "conv_alpha"),
    *("text_encoder_rank", "text_encoder_alpha", "text_encoder_lr", "text_encoder_2_lr", "ema_decay"),
)
_PLACEHOLDERS = {
    "train_data_dir": "/path/to/my pictures",
    "concepts": "{folder: castle, repeats: 10, trigger_words: my castle}",
}

Control = Literal["checkbox", "dropdown", "number", "text", "lines"]


def label(key: str) -> str:
    """The option in plain words."""
    return _LABELS.get(key, key.replace("_", " ").capitalize())


def info(option: Option) -> str:
    """The help under a control; a list says how it is written."""
    text = _HELP.get(option.key, option.help)
    return f"{text} One a line." if option.kind is list else text


def control(option: Option) -> Control:
    if option.kind is bool:
        return "checkbox"
    if option.choices:
        return "dropdown"
    if option.kind is list:
        return "lines"
    # gradio shows 0 for a number that is not there; an empty text stays empty.
    return "number" if option.kind in (int, float) and not option.optional else "text"


def initial(option: Option) -> object:
    """What the control shows before anyone touches it."""
    return as_shown(option, option.default)


def as_shown(option: Option, value: Any) -> object:
    """What the control shows for `value`."""
    kind = control(option)
    if kind == "lines":
        return "\n".join(map(str, value or ()))
    return ("" if value is None else str(value)) if kind == "text" else value


def placeholder(option: Option) -> str:
    """The grey words in an empty text."""
    return _PLACEHOLDERS.get(option.key, "automatic" if option.key in _AUTOMATIC else "none")


def stride(option: Option) -> float:
    """How far a click on a number's arrow goes: 1e-4 for a learning rate of 2e-4."""
    if option.kind is int:
        return option.meta.multiple_of or 1
    return 10.0 ** math.floor(math.log10(option.default)) if option.default else 0.1


def groups() -> dict[str, tuple[Option, ...]]:
    """Of each group in `GROUPS` the options that its accordion shows."""
    rest = [option for key, option in options().items() if key not in (*HIDDEN, *FIRST, *MAIN)]
    return {group: tuple(option for option in rest if option.group == group) for group in GROUPS}


def shown() -> tuple[Option, ...]:
    """Every option with a control, in the order of the page."""
    first = [options()[key] for key in (*FIRST, *MAIN)]
    return (*first, *(option for group in groups().values() for option in group))


def settings(values: Mapping[str, object]) -> dict[str, object]:
    """The settings that the controls' `values` stand for; an empty optional one is left out, unless a preset would then
    fill it.

    Nothing is checked here: `config.build` reports every problem at once.
    """
    found = {key: setting(options()[key], value) for key, value in values.items()}
    kept = {key for key in found if key in preset_keys() or not options()[key].optional}
    return {key: value for key, value in found.items() if value is not None or key in kept}


def setting(option: Option, value: object) -> object:
    """What the control's `value` stands for; nothing for an empty optional one."""
    if not isinstance(value, str):
        return value
    if control(option) == "lines":
        return [line.strip() for line in value.splitlines() if line.strip()]
    # "Copy as path" on Windows puts quotes around it.
    text = value.strip()
    if option.key.endswith(("_dir", "_path")):
        text = text.strip('"').strip()
    return None if option.optional and not text else text
