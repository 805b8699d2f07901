"""Rules between the settings of what is trained."""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.config.adapting import Adapting
from lora_trainer.config.blocks import BlockProblem, block_values, ranks

TEXT_ENCODER = ("text_encoder_lr", "text_encoder_rank", "text_encoder_alpha", "text_encoder_2_lr")
BLOCKS = ("block_ranks", "block_alphas", "block_lrs")
# Optimizers that keep one learning rate for all parameters, and those that keep averages of their own.
ONE_RATE = ("prodigy",)
SCHEDULE_FREE = ("adamwschedulefree", "prodigyplusschedulefree")

# Kinds of adapters without up and down matrices, and those without an alpha.
WITHOUT_PRODUCT = ("loha", "lokr", "ia3", "oft")
WITHOUT_ALPHA = ("ia3", "oft")
ALPHAS = ("rank_stabilized", "conv_alpha", "block_alphas", "text_encoder_alpha")
RANKS = ("lora_rank", "conv_rank", "text_encoder_rank")


def _networks(config: Adapting) -> Iterator[str]:
    if not (config.train_unet or config.train_text_encoder):
        yield "train_unet: expected train_text_encoder beside it where it is off, found neither"
    for key in TEXT_ENCODER:
        if getattr(config, key) is not None and not config.train_text_encoder:
            yield f"{key}: expected train_text_encoder beside it, found it switched off"
    if config.text_encoder_2_lr is not None and config.text_encoder_lr is None:
        yield "text_encoder_2_lr: expected text_encoder_lr, the first encoder's, beside it, found none"
    for key in (*BLOCKS, "conv_rank"):
        if getattr(config, key) and not config.train_unet:
            yield f"{key}: expected train_unet beside it, found it switched off"


def _alphas(config: Adapting) -> Iterator[str]:
    if config.rank_stabilized and config.lora_alpha is None:
        yield "rank_stabilized: expected lora_alpha beside it, which is then divided by sqrt(rank), found none"
    if config.conv_alpha is not None and config.conv_rank is None:
        yield "conv_alpha: expected conv_rank beside it, found none"


def _blocks(config: Adapting) -> Iterator[str]:
    for key in BLOCKS:
        try:
            values = (ranks if key == "block_ranks" else block_values)(getattr(config, key))
        except BlockProblem as problem:
            yield f"{key}: {problem}"
            continue
        if key == "block_alphas" and not all(values.values()):
            yield "block_alphas: expected more than 0; leave a block out with block_ranks, found 0"


def _rates(config: Adapting) -> Iterator[str]:
    one = config.optimizer in ONE_RATE
    if one and config.text_encoder_lr not in (None, config.learning_rate):
        yield _one_rate(config, "text_encoder_lr", f"{config.text_encoder_lr:g}")
    if one and config.text_encoder_2_lr not in (None, config.learning_rate):
        yield _one_rate(config, "text_encoder_2_lr", f"{config.text_encoder_2_lr:g}")
    if one and config.loraplus_lr_ratio not in (None, 1):
        yield f"loraplus_lr_ratio: expected 1, since {config.optimizer} knows one learning rate for all"
    if one and config.block_lrs:
        yield f"block_lrs: expected none, since {config.optimizer} knows one learning rate for all"
    if config.scale_weight_norms and config.optimizer in SCHEDULE_FREE:
        yield (
            f"scale_weight_norms: expected 0, since {config.optimizer} trains weights beside those that it saves, "
            f"found {config.scale_weight_norms:g}"
        )


def _one_rate(config: Adapting, key: str, found: str) -> str:
    return f"{key}: expected that of learning_rate, since {config.optimizer} knows one for all, found {found}"


def _kinds(config: Adapting) -> Iterator[str]:
    kind = config.adapter
    if kind in WITHOUT_PRODUCT and config.loraplus_lr_ratio not in (None, 1):
        yield f"loraplus_lr_ratio: expected 1, since {kind} has no up and down matrices"
    if kind != "lora" and config.scale_weight_norms:
        yield f"scale_weight_norms: expected adapter lora beside it, found {kind}"
    if kind != "lora" and getattr(config, "output_format", "webui") != "webui":
        yield f"output_format: expected webui, since diffusers reads no {kind} as it is trained here"
    if kind != "lora" and config.initial_lora is not None:
        yield f"initial_lora: expected adapter lora beside it, found {kind}"
    if kind in WITHOUT_ALPHA:
        yield from (f"{key}: expected none, since {kind} has no alpha" for key in ALPHAS if getattr(config, key))
    if kind == "oft":
        small = [key for key in RANKS if getattr(config, key) == 1]
        yield from (f"{key}: expected 2 or more, the size of the blocks that oft turns, found 1" for key in small)
    if config.lokr_factor and kind != "lokr":
        yield f"lokr_factor: expected adapter lokr beside it, found {kind}"


RULES = (_kinds, _networks, _alphas, _blocks, _rates)
