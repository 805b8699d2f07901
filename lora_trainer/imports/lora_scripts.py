"""lora-scripts' runs: its TOML files in config/, and those that its page saves.

Format: config/default.toml and mikazuki/schema of github.com/Akegarasu/lora-scripts. Sections only group: the keys are
kohya's arguments (train_network.py of github.com/kohya-ss/sd-scripts), with some of the page's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_trainer.imports import kohya
from lora_trainer.imports.network_args import network
from lora_trainer.imports.taken import Taken

NAME = "lora-scripts' description of a run"
_OF_A_RUN = ("train_data_dir", "network_dim", "network_module", "pretrained_model_name_or_path", "resolution")
_SAME = {
    "pretrained_model_name_or_path": "base_model",
    "train_data_dir": "train_data_dir",
    "output_dir": "output_dir",
    "output_name": "output_name",
    "network_dim": "lora_rank",
    "network_alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_grad_norm": "max_grad_norm",
    "mixed_precision": "mixed_precision",
    "seed": "seed",
    "clip_skip": "clip_skip",
    "xformers": "enable_xformers",
    "save_every_n_steps": "save_steps",
    "training_comment": "training_comment",
}
# What a whole run means there by what it does not say (train_network.py and library/train_util.py).
_DEFAULTS = {
    "network_dim": 4,
    "network_alpha": 1,
    "network_dropout": 0,
    "train_batch_size": 1,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "mixed_precision": "no",
    "save_precision": "float",
    "bucket_no_upscale": False,
    "network_train_unet_only": False,
}
_EPOCHS = "it counts epochs, ours counts steps"
_REASONS = {
    **kohya.REASONS,
    "save_every_n_epochs": f"{_EPOCHS}: set save_steps",
    "sample_every_n_epochs": f"{_EPOCHS}: set sample_every",
    "save_last_n_epochs": "every saved step stays",
    "save_state": "a state to go on from is always kept",
    "resume": "train --resume goes on with the run in output_dir",
    "logging_dir": "losses go to OUTPUT_DIR/logs",
    "log_prefix": "losses go to OUTPUT_DIR/logs",
    "max_token_length": "captions of any length are encoded in parts of 75 tokens",
    "sdpa": "always so here",
    "persistent_data_loader_workers": "not needed",
    "lowram": "not needed",
    "no_half_vae": "a VAE that overflows is asked again in fp32",
    "network_args": "those of this network_module are not known here",
    "network_module": "LoRA, LoHa, LoKr, IA³ and OFT are trained here",
    "lr_scheduler_num_cycles": "only cosine_with_restarts has cycles",
    "lr_restart_cycles": "only cosine_with_restarts has cycles",
    "lr_scheduler_power": "only polynomial has a power",
    "sample_sampler": "the sampler is fixed",
    "prompt_file": "files of prompts are not read: write them as sample_prompts",
    "network_train_text_encoder_only": "the UNet is always trained",
    "v2": "the model's kind is read from its file",
    "v_parameterization": "the model's kind is read from its file, or from a .yaml beside it",
    "model_train_type": "the model's kind is read from its file",
}


def recognises(data: object) -> bool:
    return isinstance(data, Mapping) and any(key in _flat(Taken(), data) for key in _OF_A_RUN)


def read(data: Mapping[str, Any]) -> Taken:
    taken = Taken()
    given = _flat(taken, data)
    unsaid = {key: given.pop(key) for key, value in list(given.items()) if value is None}
    taken.leave_all(unsaid, {})
    values = dict(given)
    if any(key in given for key in ("train_data_dir", "pretrained_model_name_or_path")):
        values = {**_DEFAULTS, **given}
        silent = [f"{key} {value}" for key, value in _DEFAULTS.items() if key not in given and key != "learning_rate"]
        if silent:
            taken.remarks.append(f"what it does not say has kohya's default: {', '.join(silent)}")
        if "max_train_epochs" not in given:
            values.setdefault("max_train_steps", 1600)
    kohya.data_set(taken, values)
    _length(taken, values)
    _rates(taken, values)
    _optimizer(taken, values)
    _schedule(taken, values)
    kohya.objective(taken, values)
    kohya.storage(taken, values)
    if values.get("reg_data_dir"):
        for key in ("reg_data_dir", "prior_loss_weight"):
            if key in values:
                taken.take(key, values.pop(key), key)
    _saving(taken, values)
    network(taken, values)
    _previews(taken, values)
    if values.get("network_alpha") == 0 and "network_dim" in values:
        taken.remarks.append("network_alpha 0: that means the rank there")
        values["network_alpha"] = values["network_dim"]
    for theirs, ours in _SAME.items():
        if theirs in values:
            taken.take(ours, values.pop(theirs), theirs)
    _alpha(taken)
    taken.leave_all(values, _REASONS)
    return taken


def _flat(taken: Taken, data: Mapping[str, Any]) -> dict[str, Any]:
    """All sections as one; of a key in two of them the later counts. [metadata] describes a preset."""
    values: dict[str, Any] = {}
    for section, content in data.items():
        if section == "metadata" and isinstance(content, Mapping):
            taken.leave_all(content, dict.fromkeys(content, "about the preset"), "metadata.")
            continue
        for key, value in content.items() if isinstance(content, Mapping) else [(section, content)]:
            if values.get(key, value) != value:
                taken.leave(key, values[key], "a later section says otherwise")
            values[key] = value
    return values


def _length(taken: Taken, values: dict[str, Any]) -> None:
    steps = values.pop("max_train_steps", None)
    if values.get("max_train_epochs"):
        taken.take("epochs", values.pop("max_train_epochs"), "max_train_epochs")
        if steps is not None:
            taken.leave("max_train_steps", steps, "max_train_epochs goes before it")
    elif steps is not None:
        taken.take("max_train_steps", steps, "max_train_steps")


def _rates(taken: Taken, values: dict[str, Any]) -> None:
    """A rate of a part goes before the common one; the text encoder is trained unless it is said not to be."""
    common, unet, text = (values.pop(key, None) for key in ("learning_rate", "unet_lr", "text_encoder_lr"))
    rate = common if unet in (None, "") else unet
    if rate is not None:
        taken.take("learning_rate", rate, "learning_rate" if unet in (None, "") else "unet_lr")
    only_unet = values.pop("network_train_unet_only", None)
    if only_unet is None:
        return
    text = common if text in (None, "") else text
    trained = not only_unet and str(text) not in ("0", "0.0")
    taken.take("train_text_encoder", trained, "network_train_unet_only")
    if trained:
        taken.take("text_encoder_lr", text, "text_encoder_lr")
    elif text is not None:
        taken.leave("text_encoder_lr", text, "the text encoder is not trained")


def _optimizer(taken: Taken, values: dict[str, Any]) -> None:
    name = values.pop("optimizer_type", None)
    if name is None:
        return
    known, path = str(name).lower(), str(name)
    if known in ("adamw8bit", "pagedadamw8bit"):
        taken.remarks.append(f"optimizer_type {name}: adamw, whose states of 32 bits a LoRA can afford")
        known = "adamw"
    elif "." in path and path in _CLASSES:
        known = _CLASSES[path]
    elif "." in path:
        taken.leave("optimizer_type", name, f"it names code: optimizer=custom optimizer_class={name} takes it")
        return
    taken.take("optimizer", known, "optimizer_type")
    if known != "adamw" and values.get("optimizer_args"):
        taken.take("optimizer_args", values.pop("optimizer_args"), "optimizer_args")


def _schedule(taken: Taken, values: dict[str, Any]) -> None:
    schedule, warmup = values.pop("lr_scheduler", None), values.pop("lr_warmup_steps", None)
    if schedule == "constant" and warmup:
        taken.leave("lr_warmup_steps", warmup, "kohya's constant schedule has no warm-up")
        warmup = None
    if schedule is not None:
        taken.take("lr_scheduler", str(schedule).removesuffix("_with_warmup"), "lr_scheduler")
    share = isinstance(warmup, float) and 0 < warmup < 1
    if warmup is not None:
        taken.take("lr_warmup_ratio" if share else "lr_warmup_steps", warmup, "lr_warmup_steps")
    if schedule == "cosine_with_restarts":
        for key in ("lr_scheduler_num_cycles", "lr_restart_cycles"):
            if values.get(key):
                taken.take("lr_scheduler_num_cycles", values.pop(key), key)
    if schedule == "polynomial" and values.get("lr_scheduler_power"):
        taken.take("lr_scheduler_power", values.pop("lr_scheduler_power"), "lr_scheduler_power")


# Which of ours a class is that kohya's trainer imports by its path.
_CLASSES = {"prodigyplus.ProdigyPlusScheduleFree": "prodigyplusschedulefree", "came_pytorch.CAME": "came"}


def _saving(taken: Taken, values: dict[str, Any]) -> None:
    if "save_precision" in values:
        precision = values.pop("save_precision")
        taken.take("save_precision", "fp32" if precision == "float" else precision, "save_precision")
    if values.get("save_model_as", "safetensors") == "safetensors":
        values.pop("save_model_as", None)


def _previews(taken: Taken, values: dict[str, Any]) -> None:
    """The page's own keys, or kohya's one line: PROMPT --n NEGATIVE --w 512 --h 512 --l 7 --s 24 --d 1337."""
    if values.pop("enable_preview", True) is False:
        drawn = {key: values.pop(key) for key in (*_PREVIEWS, "sample_prompts") if key in values}
        taken.leave_all(drawn, dict.fromkeys(drawn, "previews are switched off there"))
    line = values.get("sample_prompts")
    found = {ours: values.pop(theirs) for theirs, ours in _PREVIEWS.items() if theirs in values}
    if isinstance(line, str) and "--" in line and "\n" not in line.strip():
        del values["sample_prompts"]
        prompt, *flags = re.split(r"\s--(\w)\s", f" {line} ")
        written = {flag: text.strip() for flag, text in zip(flags[::2], flags[1::2], strict=True)}
        found |= {ours: written.pop(flag) for flag, ours in _FLAGS.items() if flag in written}
        found["sample_prompts"] = prompt.strip()
        taken.leave_all(written, dict.fromkeys(written, "size and seed are the run's"), "sample_prompts --")
    elif isinstance(line, str) and line.strip():
        taken.leave("sample_prompts", values.pop("sample_prompts"), _REASONS["prompt_file"])
    for ours, value in found.items():
        taken.take(ours, value, ours)


_PREVIEWS = {
    "positive_prompts": "sample_prompts",
    "negative_prompts": "sample_negative_prompt",
    "sample_cfg": "sample_guidance",
    "sample_steps": "sample_steps",
    "sample_every_n_steps": "sample_every",
}
_FLAGS = {"n": "sample_negative_prompt", "l": "sample_guidance", "s": "sample_steps"}


def _alpha(taken: Taken) -> None:
    settings = taken.settings
    if "lora_rank" in settings and "lora_alpha" in settings:
        taken.remarks.append(kohya.scale_remark(settings))
