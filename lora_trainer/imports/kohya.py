"""What kohya's arguments mean here (github.com/kohya-ss/sd-scripts), wherever they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_trainer.config.options import options
from lora_trainer.imports.taken import Taken, side_of

# Of captions and pictures: theirs, and ours where there is such an option. Their defaults are off.
AUGMENT = {
    "shuffle_caption": "shuffle_captions",
    "keep_tokens": "keep_tokens",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "enable_wildcard": "wildcards",
    "flip_aug": "flip",
    "random_crop": "crop",
}
# Of noise and loss: under the same names here.
OBJECTIVE = (
    *("loss_type", "huber_schedule", "huber_c", "min_snr_gamma", "debiased_estimation_loss"),
    *("scale_v_pred_loss_like_noise_pred", "noise_offset", "adaptive_noise_scale", "multires_noise_iterations"),
    *("multires_noise_discount", "ip_noise_gamma", "min_timestep", "max_timestep", "zero_terminal_snr"),
)
_ABSENT: dict[str, object] = {"caption_prefix": "", "caption_suffix": "", "keep_tokens": 0}
_CACHED = "cache_dir keeps what is encoded; without it, it is kept in memory"
REASONS = {
    "cache_latents": "always so here",
    "cache_latents_to_disk": _CACHED,
    "cache_text_encoder_outputs": "always so here, unless the text encoder is trained",
    "cache_text_encoder_outputs_to_disk": _CACHED,
    "cache_info": "not needed",
    "min_bucket_reso": "sizes of pictures are chosen by their area alone",
    "max_bucket_reso": "sizes of pictures are chosen by their area alone",
    "bucket_reso_steps": "always 64",
    "prior_loss_weight": "without reg_data_dir it says nothing",
    "huber_scale": "always 1 here",
    "noise_offset_random_strength": "not supported",
    "ip_noise_gamma_random_strength": "not supported",
    "v_pred_like_loss": "not supported",
    "color_aug": "not supported",
    "face_crop_aug_range": "not supported",
    "keep_tokens_separator": "not supported",
    "secondary_separator": "not supported",
    "enable_wildcard": "not supported",
    "caption_dropout_every_n_epochs": "not supported",
    "caption_separator": "always a comma",
    "resize_interpolation": "always Lanczos",
}


def data_set(taken: Taken, values: dict[str, Any], name: Callable[[str], str] = str) -> None:
    """Take size, buckets and captions out of `values`; `name` tells where a key stands."""
    if "resolution" in values:
        _resolution(taken, values.pop("resolution"), name("resolution"))
    if "enable_bucket" in values and not (enabled := values.pop("enable_bucket")):
        why = "pictures always keep about their own shape: crop them to squares before"
        taken.leave(name("enable_bucket"), enabled, why)
    if "bucket_no_upscale" in values:
        stays = values.pop("bucket_no_upscale")
        taken.take("allow_upscaling", not stays if isinstance(stays, bool) else stays, name("bucket_no_upscale"))
    if "caption_extension" in values and (ending := values.pop("caption_extension")) not in (".txt", ".caption"):
        taken.leave(name("caption_extension"), ending, "captions are read from .txt and .caption files")
    for theirs, ours in AUGMENT.items():
        if theirs in values and ours in options():
            value = values.pop(theirs)
            taken.take(ours, ("random" if value else "center") if ours == "crop" else value, name(theirs))
    if "keep_tokens" in options() and values.get("keep_tokens_separator") == "|||":
        # The same mark there and here.
        del values["keep_tokens_separator"]
    masks(taken, values, name)


def masks(taken: Taken, values: dict[str, Any], name: Callable[[str], str] = str) -> None:
    """Take masks out of `values`. What they leave out does not count at all there."""
    folder = values.pop("conditioning_data_dir", None)
    if folder:
        taken.take("mask_dir", folder, name("conditioning_data_dir"))
    for key in ("alpha_mask", "masked_loss"):
        if values.get(key):
            taken.take("masked_loss", values.pop(key), name(key))
    if folder:
        taken.settings.setdefault("masked_loss", True)
    if taken.settings.get("masked_loss"):
        taken.settings.setdefault("unmasked_weight", 0.0)


def objective(taken: Taken, values: dict[str, Any]) -> None:
    """Take noise and loss out of `values`; what is off there is left, as it is here."""
    # Alone it does nothing there.
    if not values.get("noise_offset") and values.get("adaptive_noise_scale"):
        taken.leave("adaptive_noise_scale", values.pop("adaptive_noise_scale"), "does nothing without noise_offset")
    for key in OBJECTIVE:
        if values.get(key) not in (None, False, 0, ""):
            taken.take(key, values.pop(key), key)
    if values.get("huber_scale") == 1:
        del values["huber_scale"]


def storage(taken: Taken, values: dict[str, Any]) -> None:
    """Take the format of the frozen base out of `values`: all of it there, its matrices here."""
    for key in ("fp8_base", "fp8_base_unet"):
        if values.get(key):
            taken.take("base_precision", "fp8", key)
            taken.remarks.append(f"{key} {values.pop(key)}: the UNet's matrices in fp8, nothing else of the base")


def off(theirs: str) -> object:
    """What it means there when one of AUGMENT is not said."""
    return _ABSENT.get(theirs, 0.0 if theirs.endswith("_rate") else False)


def _resolution(taken: Taken, value: object, name: str) -> None:
    side = side_of(value)
    if side is None:
        taken.leave(name, value, "expected 512, or 512,768")
        return
    if not side[1]:
        taken.remarks.append(f"{name} {value!r}: about as many pixels as {side[0]} × {side[0]}")
    taken.take("resolution", side[0], name)


def scale_remark(settings: Mapping[str, Any]) -> str:
    """What alpha means, since presets count on another default."""
    rank, alpha = settings["lora_rank"], settings["lora_alpha"]
    return (
        f"LoRA scale alpha / rank = {alpha:g} / {rank} = {alpha / rank:g}; left out it would be 2 here, 1 / rank there"
    )
