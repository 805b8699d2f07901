"""A run's settings as kohya's trainer writes them into a file's header."""

from __future__ import annotations

import json

from torch import nn

from lora_trainer.config import Config
from lora_trainer.models.stored import stored_in
from lora_trainer.training.chosen import conv_size, learning_rate_of, up_ratio_of, usual_size

# What LyCORIS calls them.
LYCORIS = {"dora": "lora", "loha": "loha", "lokr": "lokr", "ia3": "ia3", "oft": "diag-oft"}


def kohya_settings(config: Config) -> dict[str, object]:
    """Our settings under the names that kohya's trainer writes after `ss_`."""
    return {
        "learning_rate": config.learning_rate,
        "unet_lr": config.learning_rate,
        "text_encoder_lr": learning_rate_of(config, "text_encoder") if config.train_text_encoder else None,
        "num_epochs": config.epochs,
        "max_train_steps": config.max_train_steps,
        "batch_size_per_device": config.batch_size,
        "total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "lr_scheduler": config.lr_scheduler,
        "lr_warmup_steps": config.lr_warmup_steps,
        "optimizer": optimizer_name(config),
        "max_grad_norm": config.max_grad_norm,
        "network_module": "networks.lora" if config.adapter == "lora" else "lycoris.kohya",
        "network_dim": usual_size(config).rank,
        "network_alpha": _number(usual_size(config).alpha),
        "network_dropout": config.lora_dropout,
        "mixed_precision": config.mixed_precision,
        "full_fp16": False,
        "seed": config.seed,
        "max_token_length": None,
        "cache_latents": True,
        "lowram": False,
        **objective_settings(config),
        "prior_loss_weight": config.prior_loss_weight,
        "caption_dropout_rate": config.caption_dropout,
        "caption_tag_dropout_rate": config.tag_dropout,
        "shuffle_caption": config.shuffle_captions,
        "flip_aug": config.flip,
        "color_aug": False,
        "random_crop": config.crop == "random",
        "keep_tokens": config.keep_tokens or None,
        "bucket_no_upscale": not config.allow_upscaling,
        "training_comment": config.training_comment,
        **adapter_settings(config),
    }


def storage_settings(unet: nn.Module) -> dict[str, object]:
    """How the frozen UNet was stored, if in fewer bits than it computed in."""
    stored = stored_in(unet)
    if not stored:
        return {}
    name = stored[0].storage.name
    return {"base_precision": name} | ({"fp8_base_unet": True} if name == "fp8" else {})


def adapter_settings(config: Config) -> dict[str, object]:
    """What makes a LoRA no ordinary one, in the form of kohya's network_args; nothing for an ordinary one."""
    lycoris = config.adapter != "lora"
    asked = {
        "algo": LYCORIS[config.adapter] if lycoris else None,
        "dora_wd": config.adapter == "dora",
        "factor": config.lokr_factor,
        "conv_dim": config.conv_rank,
        "conv_alpha": config.conv_rank and _number(conv_size(config).alpha),
        "rank_dropout": config.rank_dropout,
        "module_dropout": config.module_dropout,
        "loraplus_lr_ratio": ratio if (ratio := up_ratio_of(config)) != 1 else None,
        "block_dims": " ".join(config.block_ranks),
        "block_alphas": " ".join(config.block_alphas),
        "block_lr_weight": " ".join(config.block_lrs),
    }
    given = {key: str(value) for key, value in asked.items() if value}
    found: dict[str, object] = {"network_args": json.dumps(given)} if given else {}
    return found | ({"scale_weight_norms": config.scale_weight_norms} if config.scale_weight_norms else {})


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def optimizer_name(config: Config) -> str:
    """With its arguments in brackets."""
    name = config.optimizer_class or config.optimizer
    return f"{name}({','.join(config.optimizer_args)})" if config.optimizer_args else name


def objective_settings(config: Config) -> dict[str, object]:
    """What is minimised, likewise; a weight that is off is None there."""
    pseudo_huber = config.loss_type in ("huber", "smooth_l1")
    return {
        "noise_offset": config.noise_offset or None,
        "adaptive_noise_scale": config.adaptive_noise_scale or None,
        "multires_noise_iterations": config.multires_noise_iterations or None,
        "multires_noise_discount": config.multires_noise_discount,
        "ip_noise_gamma": config.ip_noise_gamma or None,
        "zero_terminal_snr": config.zero_terminal_snr,
        "min_snr_gamma": config.min_snr_gamma or None,
        "debiased_estimation": config.debiased_estimation_loss,
        "loss_type": config.loss_type,
        "huber_schedule": config.huber_schedule if pseudo_huber else None,
        "huber_c": config.huber_c if pseudo_huber else None,
    }
